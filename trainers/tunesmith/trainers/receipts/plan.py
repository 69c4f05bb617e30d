"""The plan receipt: what each worker's device held in the first steps, beside what the planner says for the same batches.

It never fails a run: a figure that is off is shown, and what cannot be simulated is said.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from pydantic import ValidationError

from tunesmith.cluster.artifacts import PlanReceipt, WorkerMemory
from tunesmith.cluster.base import BaseRef
from tunesmith.cluster.errors import TunesmithError
from tunesmith.cluster.recipe.schema import Recipe
from tunesmith.cluster.storage import write_atomic
from tunesmith.trainers.memory.measure import StepMeter
from tunesmith.trainers.memory.simulate import Shape
from tunesmith.trainers.memory.tracker import Bytes
from tunesmith.trainers.ranks import gather, on_first

MOST_SHAPES = 8
"""Shapes of micro-batches that are simulated, the largest first; each takes a second or two."""
UNPREDICTABLE = (
    TunesmithError, RuntimeError, TypeError, ValueError, AttributeError, LookupError, AssertionError, ImportError, OSError,
)  # fmt: skip
"""What a simulation raises for an architecture that it cannot follow: fake tensors' own errors are RuntimeErrors, and
code that meets a config or module it does not know fails in the other ways."""


class _Seen(NamedTuple):
    """What one worker has measured."""

    causes: Bytes
    shape: Shape


def write_plan_receipt(folder: Path, recipe: Recipe, base: BaseRef, meter: StepMeter) -> PlanReceipt:
    """Writes plan.json into `folder` and returns it. Collective; rank 0 alone simulates.

    When this attempt has trained nothing, what an earlier one has measured is kept.

    Raises:
        StorageError: the file cannot be written.
    """
    seen = gather(None if meter.shape is None else _Seen(meter.causes, meter.shape))
    path = folder / "plan.json"

    def write() -> PlanReceipt:
        measured = [worker for worker in seen if worker is not None]
        if not measured and (earlier := read_plan_receipt(path)) is not None:
            return earlier
        receipt = compare(measured, meter, lambda shape: _expected(recipe, base, shape, len(seen), meter.device))
        folder.mkdir(parents=True, exist_ok=True)
        write_atomic(path, receipt.model_dump_json(indent=1))
        return receipt

    return on_first(write)


def read_plan_receipt(path: Path) -> PlanReceipt | None:
    """A receipt that was written; None when there is none that can be read."""
    try:
        return PlanReceipt.model_validate_json(path.read_bytes())
    except (OSError, ValidationError):
        return None


def compare(measured: list[_Seen], meter: StepMeter, expect: Callable[[Shape], Bytes]) -> PlanReceipt:
    """The receipt of what the workers have measured, in order of rank.

    Args:
        expect: the planner's bytes by cause for a shape.
    """
    if not measured:
        return PlanReceipt(problem="no step was trained, so nothing was measured")
    problem, expected = "", {}
    shapes = sorted({worker.shape for worker in measured}, key=lambda shape: (shape.tokens, shape.labels), reverse=True)
    try:
        for shape in shapes[:MOST_SHAPES]:
            expected[shape] = expect(shape)
    except UNPREDICTABLE as error:
        problem = f"the planner cannot simulate this run: {type(error).__name__}: {' '.join(str(error).split())[:300]}"
    workers = [
        WorkerMemory(
            rank=rank,
            tokens=worker.shape.tokens,
            labels=worker.shape.labels,
            measured_bytes=worker.causes.total(),
            measured=_nonzero(worker.causes),
            predicted_bytes=expected[worker.shape].total() if worker.shape in expected else None,
            predicted=_nonzero(expected.get(worker.shape, {})),
        )
        for rank, worker in enumerate(measured)
    ]
    errors = [abs(worker.error) for worker in workers if worker.error is not None]
    return PlanReceipt(
        problem=problem,
        within=max(errors, default=None),
        device=meter.device.type,
        steps=meter.steps,
        workers=workers,
    )


def _expected(recipe: Recipe, base: BaseRef, shape: Shape, workers: int, device: torch.device) -> Bytes:
    from tunesmith.trainers.memory.expect import expected_peak

    config = json.loads((Path(base.path) / "config.json").read_text(encoding="utf-8"))
    return expected_peak(recipe, config, shape, workers, on_gpu=device.type == "cuda")


def _nonzero(causes: Bytes | dict[str, int]) -> dict[str, int]:
    return {cause: int(size) for cause, size in sorted(causes.items()) if size}
