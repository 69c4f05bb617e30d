"""The learning rate equals Transformers' schedules, step for step."""

from __future__ import annotations

import pytest
import torch
from transformers import get_scheduler

from tunesmith.cluster.recipe.schema import Train
from tunesmith.trainers.schedule import Schedule


@pytest.mark.parametrize("kind", ["cosine", "linear", "constant"])
@pytest.mark.parametrize("warmup", [0, 5])
def test_equals_transformers(kind: str, warmup: int) -> None:
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=0.3)
    theirs = get_scheduler("constant_with_warmup" if kind == "constant" else kind, optimizer, warmup, 20)
    ours = Schedule.of(Train(learning_rate=0.3, lr_scheduler_type=kind, warmup_steps=warmup), 20)  # type: ignore[arg-type]
    for step in range(20):
        assert ours.learning_rate(step) == pytest.approx(optimizer.param_groups[0]["lr"], abs=1e-12)
        optimizer.step()
        theirs.step()


def test_warmup_ratio_is_a_share_of_all_steps() -> None:
    assert Schedule.of(Train(warmup_ratio=0.1), 45).warmup_steps == 5
    assert Schedule.of(Train(), 100).warmup_steps == 3
