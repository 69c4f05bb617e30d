"""Small models that need no download: random weights and a tokenizer trained on the standard library's documentation.

They are plain Hugging Face folders, written without torch, and bit-identical wherever the same Python is installed.
`builtin:tiny-llama` is the base of the quickstart; `builtin:tiny-mixtral` shows a mixture of experts.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tunesmith.cluster import storage
from tunesmith.cluster.errors import ModelError
from tunesmith.trainers import documentation

VOCABULARY = 4096
CONTEXT = 1024  # tokens
DEVIATION = 0.06  # of the random weights; models this small learn faster from it than from the usual 0.02
END_OF_TEXT, PADDING, TURN_START, TURN_END = "<|endoftext|>", "<|pad|>", "<|im_start|>", "<|im_end|>"
SPECIAL = (END_OF_TEXT, PADDING, TURN_START, TURN_END)  # ids 0 to 3
# The turns of ChatML. What lies between the generation tags is what the assistant says, its end of turn included.
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' }}"
    "{% if message['role'] == 'assistant' %}"
    "{% generation %}{{ message['content'] + '<|im_end|>' }}{% endgeneration %}"
    "{% else %}{{ message['content'] + '<|im_end|>' }}{% endif %}"
    "{{ '\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


@dataclass(frozen=True)
class Shape:
    """The sizes of a model; `experts` is 0 for a dense one."""

    hidden: int
    layers: int
    heads: int
    key_value_heads: int
    intermediate: int
    experts: int = 0


SHAPES = {
    "tiny-llama": Shape(hidden=128, layers=2, heads=4, key_value_heads=2, intermediate=384),
    "tiny-mixtral": Shape(hidden=128, layers=2, heads=4, key_value_heads=2, intermediate=256, experts=4),
}


def builtin_folder(name: str, output_dir: str | Path) -> Path:
    """The Hugging Face folder of `builtin:NAME` under `output_dir`, built on the first call (seconds).

    Raises:
        ModelError: there is no builtin model of that name.
        DiskFullError, StorageError: the folder cannot be written.
    """
    if name not in SHAPES:
        near = difflib.get_close_matches(name, SHAPES, 1)
        meant = f" (did you mean builtin:{near[0]}?)" if near else ""
        raise ModelError(
            f"model.base: there is no builtin:{name}{meant}",
            f"There are {', '.join(f'builtin:{known}' for known in SHAPES)}.",
        )
    folder = Path(output_dir).expanduser().absolute() / ".cache" / "builtin" / name
    if not (folder / storage.MANIFEST).is_file():
        folder.parent.mkdir(parents=True, exist_ok=True)
        with storage.commit_folder(folder, {"kind": "builtin", "about": {"name": name}}) as unfinished:
            write_model(unfinished, SHAPES[name])
            write_tokenizer(unfinished, documentation.documents(documentation.entries()))
    return folder


def write_model(folder: Path, shape: Shape) -> None:
    """Writes config.json, generation_config.json and model.safetensors: normal weights, norms of 1."""
    import numpy as np
    from safetensors.numpy import save_file

    generator = np.random.default_rng(0)
    weights = {}
    for name, size in _tensors(shape):
        drawn = generator.standard_normal(size, dtype=np.float32) * np.float32(DEVIATION)
        weights[name] = np.ones(size, np.float32) if len(size) == 1 else drawn
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    _write_json(folder / "config.json", _config(shape))
    ends = [SPECIAL.index(END_OF_TEXT), SPECIAL.index(TURN_END)]
    _write_json(folder / "generation_config.json", {"eos_token_id": ends, "pad_token_id": SPECIAL.index(PADDING)})


def write_tokenizer(folder: Path, texts: list[str]) -> None:
    """Trains a byte-level BPE (Sennrich et al. 2016, arXiv:1508.07909) and writes it as a fast Transformers tokenizer."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=list(SPECIAL),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer, length=len(texts))
    if (size := tokenizer.get_vocab_size()) != VOCABULARY:
        raise ModelError(
            f"The documentation of this Python gives a vocabulary of {size} tokens, not {VOCABULARY}",
            "Install a Python with the source files of its standard library.",
        )
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": CONTEXT,
        "eos_token": END_OF_TEXT,
        "pad_token": PADDING,
        "additional_special_tokens": [TURN_START, TURN_END],
        "clean_up_tokenization_spaces": False,
    }
    _write_json(folder / "tokenizer_config.json", settings)
    (folder / "chat_template.jinja").write_text(CHAT_TEMPLATE, encoding="utf-8")


def _config(shape: Shape) -> dict[str, Any]:
    kind = "Mixtral" if shape.experts else "Llama"
    experts = {"num_local_experts": shape.experts, "num_experts_per_tok": 2, "router_aux_loss_coef": 0.02}
    return {
        "architectures": [f"{kind}ForCausalLM"],
        "model_type": kind.lower(),
        "dtype": "float32",
        "vocab_size": VOCABULARY,
        "hidden_size": shape.hidden,
        "intermediate_size": shape.intermediate,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.key_value_heads,
        "max_position_embeddings": CONTEXT,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": False,
        "bos_token_id": None,
        "eos_token_id": SPECIAL.index(END_OF_TEXT),
        "pad_token_id": SPECIAL.index(PADDING),
        **(experts if shape.experts else {}),
    }


def _tensors(shape: Shape) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Name and size of every weight, as Llama and Mixtral name them on the hub."""
    feed_forward: Callable[[Shape], Iterator[tuple[str, tuple[int, ...]]]] = _experts if shape.experts else _dense
    hidden, shared = shape.hidden, shape.hidden // shape.heads * shape.key_value_heads
    yield "model.embed_tokens.weight", (VOCABULARY, hidden)
    for layer in range(shape.layers):
        prefix = f"model.layers.{layer}."
        yield prefix + "input_layernorm.weight", (hidden,)
        yield prefix + "self_attn.q_proj.weight", (hidden, hidden)
        yield prefix + "self_attn.k_proj.weight", (shared, hidden)
        yield prefix + "self_attn.v_proj.weight", (shared, hidden)
        yield prefix + "self_attn.o_proj.weight", (hidden, hidden)
        yield prefix + "post_attention_layernorm.weight", (hidden,)
        for name, size in feed_forward(shape):
            yield prefix + name, size
    yield "model.norm.weight", (hidden,)
    yield "lm_head.weight", (VOCABULARY, hidden)


def _dense(shape: Shape) -> Iterator[tuple[str, tuple[int, ...]]]:
    yield "mlp.gate_proj.weight", (shape.intermediate, shape.hidden)
    yield "mlp.up_proj.weight", (shape.intermediate, shape.hidden)
    yield "mlp.down_proj.weight", (shape.hidden, shape.intermediate)


def _experts(shape: Shape) -> Iterator[tuple[str, tuple[int, ...]]]:
    yield "block_sparse_moe.gate.weight", (shape.experts, shape.hidden)
    for expert in range(shape.experts):
        prefix = f"block_sparse_moe.experts.{expert}."
        yield prefix + "w1.weight", (shape.intermediate, shape.hidden)
        yield prefix + "w2.weight", (shape.hidden, shape.intermediate)
        yield prefix + "w3.weight", (shape.intermediate, shape.hidden)


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
