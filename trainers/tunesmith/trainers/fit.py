"""One attempt: Ray Train's workers from start to end, watched from the driver. Decides nothing."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import TYPE_CHECKING

from ray.exceptions import RayError
from ray.train import FailureConfig, RunConfig, ScalingConfig
from ray.train.v2._internal.exceptions import WorkerHealthCheckFailedError, WorkerHealthCheckTimeoutError
from ray.train.v2.api.exceptions import ControllerError, TrainingFailedError, WorkerGroupError
from ray.util.placement_group import NODE_ID_LABEL_KEY

from tunesmith.cluster.background import Background
from tunesmith.cluster.events import Listener, Step, Warned
from tunesmith.cluster.recipe.schema import Recipe
from tunesmith.cluster.resources import Need
from tunesmith.cluster.runs import RunFolder
from tunesmith.cluster.tail import MetricsTail
from tunesmith.trainers.head_watch import HeadWatch
from tunesmith.trainers.lean import ClusterTrainer, LocalTrainer
from tunesmith.trainers.machines import Machines
from tunesmith.trainers.rendezvous import Rendezvous
from tunesmith.trainers.stopping import StopSignals
from tunesmith.trainers.watchman import Watchman, who
from tunesmith.trainers.worker import is_lost_peer, train_worker

if TYPE_CHECKING:
    from tunesmith.trainers.launch import Inputs

POLL_SECONDS = 0.2
LEAVE_SECONDS = 5.0
"""How long the thread that looks after lost workers may take to see that it is left."""
OUT_OF_MEMORY_SIGNS = ("OutOfMemoryError", "running low on memory", "out of memory")
"""What Ray says of a worker that its memory monitor has ended."""


@dataclass(frozen=True)
class Ending:
    """What Ray Train saw of an attempt's end; empty when all workers returned."""

    died: dict[int, str] = field(default_factory=dict)
    """Ranks whose process is gone, and what is known of it."""
    raised: dict[int, str] = field(default_factory=dict)
    """Ranks that raised: for a reason of their own, or because another one is gone."""
    cause: str = ""
    """What ended the attempt that was no rank's."""
    moves_on: bool = False
    """Whether the workers were asked to save for the run to go on with others."""

    @property
    def is_lost(self) -> bool:
        """Whether it was workers, or what carries them, that ended the attempt, and not training."""
        return bool(self.died or self.cause)


def fit(
    recipe: Recipe,
    inputs: Inputs,
    need: Need,
    machines: Machines,
    attempt: int,
    allow_change: bool,
    signals: StopSignals,
    on_event: Listener,
) -> Ending:
    """Runs the attempt to its end, telling `on_event` of each step and of what workers warn of.

    What the workers themselves had to say is in the attempt's outcome file.

    Args:
        need: what this attempt asks for.
        machines: the cluster, where there may come to be room for more workers.
    """
    folder, timeout_s, stall_s = inputs.folder, recipe.cluster.timeout_s, recipe.cluster.stall_s
    scratch = folder.root / ".ray"
    trainer = (LocalTrainer if inputs.local else ClusterTrainer)(
        train_worker,
        train_loop_config={
            "run": str(folder.root),
            "attempt": attempt,
            "recipe": recipe.model_dump(mode="json", exclude_unset=True),
            "read_keys": recipe.read_keys(),
            "base": asdict(inputs.base),
            "cache": str(inputs.cache),
            "data": inputs.prepared.fingerprint,
            "allow_change": allow_change,
            "backend": "nccl" if need.gpus else "gloo",
            "timeout_s": timeout_s,
            "stall_s": stall_s,
        },
        backend_config=Rendezvous(str(folder.root), attempt),
        scaling_config=_scaling(need, machines.nodes_for(need)),
        run_config=RunConfig(
            name=f"{folder.name}-{attempt}",
            storage_path=str(scratch),
            # the last: it would try for ever to start workers that there is no room for
            failure_config=FailureConfig(max_failures=0, max_preemption_failures=0, controller_failure_limit=0),
        ),
    )
    steps, warnings = MetricsTail(folder.metrics), MetricsTail(folder.warnings(attempt))
    head, more = None if inputs.local else HeadWatch(machines.session), machines.more_than(need.workers)
    watchman = Watchman(folder, attempt, need.workers, stall_s, head, recipe.cluster.is_elastic, more)
    work = Background("ray-train", trainer.fit)
    work.start()
    try:
        is_over = False
        while not is_over and watchman.lost_head is None:
            work.join(POLL_SECONDS)
            is_over = not work.is_alive()  # asked before what it wrote is told: a listener may take its time
            signals.acknowledge(on_event)
            for event in [*(Warned(line["text"]) for line in warnings.lines()), *map(Step, steps.lines())]:
                on_event(event)
            watchman.look(on_event)
    finally:
        trainer.leave()
        work.join(LEAVE_SECONDS)
        shutil.rmtree(scratch, ignore_errors=True)
    if watchman.lost_head is not None:
        return Ending(cause=watchman.lost_head)
    if work.failure is not None and not isinstance(work.failure, TrainingFailedError | RayError):
        raise work.failure
    if watchman.stall is not None:
        return Ending({rank: f"{watchman.stall.beats[rank].who} {why}" for rank, why in watchman.stall.odd.items()})
    return replace(_ending(work.failure, folder, attempt), moves_on=watchman.moves_on)


def _scaling(need: Need, nodes: Sequence[str]) -> ScalingConfig:
    return ScalingConfig(
        num_workers=need.workers,
        use_gpu=need.gpus > 0,
        resources_per_worker=need.ray_resources(),
        label_selector=[{NODE_ID_LABEL_KEY: node} for node in nodes] or None,
    )


def _ending(failure: TrainingFailedError | RayError | None, folder: RunFolder, attempt: int) -> Ending:
    if isinstance(failure, WorkerGroupError):
        died = {
            rank: f"{who(folder, attempt, rank)} {_how(error)}"
            for rank, error in failure.worker_failures.items()
            if isinstance(error, WorkerHealthCheckFailedError | WorkerHealthCheckTimeoutError)
        }
        raised = {
            rank: f"{who(folder, attempt, rank)} {_why(error)}"
            for rank, error in failure.worker_failures.items()
            if rank not in died
        }
        return Ending(died, raised)
    if isinstance(failure, ControllerError):
        return Ending(cause=f"Ray Train could not start them: {_first_line(failure.controller_failure)}")
    if failure is not None:
        return Ending(cause=f"Ray failed: {_first_line(failure)}")
    return Ending()


def _how(error: Exception) -> str:
    """What became of a worker that does not answer Ray any more."""
    if isinstance(error, WorkerHealthCheckTimeoutError):
        return "hangs"
    lines = (line for line in str(error).splitlines() if any(sign in line for sign in OUT_OF_MEMORY_SIGNS))
    out_of_memory = next(lines, "")
    return f"was ended by Ray, its machine was out of memory: {out_of_memory.strip()}" if out_of_memory else "died"


def _why(error: Exception) -> str:
    """Why a worker raised that may be a victim of another's end."""
    return "lost its connection to another worker" if is_lost_peer(error) else f"failed: {_first_line(error)}"


def _first_line(error: BaseException) -> str:
    return str(error).strip().partition("\n")[0] or type(error).__name__
