"""Settings of every PEFT type that fit the tiny Llama of the tests, without `peft_type`, which is the key."""

from __future__ import annotations

from typing import Any

ATTENTION = ["q_proj", "v_proj"]
SQUARE = ["q_proj", "o_proj"]  # types that share one projection want layers of one shape

PEFT_CONFIGS: dict[str, dict[str, Any]] = {
    "ADAPTION_PROMPT": {"adapter_len": 4, "adapter_layers": 2},
    "BEFT": {"target_modules": ["v_proj"]},
    "BOFT": {"target_modules": ATTENTION, "boft_block_size": 4},
    "C3A": {"target_modules": ATTENTION, "block_size": 4},
    "DEFT": {"target_modules": ATTENTION, "r": 4},
    "DELORA": {"target_modules": ATTENTION, "r": 4},
    "FOURIERFT": {"target_modules": ATTENTION, "n_frequency": 100, "init_weights": True},
    "FROD": {"target_modules": ATTENTION, "progressbar": False},
    "GLORA": {"target_modules": ATTENTION, "r": 4},
    "GRALORA": {"target_modules": ATTENTION, "r": 4},
    "HIRA": {"target_modules": ATTENTION, "r": 4},
    "HRA": {"target_modules": ATTENTION, "r": 4},
    "IA3": {"target_modules": ["k_proj", "v_proj", "down_proj"], "feedforward_modules": ["down_proj"]},
    "LN_TUNING": {},
    "LOHA": {"target_modules": ATTENTION, "r": 4},
    "LOKR": {"target_modules": ATTENTION, "r": 4},
    "LORA": {"target_modules": ATTENTION, "r": 4},
    "MISS": {"target_modules": ATTENTION, "r": 4},
    "OFT": {"target_modules": ATTENTION, "oft_block_size": 4},
    "OSF": {"target_modules": ATTENTION, "effective_rank": 8},
    "PEANUT": {"target_modules": ATTENTION, "r": 4},
    "PSOFT": {"target_modules": ATTENTION, "r": 4},
    "PVERA": {"target_modules": SQUARE, "r": 64, "d_initial": 1.0},
    "RANDLORA": {"target_modules": SQUARE, "r": 4},
    "ROAD": {"target_modules": ATTENTION, "group_size": 4},
    "SHIRA": {"target_modules": ATTENTION, "r": 4},
    "SUPERTUNING": {"target_modules": ATTENTION, "sparsity": 0.9},
    "TINYLORA": {"target_modules": ATTENTION},
    "TRAINABLE_TOKENS": {"target_modules": ["embed_tokens"], "token_indices": list(range(60, 100))},
    "UNILORA": {"target_modules": ATTENTION, "r": 4},
    "VBLORA": {"target_modules": ATTENTION, "r": 4, "num_vectors": 32, "vector_length": 16},
    "VERA": {"target_modules": SQUARE, "r": 16},
    "WAVEFT": {"target_modules": ATTENTION, "n_frequency": 100},
}
"""The types that train."""

PLANNED_CONFIGS: dict[str, dict[str, Any]] = {
    "ADALORA": {"target_modules": ATTENTION, "total_step": 8},
    "CARTRIDGE": {"num_virtual_tokens": 4},
    "CPT": {"cpt_token_ids": [5, 6, 7], "cpt_mask": [1, 1, 1], "cpt_tokens_type_mask": [1, 2, 3]},
    "LILY": {"target_modules": ATTENTION, "r": 4},
    "MULTITASK_PROMPT_TUNING": {"num_virtual_tokens": 4, "num_tasks": 2},
    "POLY": {"target_modules": ATTENTION, "r": 4},
    "PREFIX_TUNING": {"num_virtual_tokens": 4},
    "PROMPT_TUNING": {"num_virtual_tokens": 4},
    "P_TUNING": {"num_virtual_tokens": 4, "encoder_hidden_size": 16},
    "SHADOW": {"r": 4, "shadow_num_hidden_layers": 1},
}
"""The types that are built for a plan but not trained. ADAMSS wants scikit-learn and XLORA trained adapters besides."""


def adaptation(peft_type: str, /, **changes: Any) -> dict[str, Any]:
    """The recipe's section `adaptation` for a type."""
    settings = (PEFT_CONFIGS | PLANNED_CONFIGS)[peft_type]
    return {"kind": "peft", "config": {"peft_type": peft_type, **settings, **changes}}
