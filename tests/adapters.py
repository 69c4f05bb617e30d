"""Adapters over a tiny base, made with PEFT itself: their weights are random, large enough to change every answer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from tunesmith.serving.engines.protocol import Version


def make_adapter(base: Path, folder: Path, config: Any, seed: int = 0, scale: float = 0.5) -> Version:
    """Saves an adapter with random weights; its digest is the folder's name."""
    from peft import get_peft_model
    from transformers import AutoModelForCausalLM

    torch.manual_seed(seed)
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * scale)
    model.save_pretrained(folder)
    return Version(folder.name, str(folder))


def plain_peft(base: Path, folder: Path | None) -> Any:
    """The oracle: the base, with one adapter loaded by PEFT alone."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval()
    return PeftModel.from_pretrained(model, str(folder)).eval() if folder else model


def greedy(model: Any, tokens: list[int], count: int) -> list[int]:
    """The likeliest continuation by plain `generate`, without an end."""
    ids = torch.tensor([tokens])
    output = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=count, min_new_tokens=count,
                            do_sample=False, eos_token_id=None, pad_token_id=0)  # fmt: skip
    return output[0, len(tokens) :].tolist()
