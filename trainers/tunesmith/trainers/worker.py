"""What runs in each Ray Train worker: joins the process group, trains, and says how it ended."""

from __future__ import annotations

import dataclasses
import json
import os
import socket
import sys
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tunesmith.cluster.errors import TunesmithError
from tunesmith.cluster.runs import RunFolder
from tunesmith.trainers.outcome import AttemptOutcome, write_outcome

if TYPE_CHECKING:
    from tunesmith.trainers.loop import TrainJob

LOST_PEER_SIGNS = (
    "Connection closed by peer",
    "Connection reset by peer",
    "Connection refused",
    "Broken pipe",
    "Socket closed",
    "recvValue failed",
    "sendBytes failed",
    "NCCL communicator was aborted",
    "ncclRemoteError",
    "ncclSystemError",
)
"""What torch.distributed says in a worker when another one is gone. Such a worker is a victim, not the cause."""


def train_worker(settings: dict[str, Any]) -> None:
    """Entry point of a worker.

    Args:
        settings: `job` (TrainJob), `backend` (gloo or nccl), `timeout_s`, `log` (path of the run's log).
    """
    job: TrainJob = settings["job"]
    run, rank = RunFolder(Path(job.run_root)), int(os.environ["RANK"])
    _log_to(Path(settings["log"]))
    write_presence(run, job.attempt, rank)
    if settings["backend"] == "gloo":
        os.environ["DS_ACCELERATOR"] = "cpu"
    try:
        outcome = _train(job, settings["backend"], settings["timeout_s"])
    except BaseException as error:
        if isinstance(error, TunesmithError) or not is_lost_peer(error):
            write_outcome(run.outcome(job.attempt), AttemptOutcome.failed(rank, error))
        raise
    if rank == 0:
        write_outcome(run.outcome(job.attempt), AttemptOutcome.done(rank, outcome))


def _train(job: TrainJob, backend: str, timeout_s: int) -> dict[str, Any]:
    import torch
    import torch.distributed as dist

    from tunesmith.trainers.loop import train

    if backend == "nccl":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group(backend, init_method="env://", timeout=timedelta(seconds=timeout_s))
    outcome = train(job, _keep_to_ourselves)
    dist.barrier()  # nobody leaves, and looks lost to the others, before all are done
    dist.destroy_process_group()
    return dataclasses.asdict(outcome)


def _keep_to_ourselves(metrics: dict[str, Any]) -> None:
    """Nothing goes through Ray: its report is a barrier that waits for a poll, and metrics.jsonl tells the driver."""


def is_lost_peer(error: BaseException) -> bool:
    """Whether the exception says that another worker is gone."""
    chain: BaseException | None = error
    while chain is not None:
        if any(sign in str(chain) for sign in LOST_PEER_SIGNS):
            return True
        chain = chain.__cause__ or chain.__context__
    return False


def make_job(recipe: Recipe, inputs: Inputs, attempt: int, allow_change: bool) -> TrainJob:
    """What the workers need to know, all of it plain data."""
    from tunesmith.trainers.job import TrainJob

    return TrainJob(
        recipe=resolved(recipe),
        read_keys=recipe.read_keys(),
        run_root=str(inputs.folder.root),
        attempt=attempt,
        base=inputs.base,
        allow_change=allow_change,
    )


def write_presence(run: RunFolder, attempt: int, rank: int) -> None:
    """Leaves `control/rank-<rank>.json`, so that a message about a lost worker can name its process and host."""
    path = presence_file(run, rank)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"attempt": attempt, "pid": os.getpid(), "host": socket.gethostname()}))


def presence_file(run: RunFolder, rank: int) -> Path:
    """Where the worker of this rank says which process it is."""
    return run.stop_file.with_name(f"rank-{rank}.json")


def _log_to(path: Path) -> None:
    """Sends this process's output, native libraries' included, to the end of the run's log."""
    sys.stdout.flush()
    sys.stderr.flush()
    log = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.close(log)


def read_presence(run: RunFolder, rank: int) -> str:
    """Which process the worker of this rank was, for a message."""
    try:
        who = json.loads(presence_file(run, rank).read_text())
    except (FileNotFoundError, ValueError):
        return "its process"
    return f"process {who['pid']} on {who['host']}"
