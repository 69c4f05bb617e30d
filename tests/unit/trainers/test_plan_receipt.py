"""The plan receipt compares what it can, and says what it cannot."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tunesmith.trainers.memory.measure import StepMeter
from tunesmith.trainers.memory.simulate import Shape
from tunesmith.trainers.memory.tracker import Bytes
from tunesmith.trainers.receipts import plan
from tunesmith.trainers.receipts.plan import Measured, Seen, compare, is_measured, keep_measured

SMALL, LARGE = Shape((10,), 9), Shape((20, 20), 30)


def _seen(shape: Shape, **causes: int) -> Seen:
    return Seen(causes=causes, lengths=shape.lengths, labels=shape.labels)


def _measured(*workers: Seen) -> Measured:
    return Measured(device="cpu", steps=2, workers=list(workers))


def test_each_worker_is_compared_with_its_own_batch() -> None:
    seen = _measured(_seen(SMALL, weights=100), _seen(LARGE, weights=100, buckets=100))
    receipt = compare(seen, lambda shape: Bytes(weights=110 if shape == SMALL else 190))
    assert [worker.predicted_bytes for worker in receipt.workers] == [110, 190]
    assert [worker.error for worker in receipt.workers] == pytest.approx([0.1, -0.05])
    assert receipt.within == pytest.approx(0.1)
    assert receipt.verdict == "within 10.0%"
    assert receipt.workers[1].measured == {"weights": 100, "buckets": 100}


def test_only_the_largest_shapes_are_simulated() -> None:
    asked: list[Shape] = []

    def expect(shape: Shape) -> Bytes:
        asked.append(shape)
        return Bytes(weights=1)

    seen = _measured(*(_seen(Shape((tokens,), 1), weights=1) for tokens in (*range(1, 21), 20)))
    receipt = compare(seen, expect)
    assert [shape.tokens for shape in asked] == list(range(20, 20 - plan.MOST_SHAPES, -1))
    assert [worker.predicted_bytes for worker in receipt.workers] == [None] * 12 + [1] * 9


@pytest.mark.parametrize("error", [RuntimeError("no meta\n kernel"), AttributeError("layers"), AssertionError("none")])
def test_what_cannot_be_simulated_is_said(error: Exception) -> None:
    def expect(_shape: Shape) -> Any:
        raise error

    receipt = compare(_measured(_seen(SMALL, weights=5)), expect)
    assert receipt.within is None
    assert receipt.verdict == "not compared"
    assert type(error).__name__ in receipt.problem
    assert receipt.workers[0].measured_bytes == 5


def test_an_attempt_that_goes_on_measures_only_what_none_before_it_has(tmp_path: Path) -> None:
    path = tmp_path / "control" / "measured.json"
    meter = StepMeter(SimpleNamespace(), torch.device("cpu"))
    assert not is_measured(path, meter)
    meter.causes, meter.shape = Bytes(weights=7), LARGE
    for steps, is_whole in ((1, False), (2, True)):  # a run may be killed after the first
        meter.steps = steps
        keep_measured(path, meter)
        assert is_measured(path, meter) == is_whole
    kept = Measured.model_validate_json(path.read_bytes())
    assert (kept.steps, kept.workers[0].shape, kept.workers[0].causes) == (2, LARGE, {"weights": 7})
    assert not is_measured(path, StepMeter(SimpleNamespace(), torch.device("meta"))), "another kind of device"
    path.write_text("half a fi")
    assert not is_measured(path, meter)
