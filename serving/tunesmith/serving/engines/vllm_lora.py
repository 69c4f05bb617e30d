"""Mixed adapters on vLLM's CPU engine: all adapters of a step that has few tokens in a product or two a layer, else each apart.

vLLM's own operator for CPUs copies an adapter's weights for every token, of the head too, which hardly an adapter changes;
and it gives a token without an adapter the weights of the last slot. vLLM loads `register` in each of its processes as a
plugin (pyproject.toml names it).

T tokens, D width of the input, O of a slice of the output, C ranks of all adapters and slices of a layer, slice after slice.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from vllm import _custom_ops as kernels
from vllm.lora.punica_wrapper.punica_cpu import PunicaWrapperCPU
from vllm.platforms.cpu import CpuPlatform

FEW_TOKENS = 16
"""For each adapter: below it the calls cost more than the products that are masked out afterwards."""
MOST_IDLE = 3
"""Times more ranks than a step uses, up to which they are multiplied with the others."""
STEADY = 8
"""Uses of a matrix before it is put into oneDNN's own layout, in which a product takes half the time: with more adapters
than slots a matrix may change every few steps."""

Stacked = tuple[Tensor, ...]
Span = tuple[int, int]


class Matrix:
    """A matrix (inputs x outputs) to multiply with from the right."""

    def __init__(self, plain: Tensor) -> None:
        self.plain = plain
        self._uses = 0
        self._handler: Any = None

    def after(self, x: Tensor) -> Tensor:
        """The product of x (rows x inputs) with it."""
        self._uses += 1
        if self._uses <= STEADY or not kernels._supports_onednn:
            return x @ self.plain
        self._handler = self._handler or kernels.create_onednn_mm(self.plain, 32)
        return kernels.onednn_mm(self._handler, x, None)


class Slice(NamedTuple):
    """A part of a layer's output, such as a projection's keys.

    Attributes:
        ranks: its part of C.
        columns: of the output.
        spans: slot -> its part of C.
    """

    ranks: Span
    columns: Span
    spans: dict[int, Span]
    b_CO: Matrix


class Packed(NamedTuple):
    """The adapters of one layer without the padding to the largest rank.

    Attributes:
        ids: adapter in each slot; None is an empty one.
        slots_C: that each row of the matrices is of.
        layout: of all slices, the ranks by slot; layers with one layout have one mask.
    """

    ids: tuple[int | None, ...]
    slots_C: Tensor
    layout: tuple[int, ...]
    a_DC: Matrix
    slices: tuple[Slice, ...]


class Tokens(NamedTuple):
    """The tokens of one step.

    Attributes:
        slots_T: adapter's slot of each; -1 is none.
        order_T: token indices sorted by slot.
        spans: slot, begin and end in that order, of the slots in use.
        masks: for each layout, which token meets which rows.
    """

    slots_T: Tensor
    order_T: Tensor
    spans: tuple[tuple[int, int, int], ...]
    masks: dict[tuple[int, ...], Tensor]


def tokens_of(slots_T: Tensor) -> Tokens:
    """Groups tokens by slot."""
    sorted_T, order_T = slots_T.sort(stable=True)
    slots, counts = sorted_T.unique_consecutive(return_counts=True)
    spans, begin = [], 0
    for slot, count in zip(slots.tolist(), counts.tolist(), strict=True):
        if slot >= 0:
            spans.append((slot, begin, begin + count))
        begin += count
    return Tokens(slots_T, order_T, tuple(spans), {})


def pack(a_stacked: Stacked, b_stacked: Stacked, widths: Sequence[int], ids: Sequence[int | None]) -> Packed:
    """Packs the adapters of a layer.

    Args:
        a_stacked: for each slice of the output, slots x 1 x largest rank x D.
        b_stacked: likewise, slots x 1 x width x largest rank; an adapter's scaling is in it already.
        widths: of the slices, side by side in the output; further columns of B are padding.
        ids: adapter in each slot.
    """
    rows_a: list[Tensor] = [a_stacked[0].new_zeros(0, a_stacked[0].shape[-1])]
    slots: list[int] = []
    slices, column = [], 0
    for a, b, width in zip(a_stacked, b_stacked, widths, strict=True):
        first, rows_b, spans = len(slots), [b.new_zeros(0, width)], {}
        for slot, adapter in enumerate(ids):
            rank = 0 if adapter is None else _rank(a[slot, 0])
            rows_a.append(a[slot, 0, :rank])
            rows_b.append(b[slot, 0, :width, :rank].T)
            spans[slot] = (len(slots), len(slots) + rank)
            slots += [slot] * rank
        slices.append(Slice((first, len(slots)), (column, column + width), spans, Matrix(torch.cat(rows_b))))
        column += width
    layout = tuple(last - first for one in slices for first, last in one.spans.values())
    return Packed(tuple(ids), torch.tensor(slots, dtype=torch.long), layout, Matrix(torch.cat(rows_a).T), tuple(slices))


def add_lora(y_TO: Tensor, x_TD: Tensor, packed: Packed, tokens: Tokens) -> None:
    """Adds `x A^T B^T` of each token's own adapter to the output, in place."""
    if not tokens.spans or not len(packed.slots_C):
        return
    used = sum(one.spans[slot][1] - one.spans[slot][0] for one in packed.slices for slot, *_ in tokens.spans)
    if len(x_TD) <= FEW_TOKENS * len(tokens.spans) and len(packed.slots_C) <= MOST_IDLE * used:
        inner_TC = packed.a_DC.after(x_TD).mul_(_mask(packed, tokens, x_TD.dtype))
        for one in packed.slices:
            if one.ranks[0] < one.ranks[1]:
                y_TO[:, slice(*one.columns)] += one.b_CO.after(inner_TC[:, slice(*one.ranks)])
        return
    sorted_TD, sorted_TO = x_TD[tokens.order_T], torch.zeros_like(y_TO)
    for slot, begin, end in tokens.spans:
        for one in packed.slices:
            first, last = one.spans[slot]
            inner = sorted_TD[begin:end] @ packed.a_DC.plain[:, first:last]
            at = one.ranks[0]
            sorted_TO[begin:end, slice(*one.columns)] = inner @ one.b_CO.plain[first - at : last - at]
    y_TO.index_add_(0, tokens.order_T, sorted_TO)


def _rank(a_RD: Tensor) -> int:
    """Rows up to the last that is not zero."""
    rows = (a_RD != 0).any(1).nonzero()
    return int(rows[-1]) + 1 if len(rows) else 0


def _mask(packed: Packed, tokens: Tokens, dtype: torch.dtype) -> Tensor:
    if packed.layout not in tokens.masks:
        tokens.masks[packed.layout] = (tokens.slots_T[:, None] == packed.slots_C).to(dtype)
    return tokens.masks[packed.layout]


class PackedLora(PunicaWrapperCPU):
    """vLLM's wrapper with this module's operator for linear layers; the rest is vLLM's."""

    def __init__(self, *arguments: Any, **named: Any) -> None:
        super().__init__(*arguments, **named)
        self._packed: dict[int, Packed] = {}
        self._embedded: dict[int, tuple[tuple[int | None, ...], frozenset[int]]] = {}
        self._ids: tuple[int | None, ...] = ()
        self._tokens: Tokens | None = None
        self._sampled: Tokens | None = None

    def update_metadata(self, mapping: Any, lora_index_to_id: list[int | None], *arguments: Any, **named: Any) -> None:
        """Which adapter each token of the next step has, and which adapter lies in each slot: ids are never used again."""
        super().update_metadata(mapping, lora_index_to_id, *arguments, **named)
        self._ids, self._tokens, self._sampled = tuple(lora_index_to_id), None, None

    def add_lora_linear(
        self,
        y: Tensor,
        x: Tensor,
        lora_a_stacked: Stacked,
        lora_b_stacked: Stacked,
        scale: float,
        output_slices: tuple[int, ...],
        *,
        buffer: Stacked | None = None,
        **_named: Any,
    ) -> None:
        """As vLLM's, computed by `add_lora`. The scale is 1: vLLM multiplies an adapter's own into B."""
        assert scale == 1.0, scale
        self._tokens = self._tokens or tokens_of(self.token_lora_indices)
        add_lora(y, x, self._packed_layer(lora_a_stacked, lora_b_stacked, output_slices), self._tokens)

    def add_lora_logits(
        self,
        y: Tensor,
        x: Tensor,
        lora_a_stacked: Tensor,
        lora_b_stacked: Tensor,
        scale: float,
        *,
        buffer: Tensor | None = None,
        **_named: Any,
    ) -> None:
        """As vLLM's. It is called for every step, though hardly an adapter changes the head."""
        assert scale == 1.0, scale
        self._sampled = self._sampled or tokens_of(self.sampler_indices)
        width = min(y.shape[-1], lora_b_stacked.shape[2])  # either may be padded
        packed = self._packed_layer((lora_a_stacked,), (lora_b_stacked,), (width,))
        add_lora(y.view(-1, y.shape[-1]), x.view(-1, x.shape[-1]), packed, self._sampled)

    def add_lora_embedding(
        self, y: Tensor, x: Tensor, lora_b_stacked: Tensor, add_inputs: bool = True, **_named: Any
    ) -> None:
        """As vLLM's; x is each token's own row of its adapter's A."""
        assert add_inputs
        self._tokens = self._tokens or tokens_of(self.token_lora_indices)
        for slot, begin, end in self._tokens.spans:
            if slot in self._changed_embeddings(lora_b_stacked):
                rows = self._tokens.order_T[begin:end]
                y.index_add_(0, rows, x[rows].to(y.dtype) @ lora_b_stacked[slot, 0].T)

    def _changed_embeddings(self, b_stacked: Tensor) -> frozenset[int]:
        """Slots whose adapter changes the embeddings, which hardly one does."""
        layer = b_stacked.data_ptr()
        known = self._embedded.get(layer)
        if known is None or known[0] != self._ids:
            slots = frozenset(
                slot for slot, id in enumerate(self._ids) if id is not None and bool(b_stacked[slot].any())
            )
            known = self._embedded[layer] = (self._ids, slots)
        return known[1]

    def _packed_layer(self, a_stacked: Stacked, b_stacked: Stacked, widths: tuple[int, ...]) -> Packed:
        layer = a_stacked[0].data_ptr()
        packed = self._packed.get(layer)
        if packed is None or packed.ids != self._ids:
            packed = self._packed[layer] = pack(a_stacked, b_stacked, widths, self._ids)
        return packed


def register() -> None:
    """Makes vLLM's CPU platform take this operator."""

    def wrapper(cls: type[CpuPlatform]) -> str:
        return f"{PackedLora.__module__}.{PackedLora.__qualname__}"

    CpuPlatform.get_punica_wrapper = classmethod(wrapper)  # type: ignore[assignment,method-assign]
