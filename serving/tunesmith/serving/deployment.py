"""Starting the service on Ray, and ending it: from `tunesmith serve`, or as the application of a RayService."""

from __future__ import annotations

import itertools
import logging
import os
from pathlib import Path
from typing import Any

import ray
from ray import serve
from ray.serve import Application
from ray.serve.config import BackpressureConfig

from tunesmith.cluster.base import BaseRef
from tunesmith.cluster.errors import ServeError
from tunesmith.serving.bases import RUNS, base_of
from tunesmith.serving.config import Serve
from tunesmith.serving.desk import capacity
from tunesmith.serving.service import APPLICATION, SPARE, EngineReplica, GatewayReplica, desks

CONTROLLER_SETTINGS = {"RAY_SERVE_PROXY_HEALTH_CHECK_PERIOD_S": "1"}
"""Serve replaces a proxy that has failed three checks in a row; by default it makes one in ten seconds."""
LONGEST_REASON = 1000
"""Characters of what a replica failed with."""


def find_bases(config: Serve, output: Path) -> dict[str, BaseRef]:
    """Every base's folder and digest.

    Args:
        output: where hashes are kept.

    Raises:
        ModelError: one cannot be found.
    """
    return {
        name: base_of(f"bases.{name}.path", base.path, RUNS if base.path.startswith("run:") else output)
        for name, base in config.bases.items()
    }


def from_mapping(config: dict[str, Any]) -> Application:
    """The application of a configuration given as plain values: what a RayService, or `serve run`, imports.

    Raises:
        ModelError: a base cannot be found from here.
    """
    checked = Serve.model_validate(config)
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "tunesmith"
    return application(checked, find_bases(checked, cache))


def deploy(config: Serve, bases: dict[str, BaseRef]) -> None:
    """Starts the service on the Ray that this process is connected to, and waits until it answers.

    Raises:
        ServeError: an engine or the gateway does not start; with its own reason.
    """
    logging.getLogger("ray.serve").setLevel(logging.WARNING)
    gateway = application(config, bases)
    serve.start(
        http_options={"host": config.http.host, "port": config.http.port},
        controller_options={"runtime_env": {"env_vars": CONTROLLER_SETTINGS}},
    )
    try:
        serve.run(gateway, name=APPLICATION, route_prefix="/")
    except RuntimeError as error:
        failed = {
            name: one.message
            for name, one in serve.status().applications[APPLICATION].deployments.items()
            if one.status == "DEPLOY_FAILED"
        }
        if not failed:
            raise
        raise ServeError(
            "\n".join(f"{name} does not start: {reason(text)}" for name, text in failed.items())
        ) from error


def reason(message: str) -> str:
    """What a replica failed with, without the traceback that Serve puts before it."""
    _, frame, last = message.rpartition('\n  File "')
    lines = message.splitlines() if not frame else last.splitlines()[1:]  # the frame's own line goes
    text = " ".join(itertools.dropwhile(lambda line: line.startswith("    "), lines))
    return " ".join(text.split())[:LONGEST_REASON]


def application(config: Serve, bases: dict[str, BaseRef]) -> Application:
    """The gateways before their engines, for Serve to run."""
    registry = config.registry if "://" in config.registry else str(Path(config.registry).absolute())
    plain = config.model_dump(mode="json") | {"registry": registry}
    digests = {name: ref.digest for name, ref in bases.items()}
    engines = {}
    for name, base in config.bases.items():
        scale: dict[str, Any] = {"num_replicas": base.replicas}
        if base.autoscaling is not None:
            scale = {"autoscaling_config": base.autoscaling.model_dump()}
        deployment = serve.deployment(EngineReplica).options(  # type: ignore[attr-defined]
            name=f"engine-{name}",
            ray_actor_options={"num_cpus": base.cpus, "num_gpus": base.gpus},
            max_ongoing_requests=base.max_batch + base.queue_length,  # the desk bounds what waits beyond it
            health_check_period_s=2,
            health_check_timeout_s=300,
            graceful_shutdown_timeout_s=60,
            **scale,
        )
        engines[name] = deployment.bind(name, bases[name], base.model_dump(), registry)
    gateway = serve.deployment(GatewayReplica).options(  # type: ignore[attr-defined]
        name="gateway",
        num_replicas=config.http.gateways,
        ray_actor_options={"num_cpus": 0},
        max_ongoing_requests=most_open(config),
        max_queued_requests=SPARE,
        backpressure_config=BackpressureConfig(status_code=503, retry_after_s=2),
        graceful_shutdown_timeout_s=60,
    )
    return gateway.bind(plain, digests, engines)


def most_open(config: Serve) -> int:
    """Requests that a gateway may have open: more than those that the desk lets in would only grow old in it."""
    slots, queue = capacity(config)
    return sum(slots.values()) + sum(queue.values()) + SPARE


def take_down(is_alone: bool) -> None:
    """Ends the service: requests at work may finish, then its application and its desks go.

    Args:
        is_alone: whether nobody else uses this Ray, so that Serve itself goes too.
    """
    if is_alone:
        serve.shutdown()
    elif APPLICATION in serve.status().applications:
        serve.delete(APPLICATION)
    for desk in desks():
        ray.kill(desk)
