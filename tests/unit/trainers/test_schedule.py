"""The learning rate equals Transformers' schedules after the warm-up, and no step is spent at rate 0."""

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
        if step >= warmup:
            assert ours.learning_rate(step) == pytest.approx(optimizer.param_groups[0]["lr"], abs=1e-12)
        optimizer.step()
        theirs.step()


def test_the_warmup_rises_evenly_and_trains_from_the_first_step() -> None:
    schedule = Schedule.of(Train(learning_rate=0.4, warmup_steps=3), 10)
    assert [schedule.learning_rate(step) for step in range(4)] == pytest.approx([0.1, 0.2, 0.3, 0.4])
    assert Schedule.of(Train(learning_rate=0.4), 1).learning_rate(0) == pytest.approx(0.2)


def test_warmup_ratio_is_a_share_of_all_steps() -> None:
    assert Schedule.of(Train(warmup_ratio=0.1), 45).warmup_steps == 5
    assert Schedule.of(Train(), 100).warmup_steps == 3
