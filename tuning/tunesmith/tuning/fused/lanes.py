"""Many LoRA adapters on one frozen base in one forward and backward: each lane of a row has its own.

A row of tokens is cut into lanes of equal length. The frozen layers see the whole row; beside each adapted layer, the
tokens of a lane pass through the adapter of the trial that the lane belongs to. Adapters of one rank bucket are stacked,
so that all their lanes are one batched matrix product.

Shape suffixes: N lanes, C tokens of a lane, D inputs and O outputs of a layer, R rank, P weights of a whole adapter.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

LEAST_RANK = 16


def bucket_of(rank: int) -> int:
    """The rank that adapters of this rank are padded to: the next power of two, at least 16.

    Zeros beyond an adapter's own rank get no gradient, so they stay zero, and change no sum.
    """
    return max(LEAST_RANK, 1 << (rank - 1).bit_length())


class Span(NamedTuple):
    """Where a layer's two matrices lie in an adapter's vector of weights, A as [D, R] and then B as [R, O]."""

    first: int
    inputs: int
    outputs: int

    def matrices(self, weights: Tensor, rank: int) -> tuple[Tensor, Tensor]:
        """Views of A [..., D, R] and B [..., R, O] in weights [..., P] of an adapter padded to `rank`."""
        a, b = self.inputs * rank, self.outputs * rank
        at = self.first * rank
        return (
            weights[..., at : at + a].unflatten(-1, (self.inputs, rank)),
            weights[..., at + a : at + a + b].unflatten(-1, (rank, self.outputs)),
        )


@dataclass(frozen=True)
class Layout:
    """Which layers adapters have, and where each layer's weights lie in an adapter's vector.

    Attributes:
        spans: by the layer's name.
        size: weights of an adapter of rank 1; one of rank R has R times as many.
    """

    spans: dict[str, Span]
    size: int

    @staticmethod
    def of(layers: dict[str, nn.Module]) -> Layout:
        """The layout for these linear layers."""
        spans, first = {}, 0
        for name, layer in layers.items():
            span = Span(first, int(layer.in_features), int(layer.out_features))  # type: ignore[arg-type]
            spans[name] = span
            first += span.inputs + span.outputs
        return Layout(spans, first)


@dataclass
class Bucket:
    """Neighbouring lanes whose adapters are padded to one rank.

    Attributes:
        first, last: its lanes, the last one excluded.
        weights: [N, P] of its lanes, in the format of the activations.
        gradients: float32 [N, P]; added to by the backward pass. None when nothing is trained.
        scale: [N, 1, 1], `lora_alpha / rank` of each lane.
        dropouts: the dropout of each lane; None where no lane drops anything.
    """

    first: int
    last: int
    rank: int
    weights: Tensor
    gradients: Tensor | None
    scale: Tensor
    dropouts: list[Dropout] | None = None


@dataclass
class Dropout:
    """What a lane drops of an adapter's input, drawn as `torch.nn.functional.dropout` draws it for this lane alone.

    Attributes:
        share: probability of a zero; 0 drops nothing.
        generator: the lane's own stream.
        tokens: tokens of the lane that are no filler.
    """

    share: float
    generator: torch.Generator
    tokens: int

    def fill(self, noise_CD: Tensor) -> None:
        """Fills the factors of a lane's inputs."""
        if self.share == 0.0:
            return
        drawn = torch.empty(self.tokens, noise_CD.shape[1], dtype=noise_CD.dtype, device=noise_CD.device)
        noise_CD[: self.tokens] = drawn.bernoulli_(1 - self.share, generator=self.generator).div_(1 - self.share)


@dataclass
class Lanes:
    """How the row that is being computed is cut into lanes; what every adapted layer looks at.

    Attributes:
        length: tokens of a lane.
        buckets: in the order of their lanes; all lanes of the row.
    """

    length: int
    buckets: list[Bucket] = field(default_factory=list)


class LaneLora(nn.Module):
    """A frozen linear layer, plain or quantised, beside which each lane has its own low-rank update.

    Args:
        base: the layer.
        span: where its weights lie in an adapter.
        lanes: how the row is cut; changes from row to row.
    """

    def __init__(self, base: nn.Module, span: Span, lanes: Lanes) -> None:
        super().__init__()
        self.base, self.span, self.lanes = base, span, lanes
        # makes the output require a gradient even where the input needs none; never changed, because it gets none
        self.anchor = nn.Parameter(torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        """The layer with its lanes' updates, for a row [1, N * C, D]."""
        y = self.base(x)
        if not self.lanes.buckets:
            return y
        return _Update.apply(y, x, self.anchor, self.span, self.lanes)  # pyright: ignore[reportReturnType]


class _Update(torch.autograd.Function):
    """`y += scale * (dropout(x) @ A) @ B`, lane by lane. The adapters' gradients go straight to their buckets."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, x: Tensor, anchor: Tensor, span: Span, lanes: Lanes) -> Tensor:
        ctx.mark_dirty(y)
        ctx.span, ctx.lanes, ctx.buckets = span, lanes, list(lanes.buckets)
        x_NCD = x.view(-1, lanes.length, span.inputs)
        y_NCO = y.view(-1, lanes.length, span.outputs)
        lows, noises = [], []
        for bucket in ctx.buckets:
            here = slice(bucket.first, bucket.last)
            a_NDR, b_NRO = span.matrices(bucket.weights, bucket.rank)
            noise_NCD = _noise(bucket, x_NCD[here])
            kept_NCD = x_NCD[here] if noise_NCD is None else x_NCD[here] * noise_NCD
            low_NCR = torch.bmm(kept_NCD, a_NDR).mul_(bucket.scale)
            y_NCO[here].baddbmm_(low_NCR, b_NRO)
            lows.append(low_NCR)
            noises.append(noise_NCD)
        if any(ctx.needs_input_grad):
            ctx.save_for_backward(x, *lows, *(noise for noise in noises if noise is not None))
            ctx.has_noise = [noise is not None for noise in noises]
        return y

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        dy = grad_outputs[0]
        x, *saved = ctx.saved_tensors
        span, length, count = ctx.span, ctx.lanes.length, len(ctx.buckets)
        lows, noises = saved[:count], iter(saved[count:])
        x_NCD = x.view(-1, length, span.inputs)
        dy_NCO = dy.reshape(-1, length, span.outputs)
        dx_NCD = torch.empty_like(x_NCD) if ctx.needs_input_grad[1] else None
        for bucket, low_NCR, has_noise in zip(ctx.buckets, lows, ctx.has_noise, strict=True):
            here = slice(bucket.first, bucket.last)
            noise_NCD = next(noises) if has_noise else None
            kept_NCD = x_NCD[here] if noise_NCD is None else x_NCD[here] * noise_NCD
            a_NDR, b_NRO = span.matrices(bucket.weights, bucket.rank)
            assert bucket.gradients is not None, "a backward pass through lanes that were laid out for scoring"
            da_NDR, db_NRO = span.matrices(bucket.gradients, bucket.rank)
            dlow_NCR = torch.bmm(dy_NCO[here], b_NRO.mT).mul_(bucket.scale)
            db_NRO += torch.bmm(low_NCR.mT, dy_NCO[here])
            da_NDR += torch.bmm(kept_NCD.mT, dlow_NCR)
            if dx_NCD is not None:
                torch.bmm(dlow_NCR, a_NDR.mT, out=dx_NCD[here])
                if noise_NCD is not None:
                    dx_NCD[here] *= noise_NCD
        return dy, None if dx_NCD is None else dx_NCD.view_as(x), None, None, None


def _noise(bucket: Bucket, x_NCD: Tensor) -> Tensor | None:
    if bucket.dropouts is None:
        return None
    noise_NCD = torch.ones_like(x_NCD)
    for dropout, noise_CD in zip(bucket.dropouts, noise_NCD, strict=True):
        dropout.fill(noise_CD)
    return noise_NCD


def install(model: nn.Module, names: Sequence[str], lanes: Lanes) -> Layout:
    """Puts a `LaneLora` around each named layer, in place.

    Args:
        names: full names of linear layers.

    Returns:
        Where each layer's weights lie in an adapter.
    """
    found = {name: model.get_submodule(name) for name in names}
    layout = Layout.of(found)
    for name, layer in found.items():
        parent, _, last = name.rpartition(".")
        setattr(model.get_submodule(parent), last, LaneLora(layer, layout.spans[name], lanes))
    return layout
