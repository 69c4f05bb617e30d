"""What `tunesmith plan` answers and the launcher trusts: one function, so that both say the same."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tunesmith.cluster.errors import PlanError, ResourceError, TunesmithError
from tunesmith.cluster.fleet import GIB, Fleet
from tunesmith.cluster.recipe.schema import Recipe
from tunesmith.trainers.memory.choose import Alternative, Choice, alternatives, begin_ahead, changed, choose
from tunesmith.trainers.memory.geometry import Geometry
from tunesmith.trainers.memory.predict import Planner, Prediction
from tunesmith.trainers.memory.roofline import Disk, RunTime, disk, run_time
from tunesmith.trainers.memory.shard import MOMENTS
from tunesmith.trainers.models import quiet_libraries

BYTES_A_TOKEN = 4
"""Of English text, with the vocabularies of today."""


@dataclass(frozen=True)
class Plan:
    """What a recipe needs on a fleet.

    Attributes:
        recipe: without any `auto`.
        chosen: what was taken for each `auto`.
        alternatives: changes that fit, the cheapest first; empty when it fits as it is.
        steps: optimizer steps, and how they are known; None when nothing says how many.
    """

    model: Geometry
    fleet: Fleet
    as_hf: bool
    recipe: Recipe
    chosen: dict[str, Any]
    prediction: Prediction
    alternatives: list[Alternative]
    length: int
    steps: int | None = None
    steps_from: str = ""
    run: RunTime | None = None
    disk: Disk = field(default_factory=lambda: Disk(0, 0, 0))

    def as_json(self) -> dict[str, Any]:
        """One object of plain numbers; memory in GiB for each GPU, time in seconds."""
        prediction, time = self.prediction, self.prediction.time
        return {
            "fits": prediction.fits,
            "allocated_gib": gib(prediction.allocated),
            "overhead_gib": gib(prediction.overhead.total()),
            "total_gib": gib(prediction.total),
            "capacity_gib": gib(prediction.capacity),
            "gpus": prediction.workers,
            "parts": {cause: gib(size) for cause, size in prediction.parts.most_common()}
            | {"overhead": gib(prediction.overhead.total())},
            "overhead_parts": {cause: gib(size) for cause, size in prediction.overhead.items()},
            "worst_moment": prediction.worst,
            "alternatives": [_alternative_json(one) for one in self.alternatives],
            "model": self.model.name,
            "fleet": self.fleet.name,
            "as": "hf" if self.as_hf else "tunesmith",
            "chosen": self.chosen,
            "parameters": prediction.parameters,
            "trainable": prediction.trainable,
            "step_seconds": time.seconds,
            "step_seconds_low": time.low,
            "step_seconds_high": time.high,
            "bound_by": time.bound_by,
            "tokens_per_step": prediction.work.tokens * prediction.workers,
            "steps": self.steps,
            "run_seconds": self.run and self.run.seconds,
            "usd": self.run and self.run.usd,
            "usd_low": self.run and self.run.usd_low,
            "usd_high": self.run and self.run.usd_high,
            "checkpoint_gib": gib(self.disk.checkpoint),
            "disk_gib": gib(self.disk.peak),
        }


def make_plan(
    recipe: Recipe,
    model: Geometry,
    fleet: Fleet,
    *,
    as_hf: bool = False,
    max_length: int | None = None,
    settled: dict[str, Any] | None = None,
    alone: bool = False,
) -> Plan:
    """Simulates a recipe on a fleet.

    Args:
        recipe: as written; nothing of it counts as read.
        model: shape of its base.
        as_hf: whether the HF Trainer with PEFT does the work instead of our loop.
        max_length: tokens of a full row when the data is known; None takes what the recipe and the model say.
        settled: choices for `auto` of an earlier start of the same run, which stay.
        alone: whether this process has no other threads, so that copies of it may simulate alternatives.

    Raises:
        ModelError: no such model can be built, or the adaptation does not fit it.
        PlanError: it cannot be simulated: it looks at numbers that only a real run has.
    """
    planner = Planner(model, fleet, as_hf, max_length, alone)
    with quiet_libraries(), simulated(model):
        try:
            begin_ahead(planner, changed(recipe, settled or {}))
            choice = choose(planner, recipe, settled)
            prediction = choice.prediction
            others = [] if prediction.fits else alternatives(planner, choice)
        finally:
            planner.end()
    steps, source = _steps(choice, planner.length(choice.recipe))
    return Plan(
        model,
        fleet,
        as_hf,
        choice.recipe,
        choice.chosen,
        prediction,
        others,
        planner.length(choice.recipe),
        steps,
        source,
        None if steps is None else run_time(prediction.time, steps, fleet),
        disk(
            parameters=prediction.parameters,
            trainable=prediction.trainable,
            whole_model=prediction.whole_model,
            save_total_limit=choice.recipe.train.save_total_limit,
            mixed=prediction.checkpoint_mixed,
            moments=MOMENTS[choice.recipe.train.optimizer],
        ),
    )


@contextmanager
def simulated(model: Geometry) -> Iterator[None]:
    """What a model's own code raises on fake tensors, as our error: nobody can foresee what it asks of them."""
    try:
        yield
    except TunesmithError:
        raise
    except Exception as error:
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise PlanError(
            f"{model.name} cannot be simulated ({type(error).__name__}: {reason})",
            "Its code asks for numbers that only a real run has, or for an operation without a fake kernel.",
        ) from error


def refuse_what_cannot_fit(plan: Plan, when: str = "") -> None:
    """Raises unless the plan fits.

    Args:
        when: begins the message of an elastic run, whose plans are several.

    Raises:
        ResourceError: with the numbers, and the changes that would fit.
    """
    if plan.prediction.fits:
        return
    prediction = plan.prediction
    largest = ", ".join(f"{cause} {gib(size):.1f}" for cause, size in prediction.parts.most_common(3))
    device = "worker" if plan.fleet.gpu.is_cpu else "GPU"
    raise ResourceError(
        f"{when}this recipe needs {gib(prediction.total):.1f} GiB on each {device} and {plan.fleet.name} has "
        f"{gib(prediction.capacity):.1f} ({largest} GiB)",
        "These fit: " + "; ".join(describe(one.changes) for one in plan.alternatives[:4]) + "."
        if plan.alternatives
        else "No change of ZeRO stage, offload, checkpointing, batch size or adaptation makes it fit: take a smaller model.",
    )


def describe(changes: dict[str, Any]) -> str:
    """Changes as a user writes them."""
    words = []
    for key, value in changes.items():
        if key == "gpus":
            words.append(f"{value} GPUs")
        elif key == "adaptation":
            words.append(f"adaptation: {value['kind']}")
        else:
            words.append(f"{key}: {str(value).lower() if isinstance(value, bool) else value}")
    return ", ".join(words)


def gib(size: float) -> float:
    """Bytes in GiB, to a thousandth."""
    return round(size / GIB, 3)


def _steps(choice: Choice, length: int) -> tuple[int | None, str]:
    """Optimizer steps of the run, and where the number is from."""
    train = choice.recipe.train
    if train.max_steps is not None:
        return train.max_steps, "train.max_steps"
    sizes = [_size(source.path) for source in choice.recipe.data.train]
    if None in sizes or not sizes:
        return None, ""
    tokens = sum(size for size in sizes if size is not None) / BYTES_A_TOKEN * (train.epochs or 1)
    a_step = choice.prediction.work.tokens * choice.prediction.workers
    return max(1, round(tokens / a_step)), f"the data's size, at {BYTES_A_TOKEN} bytes a token"


def _size(path: str) -> int | None:
    """Bytes of a local file, or of all files of a folder; None for anything else."""
    local = Path(path).expanduser()
    if local.is_file():
        return local.stat().st_size
    if local.is_dir():
        return sum(file.stat().st_size for file in local.rglob("*") if file.is_file())
    return None


def _alternative_json(one: Alternative) -> dict[str, Any]:
    return {
        "changes": one.changes,
        "gpus": one.gpus,
        "total_gib": gib(one.prediction.total),
        "allocated_gib": gib(one.prediction.allocated),
        "step_seconds": one.prediction.time.seconds,
        "gpu_seconds_per_million_tokens": one.gpu_seconds,
        "cost_ratio": round(one.costs, 3),
        "host_gib": round(one.host_gib, 1),
    }
