"""Trials that are trained side by side by shared workers, from a trial's own process. Imports no torch."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import RayActorError, RayTaskError

from tunesmith.cluster.errors import TunesmithError, WorkerError
from tunesmith.cluster.recipe.schema import Recipe
from tunesmith.tuning.members import Progress, as_long_as


@dataclass(frozen=True)
class Fused:
    """Shared workers by name.

    Attributes:
        workers: names of the actors.
        namespace: Ray's, in which they are named.
        reports: most reports of a whole trial.
    """

    workers: tuple[str, ...]
    namespace: str
    reports: int

    def members(self, key: str) -> FusedMembers:
        """A trial's seeds on the worker that has most room."""
        return FusedMembers(self, key)


class FusedMembers:
    """The seeds of one trial on one shared worker."""

    def __init__(self, training: Fused, key: str) -> None:
        self._training, self._key = training, key
        self._worker: Any = None
        self._keys: list[str] = []

    def open(self, recipes: list[Recipe], runs: list[Path], step: int, sources: list[Path] | None) -> None:
        """Brings each seed to the worker."""
        workers = list(_alive(self._training))
        if not workers:
            raise WorkerError("every shared worker is lost for good", "Look at log.txt in the sweep's folder.")
        loads = answers([worker.load.remote() for worker in workers]) if len(workers) > 1 else [0]
        self._worker = workers[loads.index(min(loads))]
        self._keys = [f"{self._key}-{index}" for index in range(len(runs))]
        length: int | None = None
        for index, (key, recipe, run) in enumerate(zip(self._keys, recipes, runs, strict=True)):
            written = as_long_as(length, recipe).model_dump(mode="json", exclude_unset=True)
            source = None if sources is None else str(sources[index])
            call = self._worker.open.remote(key, written, str(run), self._training.reports, step, source)
            (length,) = answers([call])

    def next(self) -> list[Progress]:
        """The next report of each seed."""
        return [Progress(**answer) for answer in answers([self._worker.next.remote(key) for key in self._keys])]

    def close(self) -> None:
        """Takes the seeds away; a worker that is gone holds none."""
        try:
            answers([self._worker.close.remote(key) for key in self._keys])
        except WorkerError:
            return


def _alive(training: Fused) -> Iterator[Any]:
    for name in training.workers:
        try:
            yield ray.get_actor(name, training.namespace)
        except ValueError:  # it died more often than Ray may start it again
            continue


def answers(calls: Sequence[Any]) -> list[Any]:
    """What the worker answered.

    Raises:
        WorkerError: its process is gone; Ray starts another.
        TunesmithError: what it raised.
    """
    try:
        return ray.get(list(calls))
    except RayActorError as lost:
        raise WorkerError(f"a shared worker was lost: {str(lost).strip().partition(chr(10))[0]}") from lost
    except RayTaskError as raised:
        cause = raised.cause
        raise (
            cause if isinstance(cause, TunesmithError) else WorkerError(f"a shared worker failed: {cause}")
        ) from raised
