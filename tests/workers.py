"""Runs a function on several gloo workers of this machine, without Ray."""

from __future__ import annotations

import multiprocessing
import os
import socket
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch.distributed as dist
from torch.multiprocessing.spawn import ProcessContext, start_processes


def run_workers(world: int, function: Callable[..., Any], *arguments: Any) -> None:
    """Calls `function(*arguments)` on `world` processes that share a process group; raises what one raises."""
    group = start_workers(world, function, *arguments)
    while not group.join():
        pass


def start_workers(world: int, function: Callable[..., Any], *arguments: Any) -> ProcessContext:
    """As `run_workers`, and does not wait for them.

    The processes are forked from a server that has imported everything once: importing costs more than most tests.
    """
    multiprocessing.set_forkserver_preload(["tunesmith.trainers.loop", "tunesmith.trainers.data.build"])
    arguments_of_worker = (world, _free_port(), function, arguments)
    context = start_processes(_worker, arguments_of_worker, nprocs=world, join=False, start_method="forkserver")
    assert context is not None
    return context


def _worker(rank: int, world: int, port: int, function: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    os.environ["LOCAL_RANK"] = str(rank)  # DeepSpeed insists on it
    dist.init_process_group(
        "gloo", f"tcp://127.0.0.1:{port}", rank=rank, world_size=world, timeout=timedelta(seconds=120)
    )
    try:
        function(*arguments)
    finally:
        dist.destroy_process_group()


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]
