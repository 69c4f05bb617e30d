"""`tunesmith serve`: starts the service and stays until it is told to end."""

from __future__ import annotations

import os
import signal
import socket
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

from tunesmith.cluster.console import print_json, say, stderr
from tunesmith.cluster.errors import ResourceError, ServeConfigError
from tunesmith.cluster.resources import Node
from tunesmith.cluster.session import RaySession
from tunesmith.serving.config import Serve, load_config
from tunesmith.serving.outside import headers_of
from tunesmith.serving.registry import Registry
from tunesmith.serving.statelog import StateLog


def run(path: Path, as_json: bool) -> None:
    """Serves a configuration until SIGINT or SIGTERM.

    Raises:
        UsageError: the configuration, a base or the port cannot be used.
        KeyboardInterrupt: SIGINT came before the service was up.
    """
    config = load_config(path)
    check(config)
    stop, up = threading.Event(), threading.Event()
    with signals(stop, up), started(config) as url:
        up.set()
        if as_json:
            print_json({"url": url, "models": names(config)})
        say(stderr(), f"{url} answers for {', '.join(names(config))}. Ctrl-C ends it.")
        if config.http.auth == "keys" and not StateLog(config.registry, "keys").read()[1].get("keys"):
            say(stderr(), f"There is no API key yet: tunesmith keys create TENANT --registry {config.registry}")
        stop.wait()
        say(stderr(), "ending: requests at work may finish")


@contextmanager
def started(config: Serve, session: RaySession | None = None) -> Iterator[str]:
    """A service that runs within the block; yields its base URL.

    Args:
        session: a Ray that is there already; None starts one, or joins the cluster of RAY_ADDRESS.
    """
    with session or RaySession() as ray_session:
        nodes = ray_session.nodes()
        if ray_session.local:  # a cluster may be about to grow
            check_room(config, nodes)
            headers_of(config.endpoints, os.environ)  # gateways here have this environment
        from tunesmith.serving import deployment

        output = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "tunesmith"
        bases = deployment.find_bases(config, output)  # what fails here has touched nothing that runs
        try:
            deployment.deploy(config, bases)
            host = f"[{config.http.host}]" if ":" in config.http.host else config.http.host
            yield f"http://{host}:{config.http.port}/v1"
        finally:
            deployment.take_down(ray_session.local)


def names(config: Serve) -> list[str]:
    """What clients may ask for."""
    own = [*config.bases, *config.agents]
    return [*own, *Registry(config.registry).read()[1].without_names(own).adapters]


def check(config: Serve) -> None:
    """Refuses what would fail later, and names what will not be served.

    Raises:
        ServeConfigError: the port is taken.
    """
    catalog = Registry(config.registry).read()[1]
    if twice := sorted(catalog.adapters.keys() & {*config.bases, *config.agents}):
        say(
            stderr(),
            f"{', '.join(twice)}: a base or mixture of the configuration, and also an adapter of {config.registry}, which "
            "is not served; to reach it, give the base or mixture another name",
            "yellow",
        )
    there = {*config.bases, *catalog.adapters}
    for name, agent in config.agents.items():
        asked = {one.model for one in agent.members if one.endpoint is None}
        if missing := sorted(model for model in asked if model.partition("@")[0] not in there):
            say(
                stderr(),
                f"agents.{name}: it asks {', '.join(missing)}: neither a base, nor an adapter of {config.registry} yet",
                "yellow",
            )
    with socket.socket(socket.AF_INET6 if ":" in config.http.host else socket.AF_INET) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((config.http.host, config.http.port))
        except OSError as error:
            raise ServeConfigError(
                f"http: {config.http.host}:{config.http.port} cannot be listened on ({error.strerror or error})",
                "Choose another port, or end what listens there.",
            ) from error


def check_room(config: Serve, nodes: Sequence[Node]) -> None:
    """Refuses replicas that nothing has room for: Ray would wait for ever for a machine that has.

    Raises:
        ResourceError: with the numbers.
    """
    for what in ("cpus", "gpus"):
        wanted = {
            name: getattr(base, what) * (base.autoscaling.min_replicas if base.autoscaling else base.replicas)
            for name, base in config.bases.items()
        }
        there, asked = sum(getattr(node, what) for node in nodes), sum(wanted.values())
        if asked > there + 1e-6:
            each = ", ".join(f"{name} {count:g}" for name, count in wanted.items() if count)
            raise ResourceError(
                f"bases: the replicas reserve {asked:g} {what} ({each}), and this machine has {there:g}",
                f"Lower bases.NAME.{what} or replicas; a share such as 0.5 lets replicas share one.",
            )


@contextmanager
def signals(stop: threading.Event, up: threading.Event) -> Iterator[None]:
    """SIGINT and SIGTERM set the event; a second one ends the process at once.

    Args:
        up: whether the service runs; until then the first one interrupts what the block waits for.
    """
    seen: list[float] = []

    def told(number: int, _frame: FrameType | None) -> None:
        if seen and time.monotonic() - seen[0] > 0.5:
            os._exit(128 + number)
        seen.append(time.monotonic())
        stop.set()
        if not up.is_set():
            raise KeyboardInterrupt if number == signal.SIGINT else SystemExit(128 + number)

    before: dict[int, Any] = {number: signal.signal(number, told) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
