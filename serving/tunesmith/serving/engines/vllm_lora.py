"""Mixed adapters on vLLM's CPU engine: two matrix products a layer for all adapters of a small batch, two for each of a large.

vLLM's own operator for CPUs copies an adapter's weights for every token, and gives a token without an adapter those of the
last slot. vLLM loads `register` in each of its processes as a plugin (pyproject.toml names it).

T tokens, D width of the input, O of the output, C ranks of all adapters and slices of a layer, one after the other.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from vllm.lora.punica_wrapper.punica_cpu import PunicaWrapperCPU
from vllm.platforms.cpu import CpuPlatform

FEW_TOKENS = 16
"""For each adapter: below it the calls cost more than the products that are masked out afterwards."""

Stacked = tuple[Tensor, ...]


class Packed(NamedTuple):
    """The adapters of one layer without the padding to the largest rank, the output's slices side by side.

    Attributes:
        ids: adapter in each slot; None is an empty one.
        spans: slot -> its rows in the two matrices.
        slots_C: the slot that each row is of.
        b_CO: transposed, with the output's other slices zero.
    """

    ids: tuple[int | None, ...]
    spans: dict[int, tuple[int, int]]
    slots_C: Tensor
    a_CD: Tensor
    b_CO: Tensor


class Tokens(NamedTuple):
    """The tokens of one step.

    Attributes:
        slots_T: adapter's slot of each; -1 is none.
        order_T: token indices sorted by slot.
        spans: slot, begin and end in that order, of the slots in use.
        masks: for each layout of slots, which token meets which of its rows.
    """

    slots_T: Tensor
    order_T: Tensor
    spans: tuple[tuple[int, int, int], ...]
    masks: dict[tuple[tuple[int, tuple[int, int]], ...], Tensor]


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
        widths: of the slices, side by side in the output.
        ids: adapter in each slot.
    """
    left, rows_a, rows_b, spans, slots = 0, [], [], {}, []
    for slot, adapter in enumerate(ids):
        begin = left
        for index, (a, b) in enumerate(zip(a_stacked, b_stacked, strict=True)):
            if adapter is None:
                continue
            used = int((a[slot, 0] != 0).any(1).sum())
            b_RO = a.new_zeros(used, sum(widths))
            offset = sum(widths[:index])
            b_RO[:, offset : offset + widths[index]] = b[slot, 0, :, :used].T
            rows_a.append(a[slot, 0, :used])
            rows_b.append(b_RO)
            left += used
        spans[slot] = (begin, left)
        slots += [slot] * (left - begin)
    empty = a_stacked[0].new_zeros(0, a_stacked[0].shape[-1])
    a_CD = torch.cat([empty, *rows_a])
    b_CO = torch.cat([a_CD.new_zeros(0, sum(widths)), *rows_b])
    return Packed(tuple(ids), spans, torch.tensor(slots, dtype=torch.long), a_CD, b_CO)


def add_lora(y_TO: Tensor, x_TD: Tensor, packed: Packed, tokens: Tokens) -> None:
    """Adds `x A^T B^T` of each token's own adapter to the output, in place."""
    if not tokens.spans:
        return
    is_narrow = len(packed.slots_C) <= x_TD.shape[1]
    if is_narrow and len(x_TD) <= FEW_TOKENS * len(tokens.spans):
        inner_TC = (x_TD @ packed.a_CD.T).mul_(_mask(packed, tokens, x_TD.dtype))
        y_TO.addmm_(inner_TC, packed.b_CO)
        return
    sorted_TD, sorted_TO = x_TD[tokens.order_T], torch.zeros_like(y_TO)
    for slot, begin, end in tokens.spans:
        first, last = packed.spans[slot]
        inner = sorted_TD[begin:end] @ packed.a_CD[first:last].T
        torch.mm(inner, packed.b_CO[first:last], out=sorted_TO[begin:end])
    y_TO.index_add_(0, tokens.order_T, sorted_TO)


def _mask(packed: Packed, tokens: Tokens, dtype: torch.dtype) -> Tensor:
    layout = tuple(packed.spans.items())
    if layout not in tokens.masks:
        tokens.masks[layout] = (tokens.slots_T[:, None] == packed.slots_C).to(dtype)
    return tokens.masks[layout]


class PackedLora(PunicaWrapperCPU):
    """vLLM's wrapper with this module's operator for linear layers; the rest is vLLM's."""

    def __init__(self, *arguments: Any, **named: Any) -> None:
        super().__init__(*arguments, **named)
        self._packed: dict[int, Packed] = {}
        self._ids: tuple[int | None, ...] = ()
        self._tokens: Tokens | None = None

    def update_metadata(self, mapping: Any, lora_index_to_id: list[int | None], *arguments: Any, **named: Any) -> None:
        """Which adapter each token of the next step has, and which adapter lies in each slot: ids are never used again."""
        super().update_metadata(mapping, lora_index_to_id, *arguments, **named)
        self._ids, self._tokens = tuple(lora_index_to_id), None

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
        if self._tokens is None:
            self._tokens = tokens_of(self.token_lora_indices)
        layer = lora_a_stacked[0].data_ptr()
        packed = self._packed.get(layer)
        if packed is None or packed.ids != self._ids:
            packed = self._packed[layer] = pack(lora_a_stacked, lora_b_stacked, output_slices, self._ids)
        add_lora(y, x, packed, self._tokens)


def register() -> None:
    """Makes vLLM's CPU platform take this operator."""

    def wrapper(cls: type[CpuPlatform]) -> str:
        return f"{PackedLora.__module__}.{PackedLora.__qualname__}"

    CpuPlatform.get_punica_wrapper = classmethod(wrapper)  # type: ignore[assignment,method-assign]
