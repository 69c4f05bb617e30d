"""Which examples make up which micro-batch: a pure function of lengths, recipe and seed.

The plan is the same on every worker and for every world size, so a run needs no sampler state: a step's micro-batches
follow from its number alone, and resuming is exact. A *pack* is a list of example indices that share one row.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from tunesmith.cluster.errors import RecipeError

if TYPE_CHECKING:
    from tunesmith.cluster.recipe.schema import Recipe
    from tunesmith.trainers.data.prepare import Prepared

Indices = NDArray[np.int64]
Pack = tuple[int, ...]

_WINDOW = 16_384  # examples packed together: enough for over 99 % fill, small enough to keep the order random


@dataclass(frozen=True)
class Mixture:
    """The examples of each source and, where sources are weighted, their shares of an epoch."""

    source_B: NDArray[np.int16]
    weights: tuple[float, ...] | None = None

    def epoch(self, epoch: int, seed: int) -> Indices:
        """Shuffled example indices of one epoch.

        Without weights every example appears once. With weights the epoch is as long as all sources together, and each
        source fills its share, going through its own rows in shuffled passes that continue from epoch to epoch: no row
        appears twice before every row of its source has appeared once.
        """
        if self.weights is None:
            order = np.arange(len(self.source_B), dtype=np.int64)
        else:
            order = np.concatenate([self._draw(s, quota, epoch, seed) for s, quota in enumerate(self.quotas())])
        return np.random.default_rng([seed, epoch, 1]).permutation(order)

    def quotas(self) -> list[int]:
        """Rows of each source in an epoch of a weighted mixture, by largest remainder so that they add up."""
        assert self.weights is not None
        shares = np.array(self.weights) / sum(self.weights) * len(self.source_B)
        quotas = np.floor(shares).astype(int)
        for index in np.argsort(quotas - shares, kind="stable")[: len(self.source_B) - quotas.sum()]:
            quotas[index] += 1
        return quotas.tolist()

    def _draw(self, source: int, quota: int, epoch: int, seed: int) -> Indices:
        rows = np.flatnonzero(self.source_B == source)
        if quota == 0 or len(rows) == 0:
            return np.empty(0, dtype=np.int64)
        first, last = epoch * quota, (epoch + 1) * quota
        passes = range(first // len(rows), (last - 1) // len(rows) + 1)
        drawn = np.concatenate([np.random.default_rng([seed, source, p, 2]).permutation(rows) for p in passes])
        offset = passes.start * len(rows)
        return drawn[first - offset : last - offset].astype(np.int64)


def pack(order: Indices, length_B: NDArray[np.int64], capacity: int) -> list[Pack]:
    """Best-fit decreasing bin packing within windows of the given order.

    Args:
        order: example indices.
        length_B: tokens of every example.
        capacity: tokens of a row.

    Returns:
        Packs whose lengths sum to at most `capacity`; each index of `order` in exactly one.

    Source:
        Johnson 1974; the fill is within 22 % of the optimum at worst and within a few per cent on text.
    """
    packs: list[Pack] = []
    for start in range(0, len(order), _WINDOW):
        window = order[start : start + _WINDOW]
        by_length = window[np.argsort(-length_B[window], kind="stable")]
        bins: list[list[int]] = []
        room: list[tuple[int, int]] = []  # (tokens left, bin), sorted
        for index, length in zip(by_length.tolist(), length_B[by_length].tolist(), strict=True):
            assert length <= capacity, f"example {index} has {length} tokens, a row {capacity}"
            at = bisect_left(room, (length, -1))
            if at < len(room):
                left, bin_ = room.pop(at)
                bins[bin_].append(index)
            else:
                left, bin_ = capacity, len(bins)
                bins.append([index])
            if left > length:
                insort(room, (left - length, bin_))
        packs += [tuple(bin_) for bin_ in bins]
    return packs


@dataclass(frozen=True)
class StepPlan:
    """The micro-batches of one optimizer step.

    Attributes:
        epoch: which epoch the step belongs to, from 0.
        packs: the packs of the step, at most `accumulation x world x rows`, in global order.
    """

    epoch: int
    packs: tuple[Pack, ...]

    def micro_batch(self, micro: int, rank: int, world: int, rows: int) -> tuple[Pack, ...]:
        """Packs of one worker in one accumulation step; empty when a short last step has none left for it."""
        first = (micro * world + rank) * rows
        return self.packs[first : first + rows]


@dataclass(frozen=True)
class BatchPlan:
    """All optimizer steps of a run.

    Args:
        length_B: tokens of every training example.
        mixture: sources and weights.
        capacity: tokens of a packed row; None gives each example a row of its own.
        rows_per_step: rows of a global batch, `workers x per-device rows x accumulation`.
        seed: seed of the order.
    """

    length_B: NDArray[np.int64]
    mixture: Mixture
    capacity: int | None
    rows_per_step: int
    seed: int

    @staticmethod
    def of(recipe: Recipe, data: Prepared, world: int) -> BatchPlan:
        """The plan of a recipe on `world` workers.

        Raises:
            RecipeError: a source's weight is too small for one row an epoch.
        """
        weights = tuple(source.weight for source in recipe.data.train if source.weight is not None)
        mixture = Mixture(data.train.source, weights or None)
        if weights and 0 in mixture.quotas():
            source = recipe.data.train[mixture.quotas().index(0)]
            raise RecipeError(
                f"data.train: weight {source.weight} of {source.path} is less than one of {len(data.train):,} rows an epoch",
                "Give it a larger weight, or take the source out.",
            )
        return BatchPlan(
            length_B=data.train.lengths,
            mixture=mixture,
            capacity=data.report.max_length if recipe.data.packing else None,
            rows_per_step=world * recipe.train.rows * recipe.train.gradient_accumulation_steps,
            seed=recipe.train.seed,
        )

    def __hash__(self) -> int:
        return id(self)

    @lru_cache(maxsize=4)  # noqa: B019 - a plan lives as long as the run
    def epoch_packs(self, epoch: int) -> list[Pack]:
        """The packs of an epoch in the order they are trained."""
        order = self.mixture.epoch(epoch, self.seed)
        if self.capacity is None:
            return [(int(index),) for index in order]
        packs = pack(order, self.length_B, self.capacity)
        shuffled = np.random.default_rng([self.seed, epoch, 3]).permutation(len(packs))
        return [packs[index] for index in shuffled]

    @lru_cache(maxsize=100_000)  # noqa: B019 - one number an epoch
    def steps_in_epoch(self, epoch: int) -> int:
        """Optimizer steps of an epoch; the last may hold fewer rows than the others."""
        return -(-len(self.epoch_packs(epoch)) // self.rows_per_step)

    def total_steps(self, epochs: float | None, max_steps: int | None) -> int:
        """Steps of the whole run, from `max_steps` or else from (fractional) `epochs`."""
        if max_steps is not None:
            return max_steps
        wanted = 1.0 if epochs is None else epochs
        whole = int(wanted)
        steps = sum(self.steps_in_epoch(epoch) for epoch in range(whole))
        if wanted > whole:
            steps += max(1, round(self.steps_in_epoch(whole) * (wanted - whole)))
        return steps

    def step(self, index: int) -> StepPlan:
        """The plan of optimizer step `index`, counted from 0."""
        epoch, within = 0, index
        while within >= self.steps_in_epoch(epoch):
            within -= self.steps_in_epoch(epoch)
            epoch += 1
        first = within * self.rows_per_step
        return StepPlan(epoch, tuple(self.epoch_packs(epoch)[first : first + self.rows_per_step]))

    def longest(self, total_steps: int, rows: int) -> tuple[Pack, ...]:
        """The packs of the micro-batch with most tokens in all epochs that these steps touch.

        Args:
            rows: of a micro-batch.
        """
        chosen: tuple[int, tuple[Pack, ...]] = (-1, ())
        for epoch in range(self.step(total_steps - 1).epoch + 1):
            packs = self.epoch_packs(epoch)
            tokens = np.array([self.length_B[list(pack)].sum() for pack in packs])
            tokens = np.add.reduceat(tokens, np.arange(0, len(tokens), rows))
            first = int(tokens.argmax())
            chosen = max(chosen, (int(tokens[first]), tuple(packs[first * rows : (first + 1) * rows])))
        return chosen[1]

    def is_epoch_end(self, index: int) -> bool:
        """Whether step `index` is the last of its epoch."""
        return self.step(index).epoch != self.step(index + 1).epoch
