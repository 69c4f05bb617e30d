"""Those who train the trials of a sweep, from its start to its end. Does not import Ray Tune."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from functools import cached_property
from typing import TYPE_CHECKING, Any
from uuid import uuid4

import ray

from tunesmith.tuning.eligible import lane_length, lanes_for, ranks_of, targets_of, trials_at_once
from tunesmith.tuning.feasible import Feasibility
from tunesmith.tuning.fused.seats import MOST_SEATS, Host
from tunesmith.tuning.fused.shell import Ready, Shell
from tunesmith.tuning.fused.training import Fused, answers
from tunesmith.tuning.isolated import Isolated, places
from tunesmith.tuning.members import Training
from tunesmith.tuning.space import Values, recipe_of, trials_of

if TYPE_CHECKING:
    from tunesmith.tuning.sweep import Ground

NAMESPACE = "tunesmith-sweeps"
ENVIRONMENT = {
    "TORCHDYNAMO_DISABLE": "1",  # as in `switch_off_compiler`
    "OMP_WAIT_POLICY": "PASSIVE",  # threads that spin while they wait slow down tenfold where others want the cores too
}
"""Of a shared worker."""


class Trainers:
    """Workers of each trial's own.

    Attributes:
        training: as the trials' own processes need it.
        concurrent: trials that are trained at once.
        workers: the shared workers, for the winner's model; empty when trials are isolated.
        host: the actor in which the trials sit; None when each has a process of its own.
    """

    workers: Sequence[Any] = ()
    host: Any = None

    def __init__(self, training: Training, concurrent: int, why_not: Callable[[Values], str | None]) -> None:
        self.training, self.concurrent, self._why_not = training, concurrent, why_not

    @property
    def baseline(self) -> float | None:
        """Held-out loss of the base alone; None where it is not known."""
        return None

    def wait(self) -> None:
        """Returns when they can train.

        Raises:
            TunesmithError: they never will.
        """

    def release(self) -> None:
        """Gives the machines back that they hold. They train no more."""

    def why_not(self, values: Values) -> str | None:
        """Why a configuration cannot be tried; None when it can."""
        return self._why_not(values)


class SharedWorkers(Trainers):
    """Workers that hold the base; they load it while Ray Tune starts."""

    def __init__(self, ground: Ground, name: str, workers: Sequence[Any], host: Any, concurrent: int) -> None:
        names = tuple(f"{name}-{index}" for index in range(len(workers)))
        super().__init__(Fused(names, NAMESPACE, ground.tune.reports), concurrent, self._too_large)
        self.workers, self.host, self._recipe = workers, host, ground.recipe
        self._starting = [worker.start.remote() for worker in workers]

    @cached_property
    def _ready(self) -> list[Ready]:
        return answers(self._starting)

    @property
    def baseline(self) -> float | None:
        """Held-out loss of the base alone."""
        return self._ready[0].baseline

    def wait(self) -> None:
        """Returns when every worker has its base."""
        _ = self._ready

    def release(self) -> None:
        """Ends the workers."""
        for actor in (self.host, *self.workers):  # those who ask first
            ray.kill(actor)  # pyright: ignore[reportArgumentType]

    def _too_large(self, values: Values) -> str | None:
        rank: int = recipe_of(self._recipe, values).adaptation.rank  # type: ignore[union-attr]
        narrowest = min(self._ready, key=lambda ready: ready.largest)
        if rank <= narrowest.largest:
            return None
        return (
            narrowest.too_large
            if narrowest.too_large.startswith(f"rank {rank}:")
            else (f"rank {rank} is too large: even {narrowest.too_large}")
        )


@contextlib.contextmanager
def trainers(ground: Ground) -> Iterator[Trainers]:
    """Those who will train: shared workers that hold the base, or a place for each trial's own."""
    if ground.why_isolated is not None:
        count, name = ground.places, f"{ground.recipe.name}-{uuid4().hex[:8]}"
        with places(count, name, NAMESPACE):
            yield _isolated(ground, count, name)
        return
    name = f"{ground.recipe.name}-{uuid4().hex[:8]}"  # of this start: an earlier one's may not be gone yet
    workers, lanes = _shared_workers(ground, name)
    host = ray.remote(Host).options(num_cpus=0, max_concurrency=MOST_SEATS).remote()
    at_once = trials_at_once(lanes * len(workers), trials_of(ground.tune), ground.tune.seeds)
    shared = SharedWorkers(ground, name, workers, host, at_once)
    try:
        yield shared
    finally:
        shared.release()


def _isolated(ground: Ground, count: int, name: str) -> Trainers:
    feasibility = Feasibility(
        ground.base,
        ground.nodes,
        ground.need,
        ground.prepared.max_length,
        lambda values: recipe_of(ground.recipe, values),
    )
    keeps_all = ground.tune.scheduler == "pbt"
    address = None if ground.is_local else "auto"
    training = Isolated(name, NAMESPACE, ground.tune.reports, ground.cache, address, keeps_all)
    return Trainers(training, count, feasibility.why_not)


def _shared_workers(ground: Ground, name: str) -> tuple[list[Any], int]:
    """The shared workers' actors, and the lanes that each is to have."""
    recipe, tune, need = ground.recipe, ground.tune, ground.need
    length = lane_length(recipe, ground.prepared)
    count = ground.shared_workers
    settings = {
        "recipe": recipe_of(recipe, {}).model_dump(mode="json", exclude_unset=True),
        "base": asdict(ground.base),
        "cache": ground.cache,
        "data": ground.prepared.fingerprint,
        "targets": targets_of(recipe, tune),
        "ranks": ranks_of(recipe, tune),
        "length": length,
        "lanes": lanes_for(length, -(-trials_of(tune) // count), tune.seeds, tune.concurrent),
        "seeds": tune.seeds,
        "nodes": tuple(ground.nodes),
        "threads": None if need.gpus else max(1, int(need.cpus)),
        "log": ground.folder.root / "log.txt",
        "keeps_all": tune.scheduler == "pbt",
    }
    options: dict[str, Any] = {
        "namespace": NAMESPACE,
        "num_cpus": 1 if need.gpus else 0,  # its threads are set; the trials' own actors start beside it
        "num_gpus": need.gpus,
        "max_restarts": recipe.train.max_failures,
        "max_concurrency": 4 * settings["lanes"] + 8,
        "runtime_env": {"env_vars": ENVIRONMENT | ({} if need.gpus else {"CUDA_VISIBLE_DEVICES": ""})},
    }
    shell = ray.remote(Shell)
    made = [shell.options(name=f"{name}-{index}", **options).remote(settings) for index in range(count)]
    return made, settings["lanes"]
