"""The frozen layers below every adapter, computed once for an example, whoever trains on it and however often.

Nothing below the lowest adapted layer depends on a trial, and segments do not see each other, so an example's activations
there are the same in every row.

Shape suffixes: T tokens of an example, D hidden.
"""

from __future__ import annotations

import re
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import Tensor, nn

from tunesmith.trainers.batch import collate
from tunesmith.trainers.data.tokens import TokenStore

SHARE = 0.25
"""Of the memory that is free at the start, what activations may take."""


def frozen_depth(model: Any, targets: Sequence[str]) -> int:
    """Decoder layers below the lowest adapted one; 0 where that cannot be told from the names."""
    layers = getattr(model.base_model, "layers", None)
    if not isinstance(layers, nn.ModuleList) or not hasattr(model.base_model, "norm"):
        return 0
    path = next(name for name, module in model.named_modules() if module is layers)
    found = [re.match(rf"{re.escape(path)}\.(\d+)\.", name) for name in targets]
    return min(int(match[1]) for match in found if match) if all(found) else 0


def free_bytes(device: torch.device) -> int:
    """Memory that is free on a device."""
    return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else psutil.virtual_memory().available


class Prefix:
    """The lowest layers of a model, and what they made of each example.

    Args:
        model: a Transformers model whose decoder keeps its layers in `layers` and ends in `norm`.
        depth: how many layers.
        row_tokens: tokens that are computed at a time.
        limit: bytes of activations that are kept; of those beyond it the longest unused are forgotten.
    """

    def __init__(self, model: Any, depth: int, row_tokens: int, limit: int) -> None:
        self.depth, self.row_tokens, self.limit = depth, row_tokens, limit
        self._decoder: Any = model.base_model
        self._layers: nn.ModuleList = self._decoder.layers
        self._norm: nn.Module = self._decoder.norm
        self._device = next(model.parameters()).device
        self._kept: OrderedDict[tuple[Path, int], Tensor] = OrderedDict()
        self._bytes = 0
        self.computed = 0
        """Tokens that went through the layers."""
        self.served = 0
        """Tokens that were asked for."""

    def activations(self, store: TokenStore, examples: Sequence[int]) -> list[Tensor]:
        """For each example [T, D], what goes into the first layer above."""
        missing = [one for one in dict.fromkeys(examples) if (store.folder, one) not in self._kept]
        fresh: dict[int, Tensor] = {}
        for part in _parts(missing, store, self.row_tokens):
            fresh.update(zip(part, self._compute(store, part), strict=True))
        found = [fresh[one] if one in fresh else self._kept[store.folder, one] for one in examples]
        self.served += sum(len(tensor) for tensor in found)
        for one in dict.fromkeys(examples):
            if one in fresh:
                self._kept[store.folder, one] = fresh[one]
                self._bytes += fresh[one].nbytes
            self._kept.move_to_end((store.folder, one))
        while self._bytes > self.limit:
            _, forgotten = self._kept.popitem(last=False)
            self._bytes -= forgotten.nbytes
        return found

    @contextmanager
    def above(self) -> Iterator[None]:
        """Within it the model begins at the first layer above."""
        with self._only(self._layers[self.depth :], self._norm):
            yield

    @torch.no_grad()
    def is_sound(self, store: TokenStore, example: int) -> bool:
        """Whether the two parts, one after the other, are the whole model: some architectures do more between layers."""
        batch = collate(store, [(example,)], 1.0).to(self._device)
        inputs: dict[str, Any] = {"position_ids": batch.position_ids[None], "use_cache": False, "forest": batch.forest}
        whole = self._decoder(input_ids=batch.input_ids[None], **inputs).last_hidden_state
        (below,) = self.activations(store, [example])
        with self.above():
            parts = self._decoder(inputs_embeds=below[None], **inputs).last_hidden_state
        return torch.equal(whole, parts)

    @torch.no_grad()
    def _compute(self, store: TokenStore, examples: Sequence[int]) -> list[Tensor]:
        batch = collate(store, [examples], 1.0).to(self._device)
        with self._only(self._layers[: self.depth], nn.Identity()):
            outputs = self._decoder(
                input_ids=batch.input_ids[None],
                position_ids=batch.position_ids[None],
                use_cache=False,
                forest=batch.forest,
            )
        self.computed += len(batch.input_ids)
        hidden = outputs.last_hidden_state[0]
        return [part.clone() for part in hidden.split(list(batch.forest.lengths))]

    @contextmanager
    def _only(self, layers: nn.ModuleList, norm: nn.Module) -> Iterator[None]:
        self._decoder.layers, self._decoder.norm = layers, norm
        try:
            yield
        finally:
            self._decoder.layers, self._decoder.norm = self._layers, self._norm


def _parts(examples: Sequence[int], store: TokenStore, most: int) -> Iterator[list[int]]:
    part: list[int] = []
    tokens = 0
    for example in examples:
        length = int(store.lengths[example])
        if part and tokens + length > most:
            yield part
            part, tokens = [], 0
        part.append(example)
        tokens += length
    if part:
        yield part
