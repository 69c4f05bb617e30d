"""Objectives: pure functions from log-probabilities and a batch to a loss and its metrics.

Adding one is a function in a module of its own, a line in `OBJECTIVES`, and a test against an oracle. They import torch alone.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from torch import Tensor

from tunesmith.trainers.objectives.likelihood import negative_log_likelihood

if TYPE_CHECKING:
    from tunesmith.trainers.batch import Batch

Objective = Callable[[Tensor, "Batch"], tuple[Tensor, dict[str, Tensor]]]

OBJECTIVES: dict[str, Objective] = {
    "cpt": negative_log_likelihood,  # every token is a label
    "sft": negative_log_likelihood,  # the assistant's tokens are labels
}
