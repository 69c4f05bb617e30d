"""One node of a cluster on this machine, as a process: `python -m tunesmith.cluster.local_node SPEC`.

`ray start` would do, but it takes a loopback address for a mistake: it puts the machine's own address in its place, and Ray listens on
every interface. Ray keeps to the loopback interface only where it believes that there are no clusters, and then `ray start` refuses
to join one; the class behind it does not.
"""

from __future__ import annotations

import json
import logging
import signal
import sys
import threading
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

LOOPBACK = "127.0.0.1"
OBJECT_STORE_BYTES = 80 * 2**20
"""Ray wants at least 75 MiB."""
WATCH_S = 0.5
UNUSED_SERVICES = ("start_monitor", "start_log_monitor")
"""The autoscaler, and what sends the output of workers to drivers, which nobody reads."""


@dataclass(frozen=True)
class NodeSpec:
    """What a node of a cluster on this machine is to be."""

    name: str
    head: bool
    cpus: int
    gpus: int
    memory_gib: float
    gcs_port: int
    """Of the head, which every node joins."""
    dashboard_port: int
    folder: str
    """Where Ray puts its sockets and logs."""
    ready: str
    """File that is written when the node is up."""

    def to_json(self) -> str:
        return json.dumps(asdict(self))


def main(spec: NodeSpec) -> int:
    """Runs the node until SIGTERM, or until one of its processes dies. When this process is killed, the kernel ends them all."""
    logging.getLogger("ray").setLevel(logging.ERROR)
    from ray._private.node import Node
    from ray._private.utils import write_ray_address

    for service in UNUSED_SERVICES:
        setattr(Node, service, _leave_out)
    node = Node(_parameters(spec), head=spec.head, shutdown_at_exit=True, spawn_reaper=True)
    ended = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: ended.set())  # in place of Ray's own, which drains the node first
    write_ray_address(node.gcs_address, spec.folder)  # else jobs look for a cluster, and find any that runs here
    Path(spec.ready).write_text(json.dumps({"node_id": node.node_id, "gcs": node.gcs_address}))
    dead = []
    while not ended.wait(WATCH_S) and not dead:
        dead = [f"{kind} (exit code {process.returncode})" for kind, process in node.dead_processes()]
    print(f"node {spec.name} ends: {', '.join(dead) or 'it was asked to'}", flush=True)
    node.kill_all_processes(check_alive=False, allow_graceful=True, wait=True)
    return 1 if dead else 0


def _parameters(spec: NodeSpec) -> Any:
    from ray._private.parameter import RayParams

    wanted: dict[str, Any] = dict(
        node_name=spec.name,
        node_ip_address=LOOPBACK,
        temp_dir=spec.folder,
        num_cpus=spec.cpus,
        num_gpus=spec.gpus,
        memory=int(spec.memory_gib * 2**30),
        object_store_memory=OBJECT_STORE_BYTES,
        min_worker_port=0,
        max_worker_port=0,
        node_manager_port=0,
        object_manager_port=0,
        dashboard_agent_listen_port=0,
        include_dashboard=spec.head,
        dashboard_host=LOOPBACK,
        dashboard_port=spec.dashboard_port,
    )
    parameters = RayParams(**wanted)
    if spec.head:
        parameters.gcs_server_port = spec.gcs_port
    else:
        parameters.gcs_address = f"{LOOPBACK}:{spec.gcs_port}"
    return parameters


def _leave_out(*_: object, **__: object) -> None:
    pass


if __name__ == "__main__":
    raise SystemExit(main(NodeSpec(**json.loads(sys.argv[1]))))
