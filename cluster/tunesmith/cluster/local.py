"""A cluster on this machine, in the shape of several: `tunesmith up`, `down` and `status`.

Every node is a process with a session of its own, so that ending a node is ending one process group, and nothing else. All of it
listens on the loopback interface and asks for a token that only this user can read. What the cluster knows of its jobs lies on disk:
a head that has died is brought back by `up`.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import psutil

from tunesmith.cluster.errors import ResourceError, UsageError
from tunesmith.cluster.local_node import LOOPBACK, NodeSpec
from tunesmith.cluster.resources import this_machine
from tunesmith.cluster.session import LOCAL_SETTINGS, short_temporary_folder
from tunesmith.cluster.storage import write_atomic

START_PATIENCE_S = 120.0
"""Ray gives its node 30 s, and a busy machine may need several times that."""
END_PATIENCE_S = 15.0


@dataclass(frozen=True)
class Member:
    """A node that was started."""

    spec: NodeSpec
    pid: int
    born: float
    """When the process began, as the kernel says: a number that was given out anew is another process."""

    @property
    def alive(self) -> bool:
        """Whether the very process that was started still runs."""
        with contextlib.suppress(psutil.NoSuchProcess):
            process = psutil.Process(self.pid)
            return process.create_time() == self.born and process.status() != psutil.STATUS_ZOMBIE
        return False


@dataclass(frozen=True)
class Local:
    """A cluster on this machine, as its record says."""

    root: Path
    """Its folder: the record, the token, the nodes' logs, what the head must not forget."""
    scratch: str
    """Ray's own folder."""
    members: list[Member] = field(default_factory=list)

    @property
    def head(self) -> NodeSpec:
        return self.members[0].spec

    @property
    def dashboard(self) -> str:
        """Where jobs are submitted."""
        return f"http://{LOOPBACK}:{self.head.dashboard_port}"

    @property
    def address(self) -> str:
        """What a recipe's cluster.address takes."""
        return f"{LOOPBACK}:{self.head.gcs_port}"

    @property
    def token_file(self) -> Path:
        return self.root / "token"

    def as_json(self) -> dict[str, Any]:
        """For `tunesmith status --json`."""
        nodes = [
            {"name": one.spec.name, "pid": one.pid, "alive": one.alive, "cpus": one.spec.cpus, "gpus": one.spec.gpus}
            for one in self.members
        ]
        return {
            "dashboard": self.dashboard,
            "address": self.address,
            "token_file": str(self.token_file),
            "folder": str(self.root),
            "nodes": nodes,
        }


def state_folder() -> Path:
    """Where Tunesmith keeps what belongs to this user: $XDG_STATE_HOME/tunesmith. Several machines may share it."""
    return Path(os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state") / "tunesmith"


def cluster_folder() -> Path:
    """Where what belongs to this machine's cluster lies."""
    return state_folder() / "clusters" / socket.gethostname()


def find() -> Local | None:
    """The cluster that `up` has started on this machine and `down` has not ended."""
    record = cluster_folder() / "cluster.json"
    try:
        written = json.loads(record.read_text())
    except FileNotFoundError:
        return None
    members = [Member(NodeSpec(**one.pop("spec")), **one) for one in written["members"]]
    return Local(record.parent, written["scratch"], members)


def up(nodes: int, cpus_per_node: int | None, gpus_per_node: int) -> Local:
    """Starts a cluster, or brings back those nodes of the running one that have died. Of two at once the second waits.

    Raises:
        UsageError: a cluster of another shape is up.
        ResourceError: a node did not come up.
    """
    with _alone():
        return _up(nodes, cpus_per_node, gpus_per_node)


def down() -> Local | None:
    """Ends the cluster's processes and no other; returns what was ended."""
    with _alone():
        return _down()


@contextlib.contextmanager
def _alone() -> Iterator[None]:
    """Nobody else on this machine starts or ends the cluster meanwhile."""
    folder = cluster_folder()
    folder.parent.mkdir(parents=True, mode=0o700, exist_ok=True)
    with folder.with_name(f"{folder.name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _up(nodes: int, cpus_per_node: int | None, gpus_per_node: int) -> Local:
    known, is_new = find(), False
    shape = (nodes, cpus_per_node or max(1, int(this_machine().cpus) // nodes), gpus_per_node)
    if known is None:
        known, is_new = _new(*shape), True
    elif (len(known.members), known.head.cpus, known.head.gpus) != shape:
        raise UsageError(
            f"a cluster of another shape is up already: --nodes {len(known.members)} "
            f"--cpus-per-node {known.head.cpus} --gpus-per-node {known.head.gpus}",
            "End it with `tunesmith down`, or give `up` the same shape to bring back nodes that have died.",
        )
    try:
        for at, member in enumerate(known.members):  # the head first: the others join it
            if not member.alive:
                known.members[at] = _start(known, member.spec)
                _save(known)
    except BaseException:
        if is_new:
            _down()
        raise
    return known


def _down() -> Local | None:
    known = find()
    if known is None:
        return None
    end(known.members)
    shutil.rmtree(known.scratch, ignore_errors=True)
    shutil.rmtree(known.root, ignore_errors=True)
    return known


def end(members: Sequence[Member]) -> None:
    """Ends nodes: asks them all, waits, then ends what is left of their process groups."""
    living = [one for one in members if one.alive]
    for one in living:
        with contextlib.suppress(ProcessLookupError):  # it has ended meanwhile
            os.kill(one.pid, signal.SIGTERM)
    deadline = time.monotonic() + END_PATIENCE_S
    while any(one.alive for one in living) and time.monotonic() < deadline:
        time.sleep(0.05)
    for one in living:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(one.pid, signal.SIGKILL)


def token_for(dashboard: str) -> str | None:
    """The token that a cluster wants: RAY_AUTH_TOKEN, RAY_AUTH_TOKEN_PATH, that of `up` if it is that cluster, or Ray's own file."""
    if token := os.environ.get("RAY_AUTH_TOKEN"):
        return token
    known = find()
    ours = (
        known.token_file if known is not None and known.dashboard == dashboard else Path.home() / ".ray" / "auth_token"
    )
    path = Path(os.environ.get("RAY_AUTH_TOKEN_PATH") or ours)
    return path.read_text().strip() if path.is_file() else None


def _new(nodes: int, cpus: int, gpus: int) -> Local:
    root = cluster_folder()
    root.mkdir(parents=True, mode=0o700, exist_ok=True)
    scratch = str(short_temporary_folder())
    known = Local(root, scratch)
    descriptor = os.open(known.token_file, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)  # Ray's own is for all to read
    with os.fdopen(descriptor, "w") as file:
        file.write(secrets.token_hex(32))
    gcs_port, dashboard_port = free_ports(2)
    memory_gib = this_machine().memory_gib / nodes
    for number in range(nodes):
        name = "head" if number == 0 else f"node-{number}"
        ready = str(root / f"{name}.ready")
        spec = NodeSpec(name, number == 0, cpus, gpus, memory_gib, gcs_port, dashboard_port, f"{scratch}/ray", ready)
        known.members.append(Member(spec, 0, 0.0))
    _save(known)
    return known


def _start(known: Local, spec: NodeSpec) -> Member:
    ready, log = Path(spec.ready), known.root / f"{spec.name}.log"
    ready.unlink(missing_ok=True)
    with log.open("ab") as output:
        process = subprocess.Popen(
            [sys.executable, "-m", "tunesmith.cluster.local_node", spec.to_json()],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            env=_environment(known),
            start_new_session=True,
        )
    member = Member(spec, process.pid, psutil.Process(process.pid).create_time())
    deadline = time.monotonic() + START_PATIENCE_S
    try:
        while not ready.exists():
            if process.poll() is not None or time.monotonic() > deadline:
                last = log.read_text(errors="replace").strip().splitlines()[-5:]
                raise ResourceError(
                    f"node {spec.name} did not come up: " + "\n".join(last), f"All it said is in {log}."
                )
            time.sleep(0.05)
    except BaseException:  # Ctrl-C too: nobody else knows of the process yet
        end([member])
        raise
    return member


def _environment(known: Local) -> dict[str, str]:
    ours = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    return ours | LOCAL_SETTINGS | {
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}",  # jobs say `python`
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN_PATH": str(known.token_file),
        "RAY_gcs_storage": "rocksdb",  # what the head knows of jobs and nodes outlives it
        "RAY_gcs_storage_path": str(known.root / "gcs"),
    }  # fmt: skip


def _save(known: Local) -> None:
    record = {"scratch": known.scratch, "members": [asdict(member) for member in known.members]}
    write_atomic(known.root / "cluster.json", json.dumps(record, indent=1))


def free_ports(count: int) -> list[int]:
    """Ports of the loopback interface that nobody has, different ones."""
    with contextlib.ExitStack() as stack:
        probes = [stack.enter_context(socket.socket()) for _ in range(count)]
        for probe in probes:
            probe.bind((LOOPBACK, 0))
        return [probe.getsockname()[1] for probe in probes]
