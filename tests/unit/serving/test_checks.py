"""Hostile and broken adapters: each refused in words that name the file, with nothing written."""

from __future__ import annotations

import json
import os
import struct
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_adapters
from tiny_adapters import BASE_DIGEST, BASE_SHAPES, settings, tensors

from tunesmith.cluster.errors import AdapterError
from tunesmith.cluster.storage import manifest_digest
from tunesmith.serving.bases import BaseFacts
from tunesmith.serving.checks import Rules
from tunesmith.serving.registry import Registry

WEIGHTS, SETTINGS = "adapter_model.safetensors", "adapter_config.json"
PREFIX = "base_model.model.model.layers.0.self_attn.q_proj"
RULES = Rules(base=BaseFacts(BASE_DIGEST, BASE_SHAPES), trust_base=True, max_rank=64, max_bytes=1_000_000)
Spoil = Callable[[Path], Any]


def raw(header: bytes | dict[str, Any], data: bytes = b"", length: int | None = None) -> Spoil:
    """Replaces the weights by a header and what follows it, under a length that may lie."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return lambda folder: (folder / WEIGHTS).write_bytes(
        struct.pack("<Q", len(text) if length is None else length) + text + data
    )


def one(**changed: Any) -> dict[str, Any]:
    """A header of two tensors of 16 bytes, of which the second is changed."""
    first = {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]}
    return {"a": first, "b": {"dtype": "F32", "shape": [4], "data_offsets": [16, 32], **changed}}


def weights(**changed: np.ndarray | None) -> Spoil:
    """Replaces tensors of the first module by the end of their names; None leaves one out."""
    made: dict[str, Any] = {
        **tensors(),
        **{f"{PREFIX}.{name.replace('__', '.')}": new for name, new in changed.items()},
    }
    return lambda folder: tiny_adapters.plain(
        folder, {name: value for name, value in made.items() if value is not None}
    )


def config(**changed: Any) -> Spoil:
    return lambda folder: (folder / SETTINGS).write_text(json.dumps(settings(**changed)))


def text(name: str, content: str | bytes = b"") -> Spoil:
    def spoil(folder: Path) -> None:
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(content.encode() if isinstance(content, str) else content)

    return spoil


def link(name: str, target: str) -> Spoil:
    def spoil(folder: Path) -> None:
        (folder / name).unlink(missing_ok=True)
        (folder / name).symlink_to(target)

    return spoil


def with_value(value: float, dtype: type = np.float32) -> Spoil:
    spoilt = np.zeros((16, 4), dtype)
    spoilt[3, 1] = value
    return weights(lora_B__weight=spoilt)


def bf16_with_nan(folder: Path) -> None:
    words = np.full(64, 0x3F80, "<u2")
    words[7] = 0x7FC0
    shapes = {f"{PREFIX}.lora_A.weight": [4, 16], f"{PREFIX}.lora_B.weight": [16, 4]}
    header = {
        name: {"dtype": "BF16", "shape": shape, "data_offsets": [128 * n, 128 * (n + 1)]}
        for n, (name, shape) in enumerate(shapes.items())
    }
    raw(header, np.full(64, 0x3F80, "<u2").tobytes() + words.tobytes())(folder)


DEEP = "[" * 100 + "]" * 100
VERY_DEEP = '{"a":' * 200_000 + "1" + "}" * 200_000
HOSTILE: dict[str, tuple[Spoil, str]] = {
    "a pickle beside the weights": (text("training_args.bin"), r"'training_args\.bin' may hold pickled Python"),
    "a pickle instead of the weights": (
        lambda folder: (folder / WEIGHTS).rename(folder / "adapter_model.bin"),
        r"'adapter_model\.bin' may hold pickled Python.*expected adapter_model\.safetensors",
    ),
    "a pickle in capitals": (text("state.PKL"), "may hold pickled Python"),
    "a pickle called safetensors": (text(WEIGHTS, b"\x80\x04\x95" + b"." * 80), "its header claims [0-9,]+ bytes"),
    "Python": (text("modeling.py", "import os"), r"'modeling\.py' may not enter"),
    "a whole model": (
        lambda folder: (folder / SETTINGS).rename(folder / "config.json"),
        "a whole model, not an adapter\nServe it as a base",
    ),
    "other weights": (text("model.safetensors"), r"'model\.safetensors' may not enter"),
    "a name with a backslash": (text("..\\evil.json", "{}"), "may not enter"),
    "a name with a line break": (text("a\nb.json", "{}"), "may not enter"),
    "a hidden file": (text(".env.json", "{}"), r"'\.env\.json' may not enter"),
    "a unicode name": (text("配置.json", "{}"), "may not enter"),
    "a link to a secret": (link("tokenizer.json", "/etc/passwd"), r"'tokenizer\.json' is a symbolic link; expected a file"),
    "a linked folder": (link("receipts", "/etc"), "'receipts' is a symbolic link"),
    "linked weights": (link(WEIGHTS, "/dev/zero"), "is a symbolic link"),
    "a pipe": (lambda folder: os.mkfifo(folder / "vocab.json"), r"'vocab\.json' is neither a file nor a folder"),
    "a folder of its own": (lambda folder: (folder / "code").mkdir(), "'code' is a folder; expected receipts"),
    "no weights": (lambda folder: (folder / WEIGHTS).unlink(), r"there is no adapter_model\.safetensors"),
    "no settings": (lambda folder: (folder / SETTINGS).unlink(), r"there is no adapter_config\.json"),
    "huge weights": (text(WEIGHTS, b"0" * 1_000_001), r"adapter_model\.safetensors: 1,000,001 bytes; at most 1,000,000"),
    "huge settings": (text(SETTINGS, " " * (2**20 + 1)), r"adapter_config\.json: 1,048,577 bytes; at most 1,048,576"),
    "many middling files": (
        lambda folder: [text(f"{n}.json", '"' + "a" * 300_000 + '"')(folder) for n in range(4)],
        "bytes together; at most 1,000,000",
    ),
    "very many files": (
        lambda folder: [text(f"{n}.json", "1")(folder) for n in range(300)],
        "more than 256 files",
    ),
    "empty weights": (text(WEIGHTS), "its header claims 0 bytes; the file has 0"),
    "a header longer than the file": (raw(one(), length=2**62), "its header claims 4,611,686,018,427,387,904 bytes"),
    "a header of an odd length": (raw(b"{}", length=1), "its header claims 1 bytes"),
    "a header that is no object": (raw(b"[1]"), "expected an object of tensors"),
    "a header that is no JSON": (raw(b"{nonsense"), "its header: not JSON"),
    "a header that is no UTF-8": (raw(b'{"\xff": 1}'), "its header: not JSON"),
    "a header that is UTF-16": (raw("{}".encode("utf-16-le")), "its header: not JSON"),
    "a deep header": (raw(f'{{"a": {DEEP}}}'.encode()), "nested more deeply than 48"),
    "a tensor that stands twice": (
        raw(b'{"a":' + json.dumps(one()["a"]).encode() + b',"a":' + json.dumps(one()["b"]).encode() + b"}", b"0" * 32),
        "the key 'a' stands twice",
    ),
    "overlapping tensors": (
        raw(one(data_offsets=[8, 24]), b"0" * 24),
        r"b begins at byte [0-9,]+, inside a, which ends at",
    ),
    "the same bytes twice": (raw(one(data_offsets=[0, 16]), b"0" * 16), "b begins at byte .* inside a"),
    "a gap between tensors": (raw(one(data_offsets=[20, 36]), b"0" * 36), "4 bytes between a and b belong to no tensor"),
    "a tensor beyond the file": (raw(one(), b"0" * 31), "b ends at byte [0-9,]+; the file has"),
    "bytes after the tensors": (raw(one(), b"0" * 40), "8 bytes after b belong to no tensor"),
    "a shape that is not its bytes": (raw(one(shape=[5]), b"0" * 32), r"F32 \[5\] takes 20 bytes, but .* span 16"),
    "a shape that overflows": (raw(one(shape=[2**62, 2**62]), b"0" * 32), "but its data_offsets span 16"),
    "a negative shape": (raw(one(shape=[-4]), b"0" * 32), "no list of up to 8 lengths"),
    "a shape of truths": (raw(one(shape=[True]), b"0" * 32), "no list of up to 8 lengths"),
    "offsets backwards": (raw(one(data_offsets=[32, 16]), b"0" * 32), "span -16"),
    "a dtype of another kind": (raw(one(dtype="F8_E4M3"), b"0" * 32), "dtype 'F8_E4M3'; adapters are made of"),
    "a tensor without a place": (raw({"a": {"dtype": "F32"}}), "expected dtype, shape and data_offsets"),
    "no tensor": (raw(b"{}"), "there is no tensor in it"),
    "NaN": (with_value(np.nan), r"q_proj\.lora_B\.weight: 1 of 64 values are NaN or infinite"),
    "infinity in half precision": (with_value(np.inf, np.float16), "1 of 64 values are NaN or infinite"),
    "NaN in bfloat16": (bf16_with_nan, "1 of 64 values are NaN or infinite"),
    "auto_map": (config(auto_map={"AutoModel": "evil.Model"}), r"adapter_config\.json: auto_map names code"),
    "auto_map deep in a tokenizer's settings": (
        text("tokenizer_config.json", '{"a": [{"auto_map": ["x", null]}]}'),
        r"tokenizer_config\.json: auto_map names code",
    ),
    "auto_map of a tokenizer": (text("tokenizer.json", '{"auto_map": "x"}'), r"tokenizer\.json: auto_map names code"),
    "auto_map in a receipt": (text("receipts/rows.jsonl", '{}\n{"auto_map": "x"}'), r"rows\.jsonl:2: auto_map"),
    "trust_remote_code": (config(trust_remote_code=True), "trust_remote_code names code"),
    "a library to import": (config(auto_mapping={"parent_library": "os.path"}), r"parent_library 'os\.path' would be imported"),
    "an auto_mapping that is none": (config(auto_mapping="x"), "auto_mapping is x; expected an object"),
    "Megatron": (config(megatron_config={"a": 1}, megatron_core="evil"), "would make PEFT import 'evil'"),
    "settings that are a list": (text(SETTINGS, "[]"), "list, not an object of settings"),
    "settings with a key twice": (text(SETTINGS, '{"r": 4, "r": 8}'), "the key 'r' stands twice"),
    "settings with NaN": (text(SETTINGS, '{"lora_alpha": NaN}'), "NaN is no JSON number"),
    "settings too deep": (text(SETTINGS, DEEP), "nested more deeply than 48"),
    "a template file too large": (text("a.jinja", "{" * (2**18 + 1)), "262,145 bytes; at most 262,144"),
    "JSON that would exhaust the stack": (text("a.json", VERY_DEEP[:900_000]), "nested more deeply|not JSON"),
    "no peft_type": (config(peft_type=None), "peft_type is 'None'; expected one of PEFT's"),
    "a peft_type that is a path": (config(peft_type="../LORA"), "expected one of PEFT's"),
    "a peft_type of nobody": (config(peft_type="LORAX"), "peft_type is 'LORAX'; expected one of PEFT's, such as LORA"),
    "a peft_type in small letters": (config(peft_type="lora"), "peft_type is 'lora'; expected one of PEFT's, such as LORA"),
    "DoRA without magnitudes": (config(use_dora=True), r"use_dora, and .* has no .*q_proj\.lora_magnitude_vector"),
    "DoRA with the magnitudes of one module": (
        lambda folder: tiny_adapters.plain(
            folder, tensors() | {f"{PREFIX}.lora_magnitude_vector": np.ones(16, "f4")}, settings(use_dora=True)
        ),
        r"has no base_model\.model\.model\.layers\.0\.self_attn\.v_proj\.lora_magnitude_vector",
    ),
    "layers that the base has not": (
        config(layers_to_transform=[0, 31]),
        "layers_to_transform names layer 31; the base has 2, 0 to 1",
    ),
    "a layer that the base has not": (config(layers_to_transform=2), "names layer 2; the base has 2, 0 to 1"),
    "a layer that is no number": (config(layers_to_transform="all"), "layers_to_transform names layer all"),
    "a layer below all": (config(layers_to_transform=[-1]), "layers_to_transform names layer -1"),
    "a rank that is not there": (config(r=None), "r is None; expected 1 to 64"),
    "a rank of zero": (config(r=0), "r is 0; expected 1 to 64"),
    "a rank that is a truth": (config(r=True), "r is True; expected 1 to 64"),
    "a rank above the largest": (config(r=65), "r is 65; expected 1 to 64"),
    "a rank that lies": (config(r=8), r"lora_A\.weight: shape \[4, 16\]; its rank is 4, but .* says 8"),
    "a rank pattern that lies": (config(rank_pattern={"v_proj": 2}), r"v_proj\.lora_A\.weight.* rank is 4, but .* says 2"),
    "a rank pattern above the largest": (config(rank_pattern={"v_proj": 999}), "rank_pattern v_proj is 999"),
    "a rank pattern that is no table": (config(rank_pattern=[1]), r"rank_pattern is \[1\]; expected an object"),
    "a pattern that never ends": (config(target_modules="(a+)+$"), r"target_modules '\(a\+\)\+\$' could be matched for ever"),
    "a rank pattern that never ends": (config(rank_pattern={"(a|a)*": 4}), "rank_pattern .* could be matched for ever"),
    "a pattern of many questions": (config(target_modules="a?" * 9 + "a" * 9), "9 repetitions"),
    "more patterns than can be looked up": (
        lambda folder: tiny_adapters.plain(folder, tensors(layers=99), settings(rank_pattern={f"x{n}": 4 for n in range(11_000)})),
        "rank_pattern of 11,000 entries for 198 modules",
    ),
    "a rank that a wild pattern does not allow either": (
        config(r=8, rank_pattern={".*v_proj": 16}),
        r"q_proj.* its rank is 4, but .* says 8 or 16",
    ),
    "a pattern of many stars": (config(exclude_modules=".*a" * 9), "9 repetitions"),
    "a pattern that is none": (config(rank_pattern={"(": 4}), r"rank_pattern '\(' is no regular expression"),
    "an A without its B": (weights(lora_B__weight=None), "there is no lora_B for it"),
    "an A and B that do not multiply": (weights(lora_B__weight=np.zeros((16, 3), "f4")), r"\[16, 3\] does not multiply with"),
    "an A that is no matrix": (weights(lora_A__weight=np.zeros(4, "f4")), "is no matrix"),
    "an A twice": (weights(lora_A__default__weight=np.zeros((4, 16), "f4")), "is the lora_A of this module already"),
    "no LoRA in a LoRA": (lambda folder: tiny_adapters.plain(folder, {"x": np.zeros(1, "f4")}), "without any lora_A"),
    "a wider base": (lambda folder: tiny_adapters.plain(folder, tensors(hidden=32)), r"adds \[32, 32\] to .* \[16, 16\] in the base"),
    "a deeper base": (lambda folder: tiny_adapters.plain(folder, tensors(layers=3)), r"the base has no module model\.layers\.2\."),
}  # fmt: skip


@pytest.mark.parametrize("kind", HOSTILE)
def test_hostile_adapters_are_refused_and_nothing_is_written(tmp_path: Path, kind: str) -> None:
    spoil, words = HOSTILE[kind]
    folder = tiny_adapters.plain(tmp_path / "adapter")
    spoil(folder)
    registry = Registry(str(tmp_path / "registry"))
    began = time.monotonic()
    with pytest.raises(AdapterError, match=words):
        registry.add("support", folder, rules=RULES)
    assert time.monotonic() - began < 2
    assert [path for path in (tmp_path / "registry").rglob("*") if not path.is_dir() or "tmp" in path.name] == []
    assert registry.read()[0] == 0


def sign_again(folder: Path, **changed: Any) -> None:
    manifest = json.loads((folder / "MANIFEST.json").read_text())
    document = {key: value for key, value in {**manifest, **changed}.items() if key != "digest"}
    (folder / "MANIFEST.json").write_text(json.dumps({**document, "digest": manifest_digest(document)}))


FORGED: dict[str, tuple[Spoil, str]] = {
    "settings changed after signing": (config(lora_alpha=9), r"adapter_config\.json: \d+ bytes with sha256 .* MANIFEST"),
    "a file added after signing": (text("extra.json", "{}"), r"extra\.json: not in MANIFEST\.json"),
    "a file lost after signing": (
        lambda folder: (folder / "chat_template.jinja").unlink(),
        r"chat_template\.jinja: in MANIFEST\.json, but not there",
    ),
    "a manifest changed after signing": (text("MANIFEST.json", '{"digest": "x"}'), r"MANIFEST\.json: the manifest was changed"),
    "a manifest that is none": (text("MANIFEST.json", "[]"), r"MANIFEST\.json: not a manifest"),
    "a manifest too deep": (text("MANIFEST.json", DEEP), "nested more deeply than 48"),
    "a manifest that leads outside": (
        lambda folder: sign_again(folder, files={"../x": {"size": 1, "sha256": "0"}}),
        r"names a file outside its folder: \.\./x",
    ),
    "a checkpoint": (lambda folder: sign_again(folder, kind="checkpoint"), "of kind 'checkpoint'; expected an artifact"),
    "an artifact that failed its receipt": (lambda folder: sign_again(folder, parity_passed=False), "failed its parity receipt"),
    "another base": (
        lambda folder: sign_again(folder, base={"reference": "other", "digest": "c" * 64}),
        r"trained on base c{12}… \(other\); the base that it is to be served on has ba5e",
    ),
    "a base that is no digest": (lambda folder: sign_again(folder, base={"digest": ["x"]}), "expected 64 hexadecimal"),
    "a manifest with code": (lambda folder: sign_again(folder, auto_map="x"), r"MANIFEST\.json: auto_map names code"),
}  # fmt: skip


@pytest.mark.parametrize("kind", FORGED)
def test_forged_artifacts_are_refused_and_nothing_is_written(tmp_path: Path, kind: str) -> None:
    spoil, words = FORGED[kind]
    folder = tiny_adapters.artifact(tmp_path / "adapter")
    spoil(folder)
    with pytest.raises(AdapterError, match=words):
        Registry(str(tmp_path / "registry")).add("support", folder, rules=RULES)
    assert [path for path in (tmp_path / "registry").rglob("*") if not path.is_dir() or "tmp" in path.name] == []


NAMES = [
    "",
    ".",
    "..",
    "../x",
    "a/b",
    "a\\b",
    "/etc",
    "~",
    "a b",
    "a@b",
    "a\n",
    "a\0",
    "ｓｕｐｐｏｒｔ",
    "нет",
    "a" * 65,
]
NAMES += ["-a", ".a", "_a", "a" * 1_000_000, "none", "Base", "LATEST", "💥"]


@pytest.mark.parametrize("name", NAMES, ids=lambda name: ascii(name[:20]))
def test_names_that_could_be_something_else_are_refused(tmp_path: Path, name: str) -> None:
    folder = tiny_adapters.artifact(tmp_path / "adapter")
    registry = Registry(str(tmp_path / "registry"))
    with pytest.raises(AdapterError, match=r"no such name is given|is reserved") as refusal:
        registry.add(name, folder, rules=RULES)
    assert len(str(refusal.value)) < 300
    with pytest.raises(AdapterError, match=r"no such name is given|is reserved"):
        registry.add("support", folder, alias=name or "/", rules=RULES)
    assert not (tmp_path / "registry").exists()


def test_an_alias_that_looks_like_a_digest_is_refused(tmp_path: Path) -> None:
    folder = tiny_adapters.artifact(tmp_path / "adapter")
    with pytest.raises(AdapterError, match="'abcdef012345': this word is reserved"):
        Registry(str(tmp_path / "registry")).add("support", folder, alias="abcdef012345")


SOUND: dict[str, Spoil] = {
    "as PEFT writes it": lambda _folder: None,
    "PEFT's own folders of templates": text("additional_chat_templates/tool.jinja", "{{ 1 }}"),
    "what the hub adds": lambda folder: [text(".gitattributes")(folder), text(".cache/x.lock")(folder)],
    "a token called auto_map": text("tokenizer.json", '{"model": {"vocab": {"auto_map": 7, "trust_remote_code": 8}}}'),
    "a vocabulary with auto_map": text("vocab.json", '{"auto_map": 7}'),
    "bias and magnitudes": weights(lora_B__bias=np.zeros(16, "f4"), lora_magnitude_vector=np.zeros(16, "f4")),
    "ranks by pattern": lambda folder: tiny_adapters.plain(
        folder,
        {n: v[:2] if ".0.self_attn.v_proj.lora_A" in n else v[:, :2] if ".0.self_attn.v_proj.lora_B" in n else v
         for n, v in tensors().items()},
        settings(rank_pattern={r"layers\.0\.self_attn\.v_proj": 2}),
    ),
    "an expression for modules": config(target_modules=r"model\.layers\.\d+\.self_attn\.(q|v)_proj"),
    "DoRA with its magnitudes": lambda folder: tiny_adapters.plain(
        folder,
        tensors() | {
            f"base_model.model.model.layers.{n}.{module}.lora_magnitude_vector": np.ones(16, "f4")
            for n in range(tiny_adapters.LAYERS) for module in tiny_adapters.MODULES
        },
        settings(use_dora=True),
    ),
    "layers by number": config(layers_to_transform=[0, 1]),
    "the transformers module": config(auto_mapping={"parent_library": "transformers.models.llama.modeling_llama"}),
    "an embedding": lambda folder: tiny_adapters.plain(folder, tensors() | {
        "base_model.model.model.embed_tokens.lora_embedding_A": np.zeros((4, 64), "f4"),
        "base_model.model.model.embed_tokens.lora_embedding_B": np.zeros((16, 4), "f4"),
    }),
    "a license": text("LICENSE.txt", "free"),
}  # fmt: skip


@pytest.mark.parametrize("kind", SOUND)
def test_sound_adapters_enter(tmp_path: Path, kind: str) -> None:
    folder = tiny_adapters.plain(tmp_path / "adapter")
    SOUND[kind](folder)
    registry = Registry(str(tmp_path / "registry"))
    registry.fetch(registry.add("support", folder, rules=RULES).digest, tmp_path / "cache")


def test_other_kinds_than_lora_enter_without_a_rank(tmp_path: Path) -> None:
    weights = {"base_model.model.model.layers.0.self_attn.k_proj.ia3_l": np.ones((16, 1), "f4")}
    folder = tiny_adapters.plain(tmp_path / "adapter", weights, {"peft_type": "IA3", "target_modules": ["k_proj"]})
    registry = Registry(str(tmp_path / "registry"))
    registry.add("support", folder, rules=RULES)
    (version,) = registry.read()[1].adapter("support").versions
    assert (version.peft_type, version.rank, version.base_digest) == ("IA3", None, BASE_DIGEST)


def test_a_sound_bfloat16_adapter_enters(tmp_path: Path) -> None:
    folder = tiny_adapters.plain(tmp_path / "adapter")
    bf16_with_nan(folder)
    data = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(data.replace(b"\xc0\x7f", b"\x80\x3f"))
    Registry(str(tmp_path / "registry")).add("support", folder, rules=RULES)


def test_the_base_is_known_from_the_manifest_the_operator_or_nobody(tmp_path: Path) -> None:
    registry = Registry(str(tmp_path / "registry"))
    plain = tiny_adapters.plain(tmp_path / "plain")
    with pytest.raises(AdapterError, match=r"no MANIFEST\.json says which base"):
        registry.add("a", plain)
    with pytest.raises(AdapterError, match="base digest 'abc': expected 64"):
        registry.add("a", plain, rules=Rules(base_digest="abc"))
    with pytest.raises(AdapterError, match=r"trained on base d{12}…; the base that it is to be served on has ba5e"):
        registry.add("a", plain, rules=Rules(base_digest="d" * 64, base=BaseFacts(BASE_DIGEST)))
    with pytest.raises(AdapterError, match=r"trained on base ba5e.* \(tiny\); the operator has d{12}…"):
        registry.add("a", tiny_adapters.artifact(tmp_path / "signed"), rules=Rules(base_digest="d" * 64))
    registry.add("a", plain, rules=Rules(base_digest=BASE_DIGEST))
    registry.add("b", plain, rules=Rules(trust_base=True))
    registry.add(
        "c", plain, rules=Rules(base=BaseFacts(BASE_DIGEST, BASE_SHAPES))
    )  # the operator says: this is its base
    catalog = registry.read()[1]
    assert catalog.adapter("a").versions[0].base_digest == BASE_DIGEST
    assert catalog.adapter("b").versions[0].base_digest is None
    assert catalog.adapter("c").versions[0].base_digest == BASE_DIGEST
