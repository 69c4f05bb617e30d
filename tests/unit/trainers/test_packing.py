"""The batch plan: every row once an epoch, full rows, and the same global batches for every world size."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest

from tunesmith.trainers.packing import BatchPlan, Mixture, pack


def _plan(
    count: int = 500, rows_per_step: int = 4, capacity: int | None = 64, weights=None, sources: int = 1
) -> BatchPlan:
    rng = np.random.default_rng(0)
    lengths = rng.integers(3, 64, size=count)
    source = (np.arange(count) % sources).astype(np.int16)
    return BatchPlan(lengths, Mixture(source, weights), capacity, rows_per_step, seed=7)


def test_every_example_is_in_one_pack_and_no_pack_overflows() -> None:
    lengths = np.random.default_rng(1).integers(1, 100, size=40_000)
    packs = pack(np.arange(40_000), lengths, 100)
    assert sorted(index for one in packs for index in one) == list(range(40_000))
    assert max(int(lengths[list(one)].sum()) for one in packs) <= 100
    assert lengths.sum() / (len(packs) * 100) > 0.97


def test_an_example_longer_than_a_row_is_our_mistake() -> None:
    with pytest.raises(AssertionError, match="example 0 has 11 tokens, a row 10"):
        pack(np.array([0]), np.array([11]), 10)


@pytest.mark.parametrize("capacity", [64, None])
def test_every_example_is_trained_once_an_epoch(capacity: int | None) -> None:
    plan = _plan(capacity=capacity)
    for epoch in range(2):
        seen = [
            i
            for step in range(plan.total_steps(3, None))
            if plan.step(step).epoch == epoch
            for p in plan.step(step).packs
            for i in p
        ]
        assert sorted(seen) == list(range(500))


def test_epochs_come_in_different_order() -> None:
    plan = _plan()
    assert plan.epoch_packs(0) != plan.epoch_packs(1)
    assert plan.epoch_packs(0) == _plan().epoch_packs(0)


@pytest.mark.parametrize(("world", "accumulation"), [(1, 4), (2, 2), (4, 1), (2, 1)])
def test_workers_split_the_same_global_batch(world: int, accumulation: int) -> None:
    plan = _plan()
    rows = 4 // (world * accumulation)
    for index in range(plan.total_steps(1, None)):
        step = plan.step(index)
        split = [
            p
            for micro in range(accumulation)
            for rank in range(world)
            for p in step.micro_batch(micro, rank, world, rows)
        ]
        assert tuple(split) == step.packs


def test_steps_and_fractional_epochs() -> None:
    plan = _plan(count=100, capacity=None)
    assert plan.total_steps(None, None) == 25
    assert plan.total_steps(2, None) == 50
    assert plan.total_steps(1.2, None) == 30
    assert plan.total_steps(None, 7) == 7
    assert [plan.is_epoch_end(index) for index in (23, 24, 25)] == [False, True, False]


def test_the_last_step_of_an_epoch_may_be_short_and_leaves_workers_without_rows() -> None:
    plan = _plan(count=5, capacity=None)
    assert [len(plan.step(index).packs) for index in range(3)] == [4, 1, 4]
    assert plan.step(1).micro_batch(0, 1, world=2, rows=1) == ()


def test_weights_give_shares_and_no_row_comes_twice_before_all_came_once() -> None:
    plan = _plan(count=300, capacity=None, weights=(9.0, 1.0), sources=2)
    source_of = plan.mixture.source_B
    drawn = [index for epoch in range(5) for (index,) in plan.epoch_packs(epoch)]
    first_epoch = Counter(int(source_of[index]) for index in drawn[:300])
    assert first_epoch == {0: 270, 1: 30}
    # source 1 has 150 rows and gives 30 an epoch: five epochs are exactly one pass
    assert sorted(i for i in drawn if source_of[i] == 1) == np.flatnonzero(source_of == 1).tolist()
    times = Counter(i for i in drawn if source_of[i] == 0)
    assert set(times.values()) == {9}
