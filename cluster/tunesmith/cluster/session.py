"""The Ray that a run uses: one of our own on this machine, or the cluster we are pointed at."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import logging
import os
import secrets
import shutil
import signal
import socket
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Any

from tunesmith.cluster.errors import ResourceError
from tunesmith.cluster.ray_nodes import RayNode, cluster_id, joined_cluster_id, ray_nodes, require_head
from tunesmith.cluster.resources import GIB, Node, this_machine

OBJECT_STORE_BYTES = 80 * 2**20
"""Ray's object store carries a pickled function and nothing else; Ray wants at least 75 MiB."""

LONGEST_TEMPORARY_FOLDER = 36
"""Ray puts sockets below its folder, and a socket's path has 107 bytes on Linux."""

START_PATIENCE_S = 30.0
"""How long a command that is told to end waits for a Ray that is still starting."""

CONNECT_PATIENCE_S = 5.0
"""How long a cluster may take to accept a connection. Ray itself tries for many minutes, and says so at length."""

PROBE_PATIENCE_S = 1.0
"""How long the head of a cluster that was joined may take, while something else waits for the answer."""

TRAIN_SETTINGS = {
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",  # a lost worker is noticed in half a second, not two
    "RAY_TRAIN_METRICS_ENABLED": "0",
    "RAY_CHDIR_TO_TRIAL_DIR": "0",  # relative paths in a recipe mean the same in a worker
    "RAY_TRAIN_ENABLE_PRINT_PATCH": "0",  # it would print everything twice
    "RAY_TRAIN_ENABLE_CONTROLLER_STRUCTURED_LOGGING": "0",  # it would say on the terminal what we say
    "RAY_TRAIN_ENABLE_STATE_TRACKING": "0",
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",  # the driver asks Ray itself which nodes are drained
    "RAY_ENABLE_AUTO_CONNECT": "0",  # what still runs when a session has ended may not start another Ray, or join one
}
"""How Ray and Ray Train behave in our runs. Ray hands them on to workers."""

LOCAL_SETTINGS = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_WARN_BLOCKING_GET_INSIDE_ASYNC": "0",
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",  # on Linux too: every port on the loopback interface only
}
"""Besides, in a Ray of our own."""


def cluster_address(address: str | None) -> str | None:
    """Where to connect: the recipe's address, else RAY_ADDRESS, else None (also for `local`): a Ray of our own."""
    address = address or os.environ.get("RAY_ADDRESS") or None
    return None if address == "local" else address


_CONNECTING = threading.Lock()
"""Two sessions of one process that start together share one Ray."""


class RaySession:
    """Starts or joins Ray in the background, and ends only what it started.

    Use as a context manager. `start` returns at once (Ray takes seconds, mostly waiting); `nodes` waits for it.
    A Ray that this process is already connected to is used as it is and left running.
    """

    def __init__(self, address: str | None = None) -> None:
        self.address = cluster_address(address)
        self._thread: threading.Thread | None = None
        self._ready = threading.Event()
        self._close = threading.Event()
        self._failure: BaseException | None = None
        self._folder: Path | None = None
        self._head: str | None = None
        self._saved_environment: dict[str, str | None] = {}

    @property
    def local(self) -> bool:
        """Whether Ray is one of our own on this machine."""
        return self.address is None

    def start(self) -> RaySession:
        """Begins to start or join Ray; once is enough."""
        if self._thread is None:
            self._set_environment()
            self._ready, self._close, self._failure = threading.Event(), threading.Event(), None
            # Ray's processes ask the kernel to die with the thread that made them, so this thread stays until close().
            self._thread = threading.Thread(target=self._live, name="ray-session", daemon=True)
            self._thread.start()
        return self

    def nodes(self) -> list[Node]:
        """The live nodes of the running Ray, and what each has in all.

        Raises:
            ResourceError: Ray did not start, or no cluster answers at the address.
            LostHeadError: the head of the cluster that was joined does not answer.
        """
        return [node.has(name) for node, name in self._named_nodes()]

    def staying_nodes(self) -> list[Node]:
        """As `nodes`, without those that are about to be taken away.

        Raises:
            LostHeadError: the head does not answer.
        """
        return [node.has(name) for node, name in self._named_nodes() if not node.is_draining]

    def free_nodes(self) -> list[Node]:
        """As `staying_nodes`, with what nobody uses now.

        Raises:
            LostHeadError: the head does not answer.
        """
        return [node.has_free(name) for node, name in self._named_nodes() if not node.is_draining]

    @property
    def head(self) -> str:
        """Host and port of the cluster's head, as far as it is known."""
        return self._head or self.address or "this machine"

    def head_answers(self) -> bool:
        """Whether the head of the cluster accepts connections; asks nothing of Ray, which would wait and then end this process."""
        try:
            require_answer(self.head, PROBE_PATIENCE_S)
        except ConnectionError:
            return False
        return True

    def is_same_cluster(self) -> bool:
        """Whether the head that answers knows what this process has joined; one that has forgotten it answers no request."""
        return cluster_id(self.head) == joined_cluster_id()

    def _named_nodes(self) -> list[tuple[RayNode, str]]:
        """The live nodes, each with what a message calls it."""
        self.start()
        self._ready.wait()
        if self._failure is not None:
            where = f"no Ray cluster could be joined at {self.address}" if self.address else "Ray did not start here"
            raise ResourceError(
                f"{where}: {self._failure}",
                "Check the address, and the cluster's token in RAY_AUTH_TOKEN or ~/.ray/auth_token."
                if self.address
                else "",
            ) from self._failure
        nodes = ray_nodes()
        alone = self.local and len(nodes) == 1
        return [(node, "this machine" if alone else f"node {node.address}") for node in nodes]

    def close(self) -> None:
        """Ends the Ray that `start` began, or leaves the cluster it joined."""
        if self._thread is not None:
            self._close.set()
            is_up = self._ready.is_set()
            # A Ray that is still starting is waited for, to end it; one that is being joined may never answer.
            self._thread.join(None if is_up else START_PATIENCE_S if self.local else 0)
            self._thread = None
        self._restore_environment()
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)
            self._folder = None

    def __enter__(self) -> RaySession:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _live(self) -> None:
        ready, close, ours = self._ready, self._close, False  # a later start has others
        try:
            with _CONNECTING:
                ours = self._connect()
        except (Exception, SystemExit) as failure:  # noqa: BLE001 - handed to the caller of nodes()
            self._failure = failure
        ready.set()
        close.wait()
        if ours:
            import ray

            ray.shutdown()

    def _connect(self) -> bool:
        """Whether this call connected, and close() must disconnect."""
        if self.address is not None:
            require_answer(self.head)  # before Ray is imported, which takes a second
        logging.getLogger("ray").setLevel(logging.ERROR)  # importing Ray in a thread warns about signal handlers
        import ray

        if ray.is_initialized():
            return False
        from ray._private import worker as driver

        # Ray prints what its raylet has to say, such as a killed worker, on our standard output, which carries data.
        driver.print_to_stdstream = _drop_ray_output
        if self.address is not None:
            from ray._private.authentication import authentication_token_setup as tokens

            logging.getLogger("ray").setLevel(logging.ERROR)
            # Ray itself sends a token it has to an automatically found cluster only.
            tokens.maybe_enable_token_auth_if_token_available(warn_if_disabled=False)
            require_cluster(self.address)
        quiet = {"logging_level": logging.ERROR, "log_to_driver": False}
        if self.address is not None:
            with _our_handler():
                ray.init(address=self.head, **quiet)
            self._head = ray.get_runtime_context().gcs_address
            return True
        machine = this_machine()
        self._folder = short_temporary_folder()
        wanted: dict[str, Any] = {
            "num_cpus": int(machine.cpus),
            "num_gpus": int(machine.gpus),
            "object_store_memory": OBJECT_STORE_BYTES,
            "include_dashboard": False,
            "_node_ip_address": "127.0.0.1",
            "_memory": int(machine.memory_gib * GIB),
            "_temp_dir": str(self._folder),
        }
        with _bare_node(), _apart_from_our_signals(), _our_handler():
            try:
                ray.init(address="local", **wanted, **quiet)
            except Exception as failure:
                # Ray gives its node 30 s, which a busy machine may need for the first import of Ray alone.
                if "timed out during startup" not in str(failure):
                    raise
                ray.init(address="local", **wanted, **quiet)
        return True

    def _set_environment(self) -> None:
        wanted = dict(TRAIN_SETTINGS)
        if self.local:
            # Ray 2.60 switches token authentication on for a Ray of its own. It would write a missing token to a file
            # that every user of the machine can read; a token in our environment stays with this user.
            wanted |= LOCAL_SETTINGS
            wanted["RAY_TRAIN_HEALTH_CHECK_INTERVAL_S"] = "0.2"  # it asks a few workers on this machine
            if not _token_exists():
                wanted["RAY_AUTH_TOKEN"] = _own_token()
        elif _is_loopback(self.address):
            # Ray would put this machine's own address in its place, where a cluster that keeps to loopback does not answer.
            wanted["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"
        for name, value in wanted.items():
            if name not in os.environ:
                self._saved_environment[name] = None
                os.environ[name] = value
        if "RAY_AUTH_MODE" not in os.environ:
            self._saved_environment["RAY_AUTH_MODE"] = None  # Ray sets it

    def _restore_environment(self) -> None:
        for name, value in self._saved_environment.items():
            if value is None:
                os.environ.pop(name, None)
        self._saved_environment.clear()


@functools.cache
def _own_token() -> str:
    """One for all Rays that this process starts: Ray reads it once."""
    return secrets.token_hex(32)


@contextlib.contextmanager
def _bare_node() -> Iterator[None]:
    """Ray starts without the services that one machine has no use for, which halves the CPU time that it takes.

    They are the autoscaler's monitor, the log monitor (nothing is sent to the driver) and the dashboard's server, which
    Ray starts even when the dashboard is off.
    """
    from ray._private.node import Node

    def leave_out(*_: object, **__: object) -> None:
        pass

    services = ("start_monitor", "start_log_monitor", "start_api_server")
    saved = {name: getattr(Node, name) for name in services}
    for name in services:
        setattr(Node, name, leave_out)
    try:
        yield
    finally:
        for name, method in saved.items():
            setattr(Node, name, method)


@contextlib.contextmanager
def _apart_from_our_signals() -> Iterator[None]:
    """Ray's processes start in sessions of their own, which a signal to our process group does not reach.

    Ctrl-C on a terminal and `timeout` signal the whole group. If Ray died of it, the workers could not save. Workers
    inherit the raylet's session. When we die the kernel ends the raylet and the GCS all the same, and they the workers.
    """
    from ray._private import services

    saved = services.ConsolePopen
    services.ConsolePopen = functools.partial(saved, start_new_session=True)
    try:
        yield
    finally:
        services.ConsolePopen = saved


@contextlib.contextmanager
def _our_handler() -> Iterator[None]:
    """Whatever Ray does about SIGTERM within the block is undone: it would print the stacks of its threads and end the process.

    By Python's own functions in C: its `signal` module serves the main thread alone, and a session connects in another.
    """
    get, put = ctypes.pythonapi.PyOS_getsig, ctypes.pythonapi.PyOS_setsig
    get.restype = put.restype = ctypes.c_void_p
    put.argtypes = [ctypes.c_int, ctypes.c_void_p]
    before = get(signal.SIGTERM)
    try:
        yield
    finally:
        put(signal.SIGTERM, before)


def require_cluster(address: str) -> None:
    """Raises unless a head answers and takes our token. Needs Ray, and asks nothing of it that has no end.

    Raises:
        ConnectionError: says which it is; for `auto` too, where a Ray that has ended may have left its address.
    """
    from ray._private.services import canonicalize_bootstrap_address_or_die

    found = canonicalize_bootstrap_address_or_die("auto") if address == "auto" else address
    require_answer(found)
    require_head(found)


def require_answer(address: str, patience_s: float = CONNECT_PATIENCE_S) -> None:
    """Raises unless something accepts connections at a cluster's address within so many seconds.

    Raises:
        ConnectionError: nothing does, or the address is not `auto` or host:port.
    """
    if address in ("auto", "local"):
        return
    host, colon, port = address.rpartition(":")
    if "://" in address or not colon or not port.isdigit():
        raise ConnectionError("the address of a cluster is `auto` or host:port, as in 10.0.0.5:6379")
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=patience_s).close()
    except OSError as error:
        raise ConnectionError(f"nothing answers at {address} ({error.strerror or error})") from error


def _is_loopback(address: str | None) -> bool:
    return (address or "").rpartition(":")[0].strip("[]") in ("127.0.0.1", "localhost", "::1")


def _drop_ray_output(data: dict[str, Any], ignore_prefix: bool) -> None:
    logging.getLogger("ray").debug("%s", data)


def _token_exists() -> bool:
    path = os.environ.get("RAY_AUTH_TOKEN_PATH")
    with contextlib.suppress(OSError, RuntimeError):
        return bool(os.environ.get("RAY_AUTH_TOKEN")) or Path(path or Path.home() / ".ray" / "auth_token").is_file()
    return False


def short_temporary_folder() -> Path:
    folder = tempfile.gettempdir()
    return Path(
        tempfile.mkdtemp(prefix="tunesmith-", dir=folder if len(folder) <= LONGEST_TEMPORARY_FOLDER - 19 else "/tmp")
    )
