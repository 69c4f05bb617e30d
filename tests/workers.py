"""Runs a function on several gloo workers of this machine, without Ray."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch.distributed as dist
import torch.multiprocessing as mp


def run_workers(world: int, function: Callable[..., Any], *arguments: Any) -> None:
    """Calls `function(*arguments)` on `world` spawned processes that share a process group; raises what one raises."""
    mp.spawn(_worker, (world, _free_port(), function, arguments), nprocs=world, join=True)  # pyright: ignore[reportPrivateImportUsage]


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
