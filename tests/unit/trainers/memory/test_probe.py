"""The probe's pure parts: which batch is the largest, and what is said when it does not fit."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tunesmith.cluster.errors import OutOfMemoryError, UsageError
from tunesmith.trainers.memory.probe import out_of_memory, translated
from tunesmith.trainers.packing import BatchPlan, Mixture

SAID = (
    "CUDA out of memory. Tried to allocate 1.50 GiB. GPU 0 has a total capacity of 22.00 GiB of which 1.00 GiB is free."
)


def test_what_does_not_fit_is_said_with_numbers() -> None:
    error = out_of_memory("a micro-batch of 4,096 tokens", SAID, 20 << 30, 1 << 30, 22 << 30)
    assert isinstance(error, UsageError)
    assert error.what == (
        "a micro-batch of 4,096 tokens does not fit: Tried to allocate 1.50 GiB; tensors hold 20.00 GiB, "
        "1.00 of 22.00 GiB are free. No step was done."
    )
    assert "train.per_device_train_batch_size" in error.fix


def test_a_failed_allocation_becomes_our_error() -> None:
    with (
        pytest.raises(OutOfMemoryError, match="this batch does not fit"),
        translated("this batch", torch.device("cpu")),
    ):
        raise torch.OutOfMemoryError(SAID)
    with pytest.raises(RuntimeError, match="else"), translated("this batch", torch.device("cpu")):
        raise RuntimeError("something else")


@pytest.mark.parametrize("capacity", [None, 64])
@pytest.mark.parametrize("rows", [1, 3])
def test_the_longest_micro_batch_is_the_longest_of_all_steps(capacity: int | None, rows: int) -> None:
    length_B = np.random.default_rng(0).integers(3, 60, 101)
    world, accumulation, total = 2, 2, 45
    plan = BatchPlan(
        length_B=length_B,
        mixture=Mixture(np.zeros(101, dtype=np.int16)),
        capacity=capacity,
        rows_per_step=world * rows * accumulation,
        seed=3,
    )
    batches = [
        plan.step(index).micro_batch(micro, rank, world, rows)
        for index in range(total)
        for micro in range(accumulation)
        for rank in range(world)
    ]
    tokens = [sum(int(length_B[list(pack)].sum()) for pack in packs) for packs in batches]
    longest = plan.longest(total, rows)
    # the last epoch may end before its longest one
    assert sum(int(length_B[list(pack)].sum()) for pack in longest) >= max(tokens)
    assert any(set(longest) == set(packs) for packs in batches) or plan.step(total - 1).epoch > 0
