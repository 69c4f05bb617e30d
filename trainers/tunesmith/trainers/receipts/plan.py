"""The plan receipt: what each worker's device held in the first steps, beside what the planner says for the same batches.

No figure fails a run: one that is off is shown, and what cannot be simulated is said.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from pydantic import BaseModel, ValidationError

from tunesmith.cluster.artifacts import PlanReceipt, WorkerMemory
from tunesmith.cluster.base import BaseRef
from tunesmith.cluster.errors import TunesmithError
from tunesmith.cluster.recipe.schema import Recipe
from tunesmith.cluster.storage import write_atomic
from tunesmith.trainers.memory.measure import StepMeter
from tunesmith.trainers.memory.simulate import Shape
from tunesmith.trainers.memory.tracker import Bytes
from tunesmith.trainers.ranks import gather, on_first

M = TypeVar("M", bound=BaseModel)
MOST_SHAPES = 8
"""Shapes of micro-batches that are simulated, the largest first; each takes a second or two."""
UNPREDICTABLE = (
    TunesmithError, RuntimeError, TypeError, ValueError, AttributeError, LookupError, AssertionError, ImportError, OSError,
)  # fmt: skip
"""What a simulation raises for an architecture that it cannot follow: fake tensors' own errors are RuntimeErrors, and
code that meets a config or module it does not know fails in the other ways."""


class Seen(BaseModel):
    """What one worker has measured."""

    causes: dict[str, int]
    """Bytes by cause at the worst moment."""
    lengths: tuple[int, ...]
    labels: int

    @property
    def shape(self) -> Shape:
        """Of the largest micro-batch in the measured steps."""
        return Shape(self.lengths, self.labels)


class Measured(BaseModel):
    """What all workers have measured, in order of rank."""

    device: str
    steps: int
    workers: list[Seen]


def keep_measured(path: Path, meter: StepMeter) -> None:
    """Writes down what the workers have measured so far, for the attempts after this one. Collective.

    Raises:
        StorageError: the file cannot be written.
    """
    assert meter.shape is not None, "a step has been measured"
    seen = gather(Seen(causes=meter.causes, lengths=meter.shape.lengths, labels=meter.shape.labels))
    measured = Measured(device=meter.device.type, steps=meter.steps, workers=seen)

    def write() -> None:
        path.parent.mkdir(exist_ok=True)
        write_atomic(path, measured.model_dump_json())

    on_first(write)


def is_measured(path: Path, meter: StepMeter) -> bool:
    """Whether as many workers on such devices have measured as many of this run's first steps before. Collective."""
    wanted = (meter.device.type, meter.wanted, len(gather(None)))

    def look() -> bool:
        measured = _read(Measured, path)
        return measured is not None and (measured.device, measured.steps, len(measured.workers)) == wanted

    return on_first(look)


def write_plan_receipt(folder: Path, recipe: Recipe, base: BaseRef, measured: Path) -> None:
    """Writes plan.json into `folder`. Collective; rank 0 alone simulates.

    Args:
        measured: what `keep_measured` wrote.

    Raises:
        StorageError: the file cannot be written.
    """

    def write() -> None:
        seen = _read(Measured, measured)
        receipt = PlanReceipt(problem="no step was trained, so nothing was measured")
        if seen is not None:
            receipt = compare(
                seen, lambda shape: _expected(recipe, base, shape, len(seen.workers), seen.device == "cuda")
            )
        folder.mkdir(exist_ok=True)
        write_atomic(folder / "plan.json", receipt.model_dump_json(indent=1))

    on_first(write)


def read_plan_receipt(path: Path) -> PlanReceipt | None:
    """A receipt that was written; None when there is none that can be read."""
    return _read(PlanReceipt, path)


def _read(kind: type[M], path: Path) -> M | None:
    try:
        return kind.model_validate_json(path.read_bytes())
    except (OSError, ValidationError):
        return None


def compare(measured: Measured, expect: Callable[[Shape], Bytes]) -> PlanReceipt:
    """The receipt of what the workers have measured.

    Args:
        expect: the planner's bytes by cause for a shape.
    """
    problem, expected = "", {}
    shapes = {worker.shape for worker in measured.workers}
    try:
        for shape in sorted(shapes, key=lambda shape: (shape.tokens, shape.labels), reverse=True)[:MOST_SHAPES]:
            expected[shape] = expect(shape)
    except UNPREDICTABLE as error:
        problem = f"the planner cannot simulate this run: {type(error).__name__}: {' '.join(str(error).split())[:300]}"
    workers = [
        WorkerMemory(
            rank=rank,
            tokens=worker.shape.tokens,
            labels=worker.labels,
            measured_bytes=sum(worker.causes.values()),
            measured=_nonzero(worker.causes),
            predicted_bytes=expected[worker.shape].total() if worker.shape in expected else None,
            predicted=_nonzero(expected.get(worker.shape, {})),
        )
        for rank, worker in enumerate(measured.workers)
    ]
    errors = [abs(worker.error) for worker in workers if worker.error is not None]
    return PlanReceipt(
        problem=problem,
        within=max(errors, default=None),
        device=measured.device,
        steps=measured.steps,
        workers=workers,
    )


def _expected(recipe: Recipe, base: BaseRef, shape: Shape, workers: int, on_gpu: bool) -> Bytes:
    from tunesmith.trainers.memory.expect import expected_peak

    config = json.loads((Path(base.path) / "config.json").read_text(encoding="utf-8"))
    return expected_peak(recipe, config, shape, workers, on_gpu=on_gpu)


def _nonzero(causes: Bytes | dict[str, int]) -> dict[str, int]:
    return {cause: int(size) for cause, size in sorted(causes.items()) if size}
