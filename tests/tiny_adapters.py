"""Small adapters on disk: sound ones, as training writes them, to be spoilt by tests."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from tunesmith.cluster.storage import commit_folder

BASE_DIGEST = "ba5e" * 16
HIDDEN, LAYERS = 16, 2
MODULES = ("self_attn.q_proj", "self_attn.v_proj")
BASE_SHAPES = {f"model.layers.{n}.{module}.weight": (HIDDEN, HIDDEN) for n in range(LAYERS) for module in MODULES} | {
    "model.embed_tokens.weight": (64, HIDDEN)
}


def tensors(rank: int = 4, seed: int = 0, hidden: int = HIDDEN, layers: int = LAYERS) -> dict[str, np.ndarray]:
    """LoRA tensors of every module, named as PEFT names them."""
    rng = np.random.default_rng(seed)
    made = {}
    for module in (f"base_model.model.model.layers.{n}.{name}" for n in range(layers) for name in MODULES):
        made[f"{module}.lora_A.weight"] = rng.normal(size=(rank, hidden)).astype(np.float32)
        made[f"{module}.lora_B.weight"] = rng.normal(size=(hidden, rank)).astype(np.float32)
    return made


def settings(**changed: Any) -> dict[str, Any]:
    """adapter_config.json."""
    own = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"], "auto_mapping": None}
    return {**own, "megatron_core": "megatron.core", "base_model_name_or_path": "somewhere", **changed}


def plain(folder: Path, weights: dict[str, np.ndarray] | None = None, config: dict[str, Any] | None = None) -> Path:
    """A PEFT folder without a manifest."""
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors() if weights is None else weights, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps(config or settings()))
    (folder / "tokenizer_config.json").write_text('{"auto_map": null}')
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    return folder


def artifact(folder: Path, seed: int = 0, rank: int = 4, **about: Any) -> Path:
    """A signed artifact as training exports it."""
    said = {"kind": "artifact", "run": "bot", "base": {"reference": "tiny", "revision": None, "digest": BASE_DIGEST}}
    with commit_folder(folder, {**said, "parity_passed": True, **about}) as temporary:
        plain(temporary, tensors(rank, seed), settings(r=rank))
        (temporary / "README.md").write_text("# bot")
        (temporary / "receipts").mkdir()
        (temporary / "receipts" / "parity.json").write_text("{}")
        (temporary / "receipts" / "mask.html").write_text("<p>")
    return folder
