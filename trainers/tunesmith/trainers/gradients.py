"""Watches gradients as they are made, so that a NaN is seen before any weight is changed by it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


class GradientWatch:
    """Notes whether any gradient of a micro-batch is NaN or infinite.

    A hook on each trainable parameter sees its gradient before DeepSpeed reduces, shards or clips it, in every ZeRO
    stage alike. It costs one sum a gradient, and no synchronisation until `is_finite` is asked.
    """

    def __init__(self, model: nn.Module) -> None:
        self._sums: list[Tensor] = []
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.register_hook(self._note)

    def _note(self, gradient: Tensor) -> None:
        # A sum in fp32 is finite if all terms are, short of 3e38.
        self._sums.append(gradient.detach().sum(dtype=torch.float32))

    def is_finite(self) -> bool:
        """Whether all gradients since the last call were finite."""
        finite = not self._sums or bool(torch.isfinite(torch.stack(self._sums)).all())
        self._sums.clear()
        return finite


def norm_before_step(engine: Any) -> float | None:
    """Global norm of the reduced gradients, for an engine that does not keep it: fp32 without ZeRO.

    Call it between the last backward pass and the step. None where DeepSpeed's own optimizer knows it after the step.
    """
    if engine.zero_optimization() or engine.fp16_enabled() or engine.bfloat16_enabled():
        return None
    gradients = [p.grad for p in engine.module.parameters() if p.grad is not None]
    return float(nn.utils.get_total_norm(gradients))
