"""What may enter the registry: weights and settings of an adapter, proved to be that, and nothing else.

An artifact is judged in two steps. `admissible` looks at names, kinds and sizes, so that nothing else is even read.
`judged` reads the copy that was made of what is left, so that what was checked is what is kept.
"""

from __future__ import annotations

import difflib
import fnmatch
import os
import re
import stat
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from tunesmith.cluster.artifacts import Manifest, read_manifest
from tunesmith.cluster.errors import AdapterError, CheckpointError
from tunesmith.cluster.storage import MANIFEST, FileRecord
from tunesmith.serving.bases import BaseFacts
from tunesmith.serving.documents import parse_json, refuse_code
from tunesmith.serving.lora import check_fit, check_layers, lora_rank
from tunesmith.serving.templates import check_templates
from tunesmith.serving.tensors import check_finite, read_header

WEIGHTS = "adapter_model.safetensors"
SETTINGS = "adapter_config.json"

_MIB = 2**20
_ENTERS = {
    SETTINGS: 1 * _MIB,
    "*.json": 64 * _MIB,
    "*.jsonl": 64 * _MIB,
    "*.jinja": _MIB // 4,
    "*.txt": 64 * _MIB,
    "tokenizer.model": 64 * _MIB,
    "spiece.model": 64 * _MIB,
    "sentencepiece.bpe.model": 64 * _MIB,
}
"""Files beside the weights by pattern, and their most bytes."""
_STAYS = ("README.md", "LICENSE*", ".gitattributes", ".gitignore", "receipts/*.html")
"""What people read; it is neither checked nor copied."""
_FOLDERS = ("receipts", "additional_chat_templates")
_FILE = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")
_PICKLES = (".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt", ".joblib", ".npy", ".npz")
_MOST_FILES = 256
_VOCABULARIES = ("tokenizer.json", "vocab.json", "added_tokens.json")
"""Their keys are tokens, of which one may well be called auto_map."""
PEFT_TYPES = frozenset(
    """
    ADALORA ADAMSS ADAPTION_PROMPT BEFT BOFT C3A CARTRIDGE CPT DEFT DELORA FOURIERFT FROD GLORA GRALORA HIRA HRA
    IA3 LILY LN_TUNING LOHA LOKR LORA MISS MULTITASK_PROMPT_TUNING OFT OSF PEANUT POLY PREFIX_TUNING PROMPT_TUNING
    PSOFT PVERA P_TUNING RANDLORA ROAD SHADOW SHIRA SUPERTUNING TINYLORA TRAINABLE_TOKENS UNILORA VBLORA VERA
    WAVEFT XLORA
    """.split()  # noqa: SIM905 - one to a line would be a page
)
"""Kinds of adapters that PEFT knows, written down because it takes seconds to import."""
_PATTERNS = ("target_modules", "exclude_modules", "layers_pattern", "rank_pattern", "alpha_pattern")
_DIGEST = re.compile(r"[0-9a-f]{64}")
_LONGEST_PATTERN, _MOST_REPEATS = 1000, 6


@dataclass(frozen=True)
class Rules:
    """What an adapter is held against.

    Attributes:
        base: the base that it is to be served on, when it is at hand; without a manifest, the one it was trained on.
        base_digest: what the operator says it was trained on; needed when neither a manifest nor `base` says it.
        trust_base: whether an adapter may enter of which nobody knows the base.
        trust_template: whether its chat templates enter unjudged.
        max_rank: largest LoRA rank.
        max_bytes: of all its files together.
    """

    base: BaseFacts | None = None
    base_digest: str | None = None
    trust_base: bool = False
    trust_template: bool = False
    max_rank: int = 256
    max_bytes: int = 8 * 2**30


@dataclass(frozen=True)
class Facts:
    """What is known of an adapter that may enter.

    Attributes:
        base_digest: hex sha256 of the base it was trained on; None when nobody knows.
        peft_type: as PEFT names it.
        rank: largest LoRA rank; None for other kinds.
        made: what its manifest says about its making; empty without one.
    """

    base_digest: str | None
    peft_type: str
    rank: int | None
    made: dict[str, Any]


def admissible(artifact: Path, rules: Rules) -> dict[str, int]:
    """The files of an artifact that enter, its manifest among them, by relative name with the bytes each may have.

    Raises:
        AdapterError: names the file that may not enter, and what was expected.
    """
    if (artifact / "config.json").is_file() and not (artifact / SETTINGS).is_file():
        raise AdapterError(
            f"{artifact}: a whole model, not an adapter", "Serve it as a base: bases.NAME.path of the configuration."
        )
    found: dict[str, int] = {}
    total = 0
    for name, entry in _listed(artifact):
        size = entry.stat(follow_symlinks=False).st_size
        limit = _limit(name, rules)
        if limit is None:
            continue
        if size > limit:
            raise AdapterError(f"{name}: {size:,} bytes; at most {limit:,} may enter")
        total += size
        found[name] = limit
    if total > rules.max_bytes:
        raise AdapterError(f"{artifact}: {total:,} bytes together; at most {rules.max_bytes:,} may enter")
    for name in (SETTINGS, WEIGHTS):
        if name not in found:
            raise AdapterError(f"{artifact}: there is no {name}", "Give a PEFT adapter's folder.")
    return found


def judged(copy: Path, files: Mapping[str, FileRecord], rules: Rules) -> Facts:
    """What is known of an adapter, once every check has passed.

    Args:
        copy: a private copy of the admissible files.
        files: sizes and hashes of the copied files, without the manifest.

    Raises:
        AdapterError: names the file, what was expected and what was found.
    """
    manifest = _manifest(copy, files) if (copy / MANIFEST).exists() else None
    settings: dict[str, Any] = {}
    for name in sorted(files):
        if name.endswith((".json", ".jsonl")):
            value = _checked_json(copy, name)
            if "/" not in name and name not in _VOCABULARIES:
                settings[name] = value
    config = settings[SETTINGS]
    if not rules.trust_template:
        check_templates(copy, files, settings)
    peft_type = _checked_settings(config)
    tensors = read_header(copy / WEIGHTS, WEIGHTS)
    if not tensors:
        raise AdapterError(f"{WEIGHTS}: there is no tensor in it")
    shapes = {name: tensor.shape for name, tensor in tensors.items()}
    rank = lora_rank(config, shapes, rules.max_rank) if peft_type == "LORA" else None
    base_digest = _base_digest(manifest, rules)
    if rules.base is not None and rules.base.shapes is not None:
        check_layers(config, rules.base.shapes)
        if rank is not None:
            check_fit(config, shapes, rules.base.shapes)
    check_finite(copy / WEIGHTS, tensors, WEIGHTS)
    return Facts(base_digest, peft_type, rank, manifest.about if manifest else {})


def _listed(artifact: Path) -> list[tuple[str, os.DirEntry[str]]]:
    """Every file of an artifact, once each is a plain file of a plain name."""
    found: list[tuple[str, os.DirEntry[str]]] = []
    for folder in ("", *_FOLDERS):
        if folder and not (artifact / folder).is_dir():
            continue
        try:
            entries = sorted(os.scandir(artifact / folder), key=lambda entry: entry.name)
        except OSError as error:
            raise AdapterError(f"{artifact / folder}: {error.strerror}", "Give the folder of an adapter.") from error
        for entry in entries:
            name = f"{folder}/{entry.name}" if folder else entry.name
            mode = entry.stat(follow_symlinks=False).st_mode
            if stat.S_ISLNK(mode):
                raise AdapterError(
                    f"{name!r} is a symbolic link; expected a file", "Copy the folder with its files: cp -rL."
                )
            if stat.S_ISDIR(mode):
                if folder or (entry.name not in _FOLDERS and entry.name != ".cache"):
                    raise AdapterError(f"{name!r} is a folder; expected {' and '.join(_FOLDERS)} at most")
                continue
            if not stat.S_ISREG(mode):
                raise AdapterError(f"{name!r} is neither a file nor a folder")
            found.append((name, entry))
            if len(found) > _MOST_FILES:
                raise AdapterError(f"{artifact}: more than {_MOST_FILES} files")
    return found


def _limit(name: str, rules: Rules) -> int | None:
    """Most bytes of a file that enters; None for one that stays behind."""
    path = PurePosixPath(name)
    if name == WEIGHTS:
        return rules.max_bytes
    if any(fnmatch.fnmatchcase(name, pattern) for pattern in _STAYS):
        return None
    if path.suffix.lower() in _PICKLES:
        raise AdapterError(
            f"{name!r} may hold pickled Python, which runs when it is read; expected {WEIGHTS}",
            "Save the adapter with safetensors, and leave optimizer and training state out.",
        )
    if _FILE.fullmatch(path.name):
        for pattern, limit in _ENTERS.items():
            if fnmatch.fnmatchcase(path.name, pattern):
                return limit
    raise AdapterError(
        f"{name!r} may not enter; expected {WEIGHTS}, {SETTINGS}, and JSON, tokenizer and template files",
        "Take it out of the folder.",
    )


def _manifest(copy: Path, files: Mapping[str, FileRecord]) -> Manifest:
    """The artifact's manifest, once it has signed just these files."""
    parse_json((copy / MANIFEST).read_bytes(), MANIFEST)
    try:
        manifest = read_manifest(copy)
    except CheckpointError as error:
        raise AdapterError(f"{MANIFEST}: {error.what.removeprefix(f'{copy / MANIFEST}: ')}") from error
    if manifest.kind != "artifact":
        raise AdapterError(f"{MANIFEST}: a folder of kind {manifest.kind!r}; expected an artifact")
    refuse_code(manifest.about, MANIFEST)
    for name, record in files.items():
        signed = manifest.files.get(name)
        if signed is None:
            raise AdapterError(f"{name}: not in {MANIFEST}", "It was added after the artifact was signed.")
        if signed != record:
            raise AdapterError(
                f"{name}: {record.size:,} bytes with sha256 {record.sha256[:12]}…; {MANIFEST} says {signed.size:,} "
                f"bytes with {signed.sha256[:12]}…",
                "It was changed after the artifact was signed.",
            )
    if missing := sorted(name for name in manifest.files if name not in files and not _stays(name)):
        raise AdapterError(f"{missing[0]}: in {MANIFEST}, but not there")
    if manifest.about.get("parity_passed") is False:
        raise AdapterError(
            f"{MANIFEST}: the artifact failed its parity receipt: it is not the model that was trained",
            "receipts/parity.json says how; train or export it again.",
        )
    return manifest


def _stays(name: str) -> bool:
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in _STAYS)


def _checked_json(copy: Path, name: str) -> Any:
    data = (copy / name).read_bytes()
    if name.endswith(".jsonl"):
        for number, line in enumerate(data.splitlines(), 1):
            refuse_code(parse_json(line, f"{name}:{number}"), f"{name}:{number}")
        return None
    value = parse_json(data, name, strict=name == SETTINGS)
    if PurePosixPath(name).name not in _VOCABULARIES:
        refuse_code(value, name)
    elif isinstance(value, dict):
        refuse_code({key: held for key, held in value.items() if key == "auto_map"}, name)
    return value


def _checked_settings(config: Any) -> str:
    """The PEFT type of an adapter's settings, once nothing in them would import, download or hang."""
    if not isinstance(config, dict):
        raise AdapterError(f"{SETTINGS}: {type(config).__name__}, not an object of settings")
    peft_type = config.get("peft_type")
    if not isinstance(peft_type, str) or peft_type not in PEFT_TYPES:
        near = difflib.get_close_matches(str(peft_type).upper(), PEFT_TYPES, 1) or ["LORA"]
        raise AdapterError(
            f"{SETTINGS}: peft_type is {str(peft_type)[:60]!r}; expected one of PEFT's, such as {near[0]}"
        )
    if config.get("megatron_config"):
        raise AdapterError(f"{SETTINGS}: megatron_config would make PEFT import {config.get('megatron_core')!r}")
    for key in ("auto_mapping", "rank_pattern", "alpha_pattern"):
        if not isinstance(config.get(key) or {}, dict):
            raise AdapterError(f"{SETTINGS}: {key} is {str(config[key])[:60]}; expected an object or null")
    library = (config.get("auto_mapping") or {}).get("parent_library")
    if library is not None and str(library).partition(".")[0] != "transformers":
        raise AdapterError(
            f"{SETTINGS}: auto_mapping.parent_library {str(library)[:80]!r} would be imported; expected transformers"
        )
    for key in _PATTERNS:
        held = config.get(key)
        for pattern in held if isinstance(held, dict | list) else [held]:
            if isinstance(pattern, str):
                _check_pattern(key, pattern)
    return peft_type


def _check_pattern(key: str, pattern: str) -> None:
    """Refuses regular expressions that can take for ever: PEFT tries them on every module's name."""
    repeats = len(re.findall(r"[*+]|\{\d*,|(?<![(*+?}])\?", pattern))
    if len(pattern) > _LONGEST_PATTERN or repeats > _MOST_REPEATS or re.search(r"\)\s*[*+{]", pattern):
        raise AdapterError(
            f"{SETTINGS}: {key} {pattern[:60]!r} could be matched for ever: {len(pattern)} characters, {repeats} "
            f"repetitions; at most {_LONGEST_PATTERN} and {_MOST_REPEATS} may enter, and no repeated group"
        )
    try:
        re.compile(pattern)
    except re.error as error:
        raise AdapterError(f"{SETTINGS}: {key} {pattern[:60]!r} is no regular expression: {error}") from error


def _base_digest(manifest: Manifest | None, rules: Rules) -> str | None:
    """The digest of the base that an adapter was trained on, once all who know it agree."""
    base = manifest.about.get("base") if manifest else None
    signed = base.get("digest") if isinstance(base, dict) else None
    served = rules.base.digest if rules.base else None
    said = signed or rules.base_digest or served
    if said is not None and not (isinstance(said, str) and _DIGEST.fullmatch(said)):
        raise AdapterError(f"base digest {str(said)[:80]!r}: expected 64 hexadecimal digits, lower-case")
    for who, digest in (("the operator", rules.base_digest), ("the base that it is to be served on", served)):
        if said and digest and said != digest:
            reference = f" ({base.get('reference')})" if isinstance(base, dict) else ""
            raise AdapterError(
                f"trained on base {said[:12]}…{reference}; {who} has {digest[:12]}…",
                "Serve it on the base that it was trained on.",
            )
    if said is None and not rules.trust_base:
        raise AdapterError(
            f"no {MANIFEST} says which base this adapter was trained on",
            "Say so with --base BASE or --base-digest HEX, or take the risk with --trust-base.",
        )
    return said
