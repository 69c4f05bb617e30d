"""Ray clusters of several nodes on this machine, killed from outside, as machines come and go. All of it on the loopback interface."""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from tunesmith.cluster.local import free_ports
from tunesmith.cluster.local_node import LOOPBACK, NodeSpec
from tunesmith.cluster.session import LOCAL_SETTINGS

PATIENCE_S = 120.0
MEMORY_GIB = 8.0


class RayNode:
    """A node's process and all that it starts, in a process group of its own."""

    def __init__(self, spec: NodeSpec, environment: dict[str, str]) -> None:
        Path(spec.ready).unlink(missing_ok=True)
        self.log = Path(spec.ready).with_suffix(".log")
        with self.log.open("ab") as out:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "tunesmith.cluster.local_node", spec.to_json()],
                env=environment,
                stdout=out,
                stderr=out,
                start_new_session=True,
            )
        deadline = time.monotonic() + PATIENCE_S
        try:
            while not Path(spec.ready).exists():
                assert self.process.poll() is None, f"{spec.name} did not come up:\n{self.log.read_text()}"
                assert time.monotonic() < deadline, f"waited {PATIENCE_S} s for {spec.name}:\n{self.log.read_text()}"
                time.sleep(0.05)
        except BaseException:  # nobody else knows of the process yet
            self.kill()
            raise

    def kill(self) -> None:
        """Takes the machine away without grace."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()


class RayCluster:
    """A head without CPUs of its own, and nodes of one CPU each. Use as a context manager.

    Args:
        durable: whether a head that is started again knows what the one before it knew.
        settings: further variables of its nodes.
    """

    def __init__(self, durable: bool = True, **settings: str) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="cl-", dir="/tmp"))  # Ray's sockets have short paths
        self.gcs_port, self.dashboard_port = free_ports(2)
        self.address = f"{LOOPBACK}:{self.gcs_port}"
        self.environment = {
            **{name: value for name, value in os.environ.items() if not name.startswith("RAY_")},
            **LOCAL_SETTINGS,
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN": secrets.token_hex(16),
            "RAY_health_check_initial_delay_ms": "0",
            "RAY_health_check_period_ms": "500",
            "RAY_health_check_failure_threshold": "4",
            **settings,
        }
        if durable:
            self.environment |= {"RAY_gcs_storage": "rocksdb", "RAY_gcs_storage_path": str(self.folder / "gcs")}
        self.nodes: list[RayNode] = []
        self.head: RayNode | None = None

    def __enter__(self) -> RayCluster:
        self.start_head()
        return self

    def __exit__(self, *_: object) -> None:
        for node in [*self.nodes, *filter(None, [self.head])]:
            node.kill()
        shutil.rmtree(self.folder, ignore_errors=True)

    def start_head(self) -> None:
        """Starts the head, again on the same port."""
        self.head = RayNode(self._spec("head", cpus=0), self.environment)

    def add_node(self) -> RayNode:
        """Starts a node."""
        self.nodes.append(RayNode(self._spec(f"node-{len(self.nodes)}", cpus=1), self.environment))
        return self.nodes[-1]

    def drain(self, node_id: str, within_s: int) -> None:
        """Announces that a node is to be taken away after so many seconds, as a cloud does before it preempts one."""
        command = [
            str(Path(sys.executable).with_name("ray")), "drain-node", "--address", self.address, "--node-id", node_id, "--reason",
            "DRAIN_NODE_REASON_PREEMPTION", "--reason-message", "spot", "--deadline-remaining-seconds", str(within_s),
        ]  # fmt: skip
        subprocess.run(command, env=self.environment, check=True, capture_output=True)

    def _spec(self, name: str, cpus: int) -> NodeSpec:
        ready = str(self.folder / f"{name}.ready")
        ray = str(self.folder / "r")
        return NodeSpec(name, name == "head", cpus, 0, MEMORY_GIB, self.gcs_port, self.dashboard_port, ray, ready)
