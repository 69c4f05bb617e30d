"""One attempt: Ray Train's workers from start to end, watched from the driver. Decides nothing."""

from __future__ import annotations

import dataclasses
import shutil
import threading
from typing import TYPE_CHECKING

from ray.train import FailureConfig, RunConfig, ScalingConfig
from ray.train.v2._internal.exceptions import UserExceptionWithTraceback
from ray.train.v2.api.data_parallel_trainer import DataParallelTrainer
from ray.train.v2.api.exceptions import ControllerError, TrainingFailedError, WorkerGroupError

from tunesmith.cluster.events import Listener, Step
from tunesmith.cluster.recipe.schema import Recipe
from tunesmith.cluster.tail import MetricsTail
from tunesmith.trainers.rendezvous import Rendezvous
from tunesmith.trainers.stopping import StopSignals
from tunesmith.trainers.worker import read_presence, train_worker

if TYPE_CHECKING:
    from tunesmith.trainers.launch import Inputs

POLL_SECONDS = 0.2


def fit(
    recipe: Recipe, inputs: Inputs, attempt: int, allow_change: bool, signals: StopSignals, on_event: Listener
) -> dict[int, str]:
    """Runs the attempt to its end, telling `on_event` of each step.

    Returns:
        For each rank that was lost, what is known of the cause; empty when none was. What the workers themselves had to
        say is in the attempt's outcome file.
    """
    folder, need = inputs.folder, inputs.need
    scratch = folder.root / ".ray"
    trainer = DataParallelTrainer(
        train_worker,
        train_loop_config={
            "run": str(folder.root),
            "attempt": attempt,
            "recipe": recipe.model_dump(mode="json", exclude_unset=True),
            "read_keys": recipe.read_keys(),
            "base": dataclasses.asdict(inputs.base),
            "cache": str(inputs.cache),
            "allow_change": allow_change,
            "backend": "nccl" if need.gpus else "gloo",
            "timeout_s": recipe.cluster.timeout_s,
        },
        backend_config=Rendezvous(),
        scaling_config=ScalingConfig(
            num_workers=need.workers, use_gpu=need.gpus > 0, resources_per_worker=need.ray_resources()
        ),
        run_config=RunConfig(
            name=f"{folder.name}-{attempt}", storage_path=str(scratch), failure_config=FailureConfig(max_failures=0)
        ),
    )
    tail = MetricsTail(folder.metrics)
    work = _Work(trainer)
    work.start()
    try:
        while work.is_alive():
            work.join(POLL_SECONDS)
            for line in tail.lines():
                on_event(Step(line))
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return work.lost_ranks(inputs)


class _Work(threading.Thread):
    """`trainer.fit()` off the main thread, where Ray Train would take SIGINT for itself."""

    def __init__(self, trainer: DataParallelTrainer) -> None:
        super().__init__(name="ray-train", daemon=True)
        self._trainer = trainer
        self._failure: TrainingFailedError | None = None

    def run(self) -> None:
        try:
            self._trainer.fit()
        except TrainingFailedError as failure:
            self._failure = failure

    def lost_ranks(self, inputs: Inputs) -> dict[int, str]:
        failure = self._failure
        if isinstance(failure, WorkerGroupError):
            raised = {
                rank: e for rank, e in failure.worker_failures.items() if isinstance(e, UserExceptionWithTraceback)
            }
            died = failure.worker_failures.keys() - raised.keys()
            return {rank: f"{read_presence(inputs.folder, rank)} died" for rank in died} or {
                rank: "its connection to another worker broke" for rank in raised
            }
        if isinstance(failure, ControllerError):
            return {0: f"Ray Train could not start or watch the workers: {failure.controller_failure}"}
        return {}
