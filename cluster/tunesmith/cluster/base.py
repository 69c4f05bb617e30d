"""Finds the base model that a recipe names and proves what it is, without importing torch.

A reference is a folder, a hub id or `run:NAME` (the artifact of an earlier run in the same output folder). All of them
end as a local folder that holds a config, a tokenizer and whole weight files.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tunesmith.cluster.artifacts import read_manifest
from tunesmith.cluster.errors import CheckpointError, ModelError, StorageError

WEIGHTS = ("*.safetensors", "pytorch_model*.bin")
TOKENIZER = ("tokenizer.json", "tokenizer.model", "spiece.model", "vocab.json", "vocab.txt", "tekken.json")
_HUB_FILES = ["*.json", "*.safetensors", "pytorch_model*.bin", "*.model", "*.txt", "*.jinja"]
_SHA256 = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True)
class BaseRef:
    """A base model that exists on this machine."""

    reference: str
    """As the recipe names it."""
    path: str
    """Absolute folder of config, tokenizer and weights."""
    digest: str
    """sha256 over the sorted sha256 of the weight files: equal digests are equal weights."""
    context_length: int | None
    """Most tokens of one sequence; None when the config does not say."""
    revision: str | None = None
    """Commit of a hub id; None for folders."""

    @property
    def loadable(self) -> str:
        """What plain Transformers is given to load this base: the hub id, or the folder."""
        return self.reference if self.revision else self.path


def find_base(reference: str, revision: str | None, output_dir: str | Path) -> BaseRef:
    """Finds the folder behind a reference, checks that it is a whole model, and hashes its weights.

    Args:
        reference: a folder, a hub id, or `run:NAME`.
        revision: branch, tag or commit of a hub id; None takes the default branch.
        output_dir: where `run:` looks, and where hashes are kept.

    Raises:
        ModelError: nothing is there, or it lacks a config, a tokenizer or whole weights.
    """
    output = Path(output_dir).expanduser().absolute()
    commit = None
    if reference.startswith("run:"):
        folder = _run_artifact(reference.removeprefix("run:"), output)
    elif Path(reference).expanduser().is_dir():
        folder = Path(reference).expanduser().absolute()
    elif _looks_like_hub_id(reference):
        folder, commit = _download(reference, revision)
    else:
        raise ModelError(
            f"model.base: there is no folder {reference!r}{_near(reference)}",
            "Give a folder with config.json, a Hugging Face hub id (owner/name), run:NAME or builtin:NAME.",
        )
    if revision is not None and commit is None:
        raise no_revision(reference, revision)
    return base_in(folder, reference, output, commit)


def base_in(folder: Path, reference: str, output: Path, commit: str | None = None) -> BaseRef:
    """The base that a folder holds.

    Raises:
        ModelError: naming what is missing or damaged.
    """
    config = check_folder(folder, reference)
    return BaseRef(reference, str(folder), digest(folder, output / ".cache"), context_length(config), commit)


def no_revision(reference: str, revision: str) -> ModelError:
    """The error of a revision where there is none."""
    return ModelError(
        f"model.revision: {revision!r} means nothing for {reference}: only a hub id has revisions",
        "Take model.revision out.",
    )


def check_folder(folder: Path, reference: str) -> dict[str, Any]:
    """The model's config, once the folder is known to hold a config, a tokenizer and whole weights.

    Raises:
        ModelError: naming what is missing or damaged.
    """
    if not (folder / "config.json").is_file():
        if (folder / "adapter_config.json").is_file():
            raise ModelError(
                f"model.base: {reference} is a LoRA adapter ({folder}), not a whole model",
                "Name the base it was trained on, or merge the adapter into that base first.",
            )
        raise ModelError(
            f"model.base: {reference} has no config.json in {folder}", "Is this a Hugging Face model folder?"
        )
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (ValueError, OSError) as error:
        raise ModelError(f"model.base: {folder / 'config.json'} cannot be read: {error}") from error
    if not isinstance(config, dict) or "model_type" not in config:
        raise ModelError(f"model.base: {folder / 'config.json'} names no model_type, so no architecture can be chosen")
    if not any((folder / name).is_file() for name in TOKENIZER):
        raise ModelError(
            f"model.base: {reference} has no tokenizer in {folder} (looked for {', '.join(TOKENIZER)})",
            "Copy the tokenizer's files beside config.json: tokenizer.save_pretrained(folder).",
        )
    if not weight_files(folder):
        raise ModelError(f"model.base: {reference} has no weights in {folder} (looked for {', '.join(WEIGHTS)})")
    _check_index(folder)
    return config


def weight_files(folder: Path) -> list[Path]:
    """The weight files of a model folder, safetensors before pickles, sorted by name."""
    for pattern in WEIGHTS:
        if files := sorted(folder.glob(pattern)):
            return files
    return []


def tensor_shapes(folder: Path) -> dict[str, list[int]]:
    """Name and shape of every tensor in the safetensors files, read from their headers; empty for pickled weights.

    Raises:
        ModelError: a file is shorter than its header says.
    """
    shapes: dict[str, list[int]] = {}
    for path in weight_files(folder):
        if path.suffix == ".safetensors":
            shapes.update(_read_header(path))
    return shapes


def context_length(config: dict[str, Any]) -> int | None:
    """The most tokens of a sequence that the config allows, or None when it does not say."""
    for node in (config, config.get("text_config") or {}):
        for key in ("max_position_embeddings", "n_positions", "max_seq_len", "seq_length"):
            if isinstance(node.get(key), int):
                return node[key]
    return None


def digest(folder: Path, cache: Path) -> str:
    """sha256 over the sorted sha256 of the weight files.

    The hashes come from, in this order: the folder's MANIFEST.json, the names of the hub cache's blobs (which are
    sha256 for weights), the cache of hashes made earlier (by path, size and time of change), the files themselves.
    """
    signed = _manifest_hashes(folder)
    hashes = [signed.get(path.name) or _hub_hash(path) or _cached_hash(path, cache) for path in weight_files(folder)]
    return hashlib.sha256("\n".join(sorted(hashes)).encode()).hexdigest()


def _run_artifact(name: str, output: Path) -> Path:
    folder = output / name / "artifact"
    if folder.is_dir():
        return folder
    finished = sorted(path.parent.name for path in output.glob("*/artifact"))
    if (output / name).is_dir():
        raise ModelError(
            f"model.base: run {name} in {output} has no artifact yet", "Finish it first: train its recipe."
        )
    near = difflib.get_close_matches(name, finished, 3, 0.5) or finished[:5]
    raise ModelError(
        f"model.base: there is no run {name!r} in {output}",
        f"Runs with an artifact there: {', '.join(near) if near else 'none'}.",
    )


def _looks_like_hub_id(reference: str) -> bool:
    """`name` or `owner/name` in the hub's alphabet."""
    return bool(re.fullmatch(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?", reference))


def _download(reference: str, revision: str | None) -> tuple[Path, str]:
    """The hub id's files in the local hub cache and the commit they are of; no network when they are all there."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        folder = Path(snapshot_download(reference, revision=revision, allow_patterns=_HUB_FILES))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise ModelError(
            f"model.base: {reference!r} is no folder here{_near(reference)}, and as a hub id it cannot be had"
            f"{f' at revision {revision}' if revision else ''}: {str(error).splitlines()[0]}",
            "Check the spelling, the network, and that this account may read the model (hf auth login).",
        ) from error
    return folder, folder.name


def _near(reference: str) -> str:
    """` (did you mean …?)` from the names beside a folder that does not exist."""
    path = Path(reference).expanduser()
    if not path.parent.is_dir():
        return ""
    names = [entry.name for entry in path.parent.iterdir() if entry.is_dir()]
    near = difflib.get_close_matches(path.name, names, 1)
    return f" (did you mean {path.parent / near[0]}?)" if near else ""


def _check_index(folder: Path) -> None:
    """Every shard that an index names is there, and every safetensors file is as long as its header says."""
    for index in sorted(folder.glob("*.index.json")):
        named = set(json.loads(index.read_text(encoding="utf-8")).get("weight_map", {}).values())
        if missing := sorted(name for name in named if not (folder / name).is_file()):
            raise ModelError(
                f"model.base: {index.name} in {folder} names {len(named)} weight files; missing: {missing[0]}"
            )
    tensor_shapes(folder)


def _read_header(path: Path) -> dict[str, list[int]]:
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if not 2 <= length <= size - 8:
            raise ModelError(f"model.base: {path} is not a whole safetensors file ({size:,} bytes)")
        try:
            header = json.loads(file.read(length))
        except ValueError as error:
            raise ModelError(f"model.base: the header of {path} cannot be read: {error}") from error
    header.pop("__metadata__", None)
    needed = 8 + length + max((tensor["data_offsets"][1] for tensor in header.values()), default=0)
    if size != needed:
        raise ModelError(
            f"model.base: {path} has {size:,} bytes where its header says {needed:,}", "Download it again."
        )
    return {name: tensor["shape"] for name, tensor in header.items()}


def _manifest_hashes(folder: Path) -> dict[str, str]:
    try:
        return {name: record.sha256 for name, record in read_manifest(folder).files.items()}
    except CheckpointError:  # none, or not one of ours: the files themselves are hashed
        return {}


def _hub_hash(path: Path) -> str | None:
    """Weights in the hub cache are links to `blobs/<sha256>`."""
    name = path.resolve().name if path.is_symlink() else ""
    return name if _SHA256.fullmatch(name) else None


def _cached_hash(path: Path, cache: Path) -> str:
    """sha256 of a file, remembered beside the runs under its path, size and time of change."""
    from tunesmith.cluster.storage import sha256_file, write_atomic

    stat = path.stat()
    key = hashlib.sha256(f"{path.resolve()}\n{stat.st_size}\n{stat.st_mtime_ns}".encode()).hexdigest()
    remembered = cache / "hashes" / key
    if remembered.is_file() and _SHA256.fullmatch(text := remembered.read_text(encoding="utf-8").strip()):
        return text
    value = sha256_file(path)
    try:
        remembered.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(remembered, value + "\n")
    except (OSError, StorageError):
        return value  # an output folder that cannot be written is reported by the check that is for it
    return value
