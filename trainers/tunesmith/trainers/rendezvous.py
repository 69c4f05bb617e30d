"""Tells Ray Train's workers where to meet. Neither the driver nor the controller imports torch for it.

Ray's own TorchConfig joins the process group from the controller, which costs an import of torch in the driver and
another in the controller, one after the other, before any worker may begin (about 5 s of CPU).
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
from dataclasses import dataclass
from pathlib import Path

import ray
import ray.util
from ray.train import get_context
from ray.train.backend import Backend, BackendConfig

from tunesmith.cluster.runs import RunFolder


@dataclass
class Rendezvous(BackendConfig):
    """Gives each worker the environment in which torch's distributed workers begin: who it is, and where they meet.

    Attributes:
        run: the run's folder; a worker that is told to end (SIGTERM) asks all of them to save and stop.
        attempt: this attempt's number. Ray sends SIGTERM too, to those that are left when a worker is lost: what they ask for
            does not concern the next attempt.
    """

    run: str = ""
    attempt: int = 0

    @property
    def backend_cls(self) -> type[Backend]:
        return _RendezvousBackend


class _RendezvousBackend(Backend):
    share_cuda_visible_devices: bool = True
    """All workers of a node see all its GPUs in one order, so that LOCAL_RANK is the device."""

    def on_start(self, worker_group, backend_config) -> None:
        assert isinstance(backend_config, Rendezvous)
        address, port = worker_group.execute_single(0, _address_and_free_port)
        worker_group.execute(_set_environment, address, port)
        worker_group.execute(_save_when_terminated, backend_config.run, backend_config.attempt)


def _address_and_free_port() -> tuple[str, int]:
    address = ray.util.get_node_ip_address()
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.bind((address, 0))
        return address, probe.getsockname()[1]


def _set_environment(address: str, port: int) -> None:
    context = get_context()
    os.environ["MASTER_ADDR"] = address
    os.environ["MASTER_PORT"] = str(port)
    os.environ["RANK"] = str(context.get_world_rank())
    os.environ["WORLD_SIZE"] = str(context.get_world_size())
    os.environ["LOCAL_RANK"] = str(context.get_local_rank())
    os.environ["LOCAL_WORLD_SIZE"] = str(context.get_local_world_size())
    os.environ["NODE_RANK"] = str(context.get_node_rank())
    os.environ["RAY_NODE_ID"] = ray.get_runtime_context().get_node_id()


def _save_when_terminated(run: str, attempt: int) -> None:
    """Runs in the worker's main thread, which alone may handle signals; training has a thread of its own."""
    who = f"rank {get_context().get_world_rank()} (process {os.getpid()} on {socket.gethostname()})"
    folder = RunFolder(Path(run))

    def told(*_: object) -> None:
        # a run that trained nothing is taken away while its workers are ended
        with contextlib.suppress(FileNotFoundError):
            folder.request_stop_of(attempt, f"{who} was told to end (SIGTERM)")

    signal.signal(signal.SIGTERM, told)
