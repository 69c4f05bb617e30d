"""What runs in each Ray Train worker: joins the process group, trains, and says how it ended."""

from __future__ import annotations

import contextlib
import os
import socket
import sys
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tunesmith.cluster.base import BaseRef
from tunesmith.cluster.errors import StoppedError, TunesmithError
from tunesmith.cluster.imports import switch_off_compiler, uncollected
from tunesmith.cluster.runs import RunFolder
from tunesmith.trainers.heartbeat import Heartbeat
from tunesmith.trainers.outcome import AttemptOutcome, write_outcome

if TYPE_CHECKING:
    from torch.distributed import Store  # pyright: ignore[reportPrivateImportUsage]

    from tunesmith.trainers.loop import Outcome

LOST_PEER_SIGNS = (
    "Connection closed by peer",
    "Connection was likely closed",
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
        settings: `run` (its folder), `attempt`, `recipe` (the keys that the user wrote), `read_keys`, `base` (BaseRef),
            `cache`, `data` (its fingerprint), `allow_change`, `backend` (gloo or nccl), `timeout_s` and `stall_s`; plain data, so
            that no class of ours is pickled before this process has its log.
    """
    run, rank = RunFolder(Path(settings["run"])), int(os.environ["RANK"])
    log_to(log_file(run))
    heartbeat = Heartbeat(run, settings["attempt"], rank, settings["stall_s"])
    heartbeat.start()
    ending = run.outcome(settings["attempt"])
    try:
        outcome = _train(settings, heartbeat.moved)
        if not outcome.finished:
            raise StoppedError(
                f"run {run.name} was stopped{run.why_stopped(settings['attempt'])}: all workers have saved step {outcome.step}",
                "The same command goes on from there.",
            )
    except BaseException as error:
        if isinstance(error, TunesmithError) or not is_lost_peer(error):
            with contextlib.suppress(OSError):  # on a full disk Ray still carries the error itself to the driver
                write_outcome(ending, AttemptOutcome.failed(rank, error))
        raise
    finally:
        heartbeat.leave()
    if rank == 0:
        write_outcome(ending, AttemptOutcome.done(rank, {"step": outcome.step, "metrics": outcome.metrics}))


def _train(settings: dict[str, Any], moved: Callable[[], None]) -> Outcome:
    backend, rank, world = settings["backend"], int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    # before the imports, which take seconds: workers that find nobody listening retry only after a pause
    meeting = _listen(world) if rank == 0 else None
    if backend == "gloo":
        os.environ["DS_ACCELERATOR"] = "cpu"
        os.environ["CUDA_VISIBLE_DEVICES"] = ""  # a GPU that was not asked for is not used
    switch_off_compiler()
    with uncollected():
        import torch
        import torch.distributed as dist

        from tunesmith.trainers.loop import TrainJob, train

    job = TrainJob(
        recipe=settings["recipe"],
        read_keys=settings["read_keys"],
        run=Path(settings["run"]),
        cache=Path(settings["cache"]),
        data=settings["data"],
        base=BaseRef(**settings["base"]),
        attempt=settings["attempt"],
        allow_change=settings["allow_change"],
    )
    if backend == "nccl":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    timeout = timedelta(seconds=settings["timeout_s"])
    dist.init_process_group(
        backend, store=_store(meeting, world, timeout), rank=rank, world_size=world, timeout=timeout
    )
    outcome = train(job, moved)
    dist.barrier()  # nobody leaves, and looks lost to the others, before all are done
    dist.destroy_process_group()
    return outcome


def _listen(world: int) -> socket.socket:
    """The socket at which rank 0 will serve the store, at MASTER_ADDR and MASTER_PORT alone.

    Left to itself, the store listens on every interface and serves whoever asks.
    """
    address = os.environ["MASTER_ADDR"]
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    return socket.create_server((address, int(os.environ["MASTER_PORT"])), family=family, backlog=max(128, world))


def _store(meeting: socket.socket | None, world: int, timeout: timedelta) -> Store:
    """What the workers agree through; `meeting` is the socket of rank 0, which serves it."""
    from torch.distributed import TCPStore  # pyright: ignore[reportPrivateImportUsage]

    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    if meeting is None:
        return TCPStore(address, port, world, is_master=False, timeout=timeout)
    return TCPStore(address, port, world, is_master=True, timeout=timeout, master_listen_fd=meeting.detach())


def is_lost_peer(error: BaseException) -> bool:
    """Whether the exception says that another worker is gone."""
    chain: BaseException | None = error
    while chain is not None:
        if any(sign in str(chain) for sign in LOST_PEER_SIGNS):
            return True
        chain = chain.__cause__ or chain.__context__
    return False


def log_file(run: RunFolder) -> Path:
    """What all workers of all attempts print."""
    return run.root / "log.txt"


def log_to(path: Path) -> None:
    """Sends this process's output, native libraries' included, to the end of the run's log."""
    sys.stdout.flush()
    sys.stderr.flush()
    log = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.close(log)
