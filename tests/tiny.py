"""Tiny random models and batches for tests."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from tunesmith.trainers.batch import Batch, collate

VOCABULARY = 97

_SMALL: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "head_dim": 8,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}

KINDS: dict[str, dict[str, Any]] = {
    "llama": {},
    "llama tied": {"model_type": "llama", "tie_word_embeddings": True},
    "mistral": {"sliding_window": 6},
    "qwen3": {},
    "gemma2": {"sliding_window": 6, "final_logit_softcapping": 5.0, "attn_logit_softcapping": 4.0},
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": None},
    "qwen3_moe": {
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 24,
        "router_aux_loss_coef": 0.01,
    },
}


def tiny_model(kind: str, seed: int = 0, **changes: Any) -> Any:
    """A random model of one of `KINDS`, in training mode without dropout."""
    settings = {**_SMALL, "model_type": kind, **KINDS[kind], **changes}
    config = AutoConfig.for_model(settings.pop("model_type"), **settings)
    torch.manual_seed(seed)
    return AutoModelForCausalLM.from_config(config, attn_implementation="eager").train()


class Rows:
    """Examples in memory, with what `collate` asks of a TokenStore."""

    def __init__(self, lengths: list[int], seed: int = 0, trained_share: float = 0.5) -> None:
        rng = np.random.default_rng(seed)
        self.rows = [
            (rng.integers(3, VOCABULARY, size=n).astype(np.int32), rng.random(n) < trained_share) for n in lengths
        ]

    def example(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """Tokens and trained flags of a row."""
        return self.rows[index]

    @property
    def labels(self) -> int:
        """Labels of all rows."""
        return sum(int(trained[1:].sum()) for _, trained in self.rows)

    def batch(self) -> Batch:
        """All rows in one pack."""
        return collate(self, [range(len(self.rows))], float(self.labels))  # type: ignore[arg-type]
