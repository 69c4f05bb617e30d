"""Ray clusters of several nodes on this machine, started and killed from outside, as machines come and go."""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

PATIENCE_S = 120.0
RAY = str(Path(sys.executable).with_name("ray"))
HEAD = "--head"


class RayNode:
    """`ray start --block` and all that it starts, in a process group of its own."""

    def __init__(self, arguments: list[str], environment: dict[str, str], log: Path) -> None:
        self.log = log
        with log.open("ab") as out:
            self.process = subprocess.Popen(
                [RAY, "start", "--block", *arguments],
                env=environment,
                stdout=out,
                stderr=out,
                start_new_session=True,
            )

    def kill(self) -> None:
        """Takes the machine away without grace."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()


class RayCluster:
    """A head without CPUs of its own, and nodes of one CPU each. Use as a context manager."""

    def __init__(self) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="cl-", dir="/tmp"))  # Ray's sockets have short paths
        self.port = _free_port()
        self.address = f"127.0.0.1:{self.port}"
        self.environment = {
            **{name: value for name, value in os.environ.items() if not name.startswith("RAY_")},
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN": secrets.token_hex(16),
            "RAY_USAGE_STATS_ENABLED": "0",
            "RAY_health_check_initial_delay_ms": "0",
            "RAY_health_check_period_ms": "500",
            "RAY_health_check_failure_threshold": "4",
        }
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
        arguments = [HEAD, f"--port={self.port}", "--num-cpus=0", "--include-dashboard=false", *self._common()]
        self.head = RayNode(arguments, self.environment, self.folder / "head.log")
        self._wait_until(self._answers, "the head to answer")

    def add_node(self) -> RayNode:
        """Starts a node."""
        log = self.folder / f"node-{len(self.nodes)}.log"
        node = RayNode([f"--address={self.address}", "--num-cpus=1", *self._common()], self.environment, log)
        self.nodes.append(node)
        self._wait_until(lambda: "Ray runtime started" in log.read_text(), "a node to join")
        return node

    def drain(self, node_id: str, within_s: int) -> None:
        """Announces that a node is to be taken away after so many seconds, as a cloud does before it preempts one."""
        command = [
            RAY, "drain-node", "--address", self.address, "--node-id", node_id, "--reason",
            "DRAIN_NODE_REASON_PREEMPTION", "--reason-message", "spot", "--deadline-remaining-seconds", str(within_s),
        ]  # fmt: skip
        subprocess.run(command, env=self.environment, check=True, capture_output=True)

    def _common(self) -> list[str]:
        return [
            "--node-ip-address=127.0.0.1",
            f"--temp-dir={self.folder / 'r'}",
            "--object-store-memory=80000000",
            "--disable-usage-stats",
        ]

    def _answers(self) -> bool:
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", self.port), timeout=1):
            return True
        return False

    def _wait_until(self, condition: Callable[[], bool], what: str) -> None:
        deadline = time.monotonic() + PATIENCE_S
        while not condition():
            logs = "\n".join(path.read_text() for path in self.folder.glob("*.log"))
            assert time.monotonic() < deadline, f"waited for {what}:\n{logs}"
            time.sleep(0.1)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
