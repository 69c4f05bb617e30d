"""Trials that are Ray Train runs of their own, of any size; started from a trial's own process."""

from __future__ import annotations

import contextlib
import math
import shutil
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import ray

from tunesmith.cluster.errors import StoppedError, TunesmithError, WorkerError
from tunesmith.cluster.metrics import read_metrics
from tunesmith.cluster.recipe.schema import Recipe
from tunesmith.cluster.runs import RunFolder
from tunesmith.trainers.data.prepare import prepare
from tunesmith.trainers.models import resolve_base
from tunesmith.trainers.packing import BatchPlan
from tunesmith.tuning.members import Progress, as_long_as, figures_of
from tunesmith.tuning.space import recipe_of

POLL_S = 0.2
ALL_CHECKPOINTS = 1_000_000


class Places:
    """An actor that lets so many trials be trained at once; the others wait for their turn."""

    def __init__(self, count: int) -> None:
        self._free = threading.Semaphore(count)

    def take(self) -> None:
        """Returns when there is a place."""
        self._free.acquire()

    def give(self) -> None:
        """Gives a place back."""
        self._free.release()


@dataclass(frozen=True)
class Isolated:
    """How trials are trained by workers of their own.

    Attributes:
        places: name of the `Places` actor.
        namespace: Ray's, in which it is named.
        reports: most reports of a whole trial.
        cache: folder of tokenised data sets.
        address: of the cluster; None for a Ray of our own.
        keeps_all: whether all checkpoints of a trial are kept, for others to take.
    """

    places: str
    namespace: str
    reports: int
    cache: Path
    address: str | None
    keeps_all: bool = False

    def members(self, key: str) -> Runs:
        """The runs of a trial's seeds."""
        return Runs(self)


class Runs:
    """The runs of one trial, one for each seed, in threads of the trial's process."""

    def __init__(self, training: Isolated) -> None:
        self._training = training
        self._runs: list[_Run] = []
        self._places: Any = None

    def open(self, recipes: list[Recipe], runs: list[Path], step: int, sources: list[Path] | None) -> None:
        """Waits for a place and starts the runs, which go on from what they have."""
        self._places = ray.get_actor(self._training.places, self._training.namespace)
        ray.get(self._places.take.remote())
        length: int | None = None
        for index, (recipe, root) in enumerate(zip(recipes, runs, strict=True)):
            source = sources[index] if sources else None
            run = _Run(self._training, as_long_as(length, recipe), root, step, source)
            length = run.total_steps
            self._runs.append(run)
            run.start()

    def next(self) -> list[Progress]:
        """The next report of each run. A run does not wait for its caller: it is stopped when it is no longer wanted."""
        return [run.progress() for run in self._runs]

    def close(self) -> None:
        """Stops the runs, which save first, and gives the place back."""
        while alive := [run for run in self._runs if run.is_alive()]:
            for run in alive:  # again and again: a run that is only beginning drops what was asked before
                run.folder.request_stop()
            alive[0].join(POLL_S)
        self._runs = []
        if self._places is not None:
            ray.get(self._places.give.remote())
            self._places = None


class _Run(threading.Thread):
    """`tunesmith train` of one seed, and its metrics as they come."""

    def __init__(self, training: Isolated, recipe: Recipe, root: Path, step: int, source: Path | None) -> None:
        super().__init__(name=f"run-{root.name}", daemon=True)
        self.folder = RunFolder(root)
        self.step, self.failure = step, None
        self._source = source
        self.recipe, self.every, self.total_steps = as_run(training, recipe, root)

    def run(self) -> None:
        from tunesmith.trainers import launch

        try:
            if self._source is not None and self.step and not self.folder.has_checkpoint():
                self._adopt(self._source)
            launch.run(self.recipe)
        except StoppedError:
            return
        except TunesmithError as failure:
            self.failure: Exception | None = failure
        except Exception as failure:  # noqa: BLE001 - handed to whoever waits for the next report
            self.failure = WorkerError(f"{type(failure).__name__}: {failure}")

    def progress(self) -> Progress:
        """Waits for the next report.

        Raises:
            TunesmithError: what ended the run before it.
        """
        goal = min(self.total_steps, (self.step // self.every + 1) * self.every)
        while True:
            alive = self.is_alive()
            lines = read_metrics(self.folder.metrics)
            done = [line for line in lines if self.step < line["step"] <= goal and "loss" in line]
            evaluated = done and (done[-1].get("eval_loss") is not None or not self._evaluates())
            if (
                evaluated and done[-1]["step"] == goal and self.folder.newest_step() >= goal
            ):  # saved, so others may take it
                self.step = goal
                return Progress(goal, self.total_steps, sum(line["tokens"] for line in done), figures_of(done))
            if not alive:
                raise self.failure or WorkerError(f"the run in {self.folder.root} ended before step {goal}")
            time.sleep(POLL_S)

    def _evaluates(self) -> bool:
        return self.recipe.train.eval_steps is not None

    def _adopt(self, source: Path) -> None:
        """Takes another run's checkpoint of the step as its own."""
        name = f"step-{self.step:08d}"
        self.folder.create()
        part = self.folder.checkpoints / f"{name}.part"
        shutil.rmtree(part, ignore_errors=True)
        shutil.copytree(source / "checkpoints" / name, part)
        part.rename(self.folder.checkpoints / name)


class AsRun(NamedTuple):
    """A trial's recipe as a run that evaluates and saves at each report.

    Attributes:
        every: optimizer steps between two reports.
        total_steps: of the whole trial.
    """

    recipe: Recipe
    every: int
    total_steps: int


def as_run(training: Isolated, recipe: Recipe, root: Path) -> AsRun:
    """What is trained in the folder `root`."""
    quiet = recipe.model_copy(deep=True)
    runs = training.cache.parent.parent
    base = resolve_base(quiet.model.base, quiet.model.revision, runs)
    data = prepare(quiet, base, training.cache)
    plan = BatchPlan.of(quiet, data, quiet.cluster.most_workers)
    total = plan.total_steps(quiet.train.epochs, quiet.train.max_steps)
    every = math.ceil(total / training.reports)
    changes: dict[str, Any] = {"train.save_steps": every, "output.dir": str(root.parent), "output.report_to": []}
    if len(data.validation):
        changes["train.eval_steps"] = every
    if training.keeps_all:
        changes["train.save_total_limit"] = ALL_CHECKPOINTS
    if training.address is not None:
        changes["cluster.address"] = training.address
    return AsRun(recipe_of(recipe.model_copy(update={"name": root.name}), changes), every, total)


@contextlib.contextmanager
def places(count: int, name: str, namespace: str) -> Iterator[str]:
    """The actor that counts places, while it is needed; yields its name."""
    actor = ray.remote(Places).options(name=name, namespace=namespace, num_cpus=0, max_concurrency=1000).remote(count)
    try:
        yield name
    finally:
        ray.kill(actor)  # pyright: ignore[reportArgumentType]
