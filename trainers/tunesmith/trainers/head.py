"""Log-probabilities of labelled tokens from hidden states, without ever holding all logits.

Shape suffixes: L labelled tokens, C labels of one chunk, V vocabulary, D hidden.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

CHUNK_BYTES = 64 * 2**20  # fp32 logits held at a time: large enough for a full-speed matrix product


@dataclass(frozen=True)
class LogitTransform:
    """What a model does to its logits: `softcap * tanh(scale * z / softcap)`, or `scale * z` without a cap."""

    scale: float = 1.0
    softcap: float | None = None

    @staticmethod
    def of(config: Any) -> LogitTransform:
        """Read from a Transformers config: Gemma 2 caps, Cohere multiplies, Granite divides."""
        scale = getattr(config, "logit_scale", None) or 1.0 / (getattr(config, "logits_scaling", None) or 1.0)
        return LogitTransform(float(scale), getattr(config, "final_logit_softcapping", None))

    def apply(self, logits: Tensor) -> Tensor:
        """The transformed logits."""
        if self.scale != 1.0:
            logits = logits * self.scale
        return logits if self.softcap is None else self.softcap * torch.tanh(logits / self.softcap)

    def derivative(self, transformed: Tensor) -> Tensor | float:
        """Derivative at the point whose transformed value is given."""
        return self.scale if self.softcap is None else self.scale * (1.0 - (transformed / self.softcap) ** 2)


def install(lm_head: nn.Module, transform: LogitTransform) -> None:
    """Teaches a model's output layer to score labels: `lm_head(hidden_LD, targets_L) -> logps_L`.

    The layer itself is called once a forward, so that DeepSpeed's hooks gather its sharded weight once on every worker
    however many labels each has. Called with hidden states alone, it returns logits as before.
    """
    plain_forward = lm_head.forward

    def forward(hidden: Tensor, targets: Tensor | None = None) -> Tensor:
        if targets is None:
            return plain_forward(hidden)
        if type(lm_head) is nn.Linear:
            return label_logps(hidden, lm_head.weight, lm_head.bias, targets, transform)
        logits = transform.apply(plain_forward(hidden).float())
        return logits.gather(1, targets[:, None])[:, 0] - logits.logsumexp(1)

    lm_head.forward = forward


def label_logps(
    hidden_LD: Tensor, weight_VD: Tensor, bias_V: Tensor | None, target_L: Tensor, transform: LogitTransform
) -> Tensor:
    """`log softmax(f(hidden @ weight.T + bias))[target]`, a chunk of labels at a time.

    Args:
        hidden_LD: hidden states where a label is predicted.
        weight_VD: the output layer.
        bias_V: its bias, or None.
        target_L: int64, the labels.
        transform: the model's f.

    Returns:
        float32 [L]. Peak memory is a chunk of logits, not L x V. The backward pass makes the logits again, but for the
        last chunk, which is kept. With a frozen output layer the forward prepares the gradient of the hidden states
        instead, and nothing is made twice.
    """
    logps: Tensor = _LabelLogps.apply(hidden_LD, weight_VD, bias_V, target_L, transform, torch.is_grad_enabled())  # pyright: ignore[reportAssignmentType]
    return logps


class _LabelLogps(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden_LD: Tensor,
        weight_VD: Tensor,
        bias_V: Tensor | None,
        target_L: Tensor,
        transform: LogitTransform,
        is_training: bool,
    ) -> Tensor:
        head_is_frozen = not (weight_VD.requires_grad or (bias_V is not None and bias_V.requires_grad))
        ctx.slopes_ready = is_training and head_is_frozen and hidden_LD.requires_grad
        ctx.kept = None
        logps, normalizers, slopes = [], [], []
        chunks = _chunks(hidden_LD, target_L, len(weight_VD))
        for number, (hidden_CD, target_C) in enumerate(chunks, start=1):
            logits_CV = _logits(hidden_CD, weight_VD, bias_V, transform)
            derivative = transform.derivative(logits_CV)
            label_logit_C = logits_CV.gather(1, target_C[:, None])[:, 0]
            exp_CV, total_C, normalizer_C = _exponentials(logits_CV)
            logps.append(label_logit_C - normalizer_C)
            normalizers.append(normalizer_C)
            if ctx.slopes_ready:
                ones_C = torch.ones_like(total_C)
                slopes.append(_dlogits(exp_CV, total_C, target_C, ones_C, derivative).to(weight_VD.dtype) @ weight_VD)
            elif is_training and number == len(chunks):
                ctx.kept = exp_CV, total_C, derivative
        slope_LD = torch.cat(slopes) if slopes else None
        ctx.save_for_backward(hidden_LD, weight_VD, bias_V, target_L, torch.cat(normalizers), slope_LD)
        ctx.transform = transform
        return torch.cat(logps)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        grad_L = grad_outputs[0]
        hidden_LD, weight_VD, bias_V, target_L, normalizer_L, slope_LD = ctx.saved_tensors
        if ctx.slopes_ready:
            return (slope_LD * grad_L[:, None]).to(hidden_LD.dtype), None, None, None, None, None
        grad_hidden = torch.empty_like(hidden_LD)
        grad_weight = torch.zeros_like(weight_VD) if ctx.needs_input_grad[1] else None
        grad_bias = torch.zeros_like(bias_V) if bias_V is not None and ctx.needs_input_grad[2] else None
        end = len(target_L)
        for hidden_CD, target_C in reversed(_chunks(hidden_LD, target_L, len(weight_VD))):
            rows, end = slice(end - len(target_C), end), end - len(target_C)
            kept, ctx.kept = ctx.kept, None  # the last chunk, the first time
            if kept is None:
                logits_CV = _logits(hidden_CD, weight_VD, bias_V, ctx.transform)
                derivative = ctx.transform.derivative(logits_CV)
                softmax_CV = logits_CV.sub_(normalizer_L[rows, None]).exp_()
                kept = softmax_CV, torch.ones_like(normalizer_L[rows]), derivative
            exp_CV, total_C, derivative = kept
            dlogits_CV = _dlogits(exp_CV, total_C, target_C, grad_L[rows], derivative).to(weight_VD.dtype)
            grad_hidden[rows] = dlogits_CV @ weight_VD
            if grad_weight is not None:
                grad_weight.addmm_(dlogits_CV.T, hidden_CD)
            if grad_bias is not None:
                grad_bias += dlogits_CV.sum(0)
        return grad_hidden, grad_weight, grad_bias, None, None, None


def _chunks(hidden_LD: Tensor, target_L: Tensor, vocabulary: int) -> list[tuple[Tensor, Tensor]]:
    size = chunk_size(len(target_L), vocabulary)
    return list(zip(hidden_LD.split(size), target_L.split(size), strict=True))


def chunk_size(labels: int, vocabulary: int) -> int:
    """Labels of a chunk: as few chunks as the bytes allow, of equal size, because the last is kept for the backward pass
    and spares most so."""
    most = max(1, CHUNK_BYTES // (4 * vocabulary))
    count = max(1, -(-labels // most))
    return max(1, -(-labels // count))


def _logits(hidden_CD: Tensor, weight_VD: Tensor, bias_V: Tensor | None, transform: LogitTransform) -> Tensor:
    return transform.apply(F.linear(hidden_CD, weight_VD, bias_V).float())


def _exponentials(logits_CV: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """`exp(logits - their maximum)` [C, V] in the logits' own memory, its sum [C], and log-sum-exp of the logits [C]."""
    top_C1 = logits_CV.amax(1, keepdim=True)
    exp_CV = logits_CV.sub_(top_C1).exp_()
    total_C = exp_CV.sum(1)
    return exp_CV, total_C, total_C.log() + top_C1[:, 0]


def _dlogits(exp_CV: Tensor, total_C: Tensor, target_C: Tensor, grad_C: Tensor, derivative: Tensor | float) -> Tensor:
    """Derivative of the label's log-probability by the untransformed logits, `(onehot - softmax) * f'`, times `grad_C`.

    The softmax is `exp_CV / total_C`, which is overwritten.
    """
    dlogits_CV = exp_CV.mul_((-grad_C / total_C)[:, None])
    dlogits_CV[torch.arange(len(target_C), device=target_C.device), target_C] += grad_C
    return dlogits_CV if isinstance(derivative, float) and derivative == 1.0 else dlogits_CV.mul_(derivative)
