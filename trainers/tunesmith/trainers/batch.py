"""One batch for every objective: a packed row of tokens, its forest of segments, and labels only where they are.

Shape suffixes: T packed tokens, S segments, L labelled tokens.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

if TYPE_CHECKING:
    from tunesmith.trainers.data.tokens import TokenStore


@dataclass(frozen=True)
class Forest:
    """Which tokens of a packed row see each other.

    Segments lie one after another in the row. A token sees the earlier tokens of its own segment, and all tokens of
    that segment's ancestors: a completion that hangs off a shared prompt sees the prompt, never its siblings.

    Attributes:
        lengths: tokens of each segment, S of them.
        parents: index of each segment's parent, which lies before it; -1 for a root.
    """

    lengths: tuple[int, ...]
    parents: tuple[int, ...]

    @staticmethod
    def flat(lengths: Iterable[int]) -> Forest:
        """Segments that see only themselves."""
        lengths = tuple(lengths)
        return Forest(lengths, (-1,) * len(lengths))

    @property
    def is_flat(self) -> bool:
        """Whether no segment has a parent."""
        return all(parent < 0 for parent in self.parents)

    @property
    def starts(self) -> tuple[int, ...]:
        """Index of each segment's first token in the row."""
        return tuple(np.cumsum((0, *self.lengths[:-1])).tolist())

    def ancestors(self, segment: int) -> list[int]:
        """Ancestors of a segment, root first."""
        chain: list[int] = []
        while (segment := self.parents[segment]) >= 0:
            chain.insert(0, segment)
        return chain

    def position_ids(self) -> Tensor:
        """Position of every token within its own line of descent, int64 [T]."""
        ends: list[int] = []
        positions = []
        for length, parent in zip(self.lengths, self.parents, strict=True):
            first = ends[parent] if parent >= 0 else 0
            ends.append(first + length)
            positions.append(torch.arange(first, first + length))
        return torch.cat(positions)

    def segment_of_token(self) -> Tensor:
        """Segment index of every token, int64 [T]."""
        return torch.repeat_interleave(torch.arange(len(self.lengths)), torch.tensor(self.lengths))

    def visible(self) -> Tensor:
        """The plain mask that every fast path must equal: bool [T, T], query by key."""
        count = len(self.lengths)
        sees_SS = torch.eye(count, dtype=torch.bool)
        for segment in range(count):
            sees_SS[segment, self.ancestors(segment)] = True
        segment_T = self.segment_of_token()
        index_T = torch.arange(len(segment_T))
        return sees_SS[segment_T][:, segment_T] & (index_T[:, None] >= index_T[None, :])


@dataclass(frozen=True)
class Batch:
    """A micro-batch.

    Attributes:
        input_ids: int64 [T].
        position_ids: int64 [T], restarting with each root segment.
        forest: the segments.
        label_positions: int64 [L], the token whose prediction is scored: the one before the labelled token.
        targets: int64 [L], the labelled tokens.
        weights: float32 [L], weight of each label in the loss.
        normalizer: what the weighted sum is divided by: the label weight of the whole global batch, so that the loss
            does not depend on how the batch is cut into micro-batches and workers.
        examples: index of each root segment's example in its TokenStore, to name rows in messages.
    """

    input_ids: Tensor
    position_ids: Tensor
    forest: Forest
    label_positions: Tensor
    targets: Tensor
    weights: Tensor
    normalizer: float
    examples: tuple[int, ...]

    def to(self, device: torch.device) -> Batch:
        """The same batch with its tensors on a device."""
        if device.type == "cpu":
            return self
        moved = {
            name: value.to(device, non_blocking=True) for name, value in vars(self).items() if isinstance(value, Tensor)
        }
        return replace(self, **moved)


def collate(store: TokenStore, packs: Sequence[Sequence[int]], normalizer: float) -> Batch:
    """Lays the examples of several packs out in one row.

    A micro-batch of k rows is one long row: with segments that cannot see each other there is nothing to pad.

    Args:
        store: tokenised examples.
        packs: example indices, row by row.
        normalizer: label weight of the whole global batch.
    """
    indices = tuple(index for pack in packs for index in pack)
    tokens, positions, targets, lengths = [], [], [], []
    start = 0
    for index in indices:
        tokens_t, trained_t = store.example(index)
        labelled = np.flatnonzero(trained_t[1:])
        tokens.append(tokens_t)
        positions.append(labelled + start)
        targets.append(tokens_t[1:][labelled])
        lengths.append(len(tokens_t))
        start += len(tokens_t)
    forest = Forest.flat(lengths)
    target_L = torch.from_numpy(np.concatenate(targets).astype(np.int64))
    return Batch(
        input_ids=torch.from_numpy(np.concatenate(tokens).astype(np.int64)),
        position_ids=forest.position_ids(),
        forest=forest,
        label_positions=torch.from_numpy(np.concatenate(positions).astype(np.int64)),
        targets=target_L,
        weights=torch.ones(len(target_L)),
        normalizer=normalizer,
        examples=indices,
    )


def idle(batch: Batch) -> Batch:
    """The same tokens with nothing to learn: keeps a worker in step with the others when a short step has no row for it."""
    return replace(batch, weights=torch.zeros_like(batch.weights), examples=())


def digest(examples: Iterable[int]) -> int:
    """A sum over examples: the same in whatever order and by whichever workers they are taken."""
    return sum(zlib.crc32(example.to_bytes(8, "little")) for example in examples)
