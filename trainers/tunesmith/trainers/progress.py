"""What changes from step to step and is not in the weights."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass
class Progress:
    """Saved with each checkpoint.

    Attributes:
        step: optimizer steps done.
        best_loss: lowest held-out loss so far; None before the first.
        evaluations_without_gain: evaluations since the held-out loss last improved.
    """

    step: int = 0
    best_loss: float | None = None
    evaluations_without_gain: int = 0

    def note_evaluation(self, loss: float, min_delta: float) -> bool:
        """Takes in a held-out loss; returns whether it is the lowest so far."""
        best = math.inf if self.best_loss is None else self.best_loss
        self.evaluations_without_gain = 0 if loss < best - min_delta else self.evaluations_without_gain + 1
        self.best_loss = min(loss, best)
        return loss < best
