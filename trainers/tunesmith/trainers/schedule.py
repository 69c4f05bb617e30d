"""The learning rate and the dropout of a step as pure functions of its number, so that a resumed run needs no state of them."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np

from tunesmith.cluster.recipe.schema import Train


@dataclass(frozen=True)
class Schedule:
    """Linear warm-up to `peak`, then constant, or down to 0 at `total_steps` (linear or half a cosine).

    After the warm-up it equals the `get_*_schedule_with_warmup` functions of Transformers, step for step. Theirs begin
    the warm-up with a step at rate 0, which trains nothing; ours takes the steps `1/(w+1), …, w/(w+1)` of the peak.
    """

    peak: float
    total_steps: int
    warmup_steps: int
    kind: Literal["cosine", "linear", "constant"]

    @staticmethod
    def of(train: Train, total_steps: int) -> Schedule:
        """The schedule that the recipe's `train` section asks for."""
        if train.warmup_steps is not None:
            warmup = train.warmup_steps
        else:
            ratio = 0.03 if train.warmup_ratio is None else train.warmup_ratio
            warmup = math.ceil(ratio * total_steps)
        return Schedule(train.learning_rate, total_steps, warmup, train.lr_scheduler_type)

    def learning_rate(self, step: int) -> float:
        """The rate that optimizer step `step`, counted from 0, uses."""
        if step < self.warmup_steps:
            return self.peak * (step + 1) / (self.warmup_steps + 1)
        if self.kind == "constant":
            return self.peak
        progress = (step - self.warmup_steps) / max(1, self.total_steps - self.warmup_steps)
        if self.kind == "linear":
            return self.peak * max(0.0, 1.0 - progress)
        return self.peak * max(0.0, 0.5 * (1.0 + math.cos(math.pi * progress)))


def dropout_seed(*numbers: int) -> int:
    """A seed of its own for every micro-batch, so that dropout needs no state in a checkpoint."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0] >> 1)
