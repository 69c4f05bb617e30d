"""bitsandbytes' layers on fake tensors, whose own parameter classes cannot be made of them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from tunesmith.trainers.models import keep_codes

BLOCK = 64
"""Weights that share a scale in NF4; the scales themselves are held in 8 bits, 256 of them sharing an fp32 one."""


def quantize(model: Any, quantization: str, dtype: torch.dtype) -> None:
    """Replaces the linear layers that loading would quantise, with packed weights that hold no values."""
    from transformers.quantizers.base import get_keys_to_not_convert

    kept = get_keys_to_not_convert(model)
    make = _four_bits if quantization == "nf4" else _eight_bits
    for name, module in list(model.named_modules()):
        if type(module) is nn.Linear and not any(name == key or name.endswith(f".{key}") for key in kept):
            parent, _, last = name.rpartition(".")
            setattr(model.get_submodule(parent), last, make(module, dtype))
    if quantization == "nf4":
        model.is_loaded_in_4bit = True  # PEFT then takes its 4-bit layers
    keep_codes(model)


def _four_bits(plain: nn.Linear, dtype: torch.dtype) -> nn.Module:
    from bitsandbytes import functional
    from bitsandbytes.nn.modules import Linear4bit

    layer: Any = Linear4bit.__new__(Linear4bit)
    nn.Module.__init__(layer)

    packed, state = functional.quantize_4bit(
        plain.weight.data, blocksize=BLOCK, compress_statistics=True, quant_type="nf4", quant_storage=dtype
    )
    weight: Any = nn.Parameter(packed, requires_grad=False)
    weight.quant_state, weight.compress_statistics, weight.quant_type = state, True, "nf4"
    layer.weight, layer.bias, layer.quant_state = weight, plain.bias, state
    layer.in_features, layer.out_features = plain.in_features, plain.out_features
    layer.compute_dtype, layer.compute_type_is_set, layer.quant_storage = dtype, True, dtype
    layer.support_avx512bf16_for_cpu = False
    return layer


def _eight_bits(plain: nn.Linear, dtype: torch.dtype) -> nn.Module:
    del dtype
    return Linear8bit(plain)


class Linear8bit(nn.Linear):
    """Allocates what bitsandbytes' LLM.int8 layer does, for a frozen weight."""

    def __init__(self, plain: nn.Linear) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features, self.bias = plain.in_features, plain.out_features, plain.bias
        self.weight = nn.Parameter(torch.empty_like(plain.weight, dtype=torch.int8), requires_grad=False)
        self.scale = torch.empty(plain.out_features)

    def forward(self, input: Tensor) -> Tensor:
        return _MatMul8bit.apply(input, self.weight)  # pyright: ignore[reportReturnType]


class _MatMul8bit(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, inputs: Tensor, weight: Tensor) -> Tensor:
        ctx.inputs, ctx.weight = inputs, weight  # bitsandbytes keeps the inputs too
        half = inputs.to(torch.float16)
        codes = torch.empty_like(half, dtype=torch.int8)
        del half
        sums = inputs.new_empty(*inputs.shape[:-1], weight.shape[0], dtype=torch.int32)
        outputs = torch.empty_like(sums, dtype=inputs.dtype)
        del codes, sums
        return outputs

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        if not ctx.needs_input_grad[0]:
            return None, None
        return grad_outputs[0] @ ctx.weight.to(grad_outputs[0].dtype), None
