"""The held-out loss. Collective: every worker scores its share of the rows."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from tunesmith.cluster.recipe.schema import Recipe
from tunesmith.trainers.batch import Batch, collate, idle
from tunesmith.trainers.data.prepare import Prepared
from tunesmith.trainers.data.tokens import TokenStore
from tunesmith.trainers.packing import pack
from tunesmith.trainers.policy import sum_negative_logps


class HeldOut:
    """Validation rows, cut into micro-batches once.

    Args:
        store: tokenised validation examples.
        capacity: tokens of a micro-batch.
        max_rows: most examples read; None reads all.
    """

    def __init__(self, store: TokenStore, capacity: int, max_rows: int | None) -> None:
        self.store = store
        indices = np.flatnonzero(store.trained_counts > 0)[:max_rows]
        self.packs = pack(indices, store.lengths, capacity)

    @staticmethod
    def of(recipe: Recipe, data: Prepared) -> HeldOut | None:
        """The recipe's validation rows; None when there are none."""
        if len(data.validation) == 0:
            return None
        capacity = data.report.max_length * recipe.train.rows
        return HeldOut(data.validation, capacity, recipe.eval.max_rows)

    def longest(self) -> Batch:
        """The batch with most tokens."""
        return collate(self.store, [max(self.packs, key=lambda pack: self.store.lengths[list(pack)].sum())], 1.0)

    def loss(self, engine: Any, device: torch.device, moved: Callable[[], None]) -> float:
        """Mean negative log-probability of the labels, in nats a token; calls `moved` after each batch."""
        rank, world = dist.get_rank(), dist.get_world_size()
        total = torch.zeros(2, dtype=torch.float64, device=device)
        engine.eval()
        for first in range(0, len(self.packs), world):
            mine = first + rank
            batch = collate(self.store, [self.packs[min(mine, len(self.packs) - 1)]], 1.0)
            batch = (batch if mine < len(self.packs) else idle(batch)).to(device)
            total += torch.stack(sum_negative_logps(engine, batch)).double()
            moved()
        engine.train()
        dist.all_reduce(total)
        return (total[0] / total[1]).item()
