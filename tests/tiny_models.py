"""Small real models for tests: a byte tokenizer and a Llama, Mixtral or Qwen3-MoE of a few thousand weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    BertConfig,
    BertModel,
    LlamaConfig,
    MixtralConfig,
    PreTrainedTokenizerFast,
    Qwen3MoeConfig,
)

CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% if message['role'] == 'assistant' %}{% generation %}{{ message['content'] }}<|im_end|>{% endgeneration %}\n"
    "{% else %}{{ message['content'] }}<|im_end|>\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
_SIZES: dict[str, Any] = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 256,
    "initializer_range": 0.15,
}


def tokenizer() -> PreTrainedTokenizerFast:
    """One token a byte, and the three special tokens of chatml."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    core = Tokenizer(models.BPE(vocab={letter: index for index, letter in enumerate(alphabet)}, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=core, eos_token="<|im_end|>", additional_special_tokens=["<|im_start|>", "<|endoftext|>"]
    )
    fast.chat_template = CHATML
    return fast


def config(kind: str, **changes: Any) -> Any:
    """Config of a tiny `llama`, `tied` (a Llama with tied embeddings), `mixtral` or `qwen3_moe`."""
    sizes = {**_SIZES, "vocab_size": len(tokenizer()), "eos_token_id": tokenizer().eos_token_id, **changes}
    if kind in ("llama", "tied"):
        return LlamaConfig(intermediate_size=48, tie_word_embeddings=kind == "tied", **sizes)
    if kind == "mixtral":
        return MixtralConfig(
            intermediate_size=24, num_local_experts=4, num_experts_per_tok=2, sliding_window=None, **sizes
        )
    assert kind == "qwen3_moe", kind
    return Qwen3MoeConfig(
        intermediate_size=48,
        moe_intermediate_size=24,
        num_experts=4,
        num_experts_per_tok=2,
        norm_topk_prob=True,
        **sizes,
    )


def encoder_config(**changes: Any) -> BertConfig:
    """Config of a tiny BERT."""
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    return BertConfig(vocab_size=len(tokenizer()), max_position_embeddings=64, **{**sizes, **changes})


def make_encoder(folder: Path) -> Path:
    """Saves a tiny BERT with random weights and its tokenizer; returns the folder."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        BertModel(encoder_config(initializer_range=0.5)).save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder


def make(kind: str, folder: Path, seed: int = 0, **changes: Any) -> Path:
    """Saves a tiny model with random weights and its tokenizer; returns the folder."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        AutoModelForCausalLM.from_config(config(kind, **changes)).save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder
