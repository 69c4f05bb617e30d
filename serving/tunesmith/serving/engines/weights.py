"""A base model in memory once, and any number of adapters over it, each in a module tree of its own."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
from torch import nn

from tunesmith.cluster.errors import AdapterError, ModelError
from tunesmith.serving.config import Base
from tunesmith.serving.engines.protocol import Version

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def device_of(gpus: float) -> torch.device:
    """Where a replica's model lies.

    Raises:
        ModelError: it reserves a GPU and there is none.
    """
    if gpus <= 0:
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise ModelError(f"gpus: {gpus:g} reserved, but PyTorch finds no GPU on this machine", "Set gpus: 0.")
    return torch.device("cuda")


def dtype_of(name: str, device: torch.device) -> torch.dtype:
    """The weights' number format for a config's `dtype`."""
    return DTYPES["bf16" if device.type == "cuda" else "fp32"] if name == "auto" else DTYPES[name]


def load_base(folder: str, settings: Base, device: torch.device, kind: str = "AutoModelForCausalLM") -> nn.Module:
    """The base alone, frozen; `kind` is the class of Transformers that loads it."""
    import transformers
    from transformers import BitsAndBytesConfig

    dtype = dtype_of(settings.dtype, device)
    extra: dict[str, Any] = {}
    if settings.quantization == "nf4":
        extra["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype, bnb_4bit_use_double_quant=True
        )
    elif settings.quantization == "int8":
        extra["quantization_config"] = BitsAndBytesConfig(load_in_8bit=True)
    if extra:
        extra["device_map"] = {"": str(device)}
    model = getattr(transformers, kind).from_pretrained(folder, dtype=dtype, **extra)
    if not extra:
        model.to(device)  # type: ignore[arg-type]
    return model.eval().requires_grad_(False)


def with_adapter(base: nn.Module, version: Version, device: torch.device) -> nn.Module:
    """A model of its own for a version, which shares every tensor of the base: nothing that it does changes another.

    Raises:
        AdapterError: PEFT cannot load it over this base.
    """
    from peft import PeftModel

    shared = {id(tensor): tensor for tensor in [*base.parameters(), *base.buffers()]}
    try:
        tree = copy.deepcopy(base, shared)
        model = PeftModel.from_pretrained(tree, str(Path(version.folder)), torch_device=str(device))  # type: ignore[arg-type]
    except (ValueError, RuntimeError, KeyError, TypeError) as error:
        reason = " ".join(str(error).split())[:300]
        raise AdapterError(f"version {version.digest[:12]}: PEFT cannot load it over this base: {reason}") from error
    model.eval().requires_grad_(False)
    return model if any(config.is_prompt_learning for config in model.peft_config.values()) else model.get_base_model()
