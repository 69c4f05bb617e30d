"""A serving configuration as a RayService: a worker group for each base, with pods that hold one replica."""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable
from importlib.metadata import version
from typing import Any

from tunesmith.cluster.errors import FleetError, ResourceError, ServeConfigError, UsageError
from tunesmith.cluster.fleet import parse_fleet
from tunesmith.cluster.fleet_file import load_fleets
from tunesmith.cluster.kube import rayservice
from tunesmith.cluster.kube.commands import Wanted
from tunesmith.cluster.kube.pods import PodSize, object_name, on_claim, shared_memory_gib
from tunesmith.serving.config import Base, Serve, load_config

APPLICATION = "tunesmith"
IMPORT_PATH = "tunesmith.serving.deployment:from_mapping"
PROCESS_GIB = 3.0
"""Host memory of an engine's replica besides its weights: Python, PyTorch, the engine, Ray and Serve's proxy."""
SLACK = 1.25
"""Times what is reckoned; a host out of memory kills the pod."""


def documents(wanted: Wanted, weights_gib: Callable[[str, str], float]) -> list[dict[str, Any]]:
    """The RayService of a configuration.

    Args:
        weights_gib: of a base in 16 bits, by its key and path in the configuration; asked for what `wanted` does not say.

    Raises:
        ServeConfigError: the configuration is wrong, or open to everybody.
        UsageError: a size is given of a base that the configuration has not.
        FleetError: a fleet is given, and no base uses GPUs.
        ModelError: nobody knows how large a base is.
        ResourceError: a base's weights do not fit the GPUs of its replica.
    """
    path = wanted.path
    config = load_config(path)
    gpu = _gpu_gib(wanted, config)
    if config.http.auth != "keys":
        what = f"{path}: http.auth: {config.http.auth} lets everybody in who reaches the service"
        raise ServeConfigError(what, "Write auth: keys, and make keys with tunesmith keys create.")
    for name in wanted.weights.keys() - config.bases.keys():
        near = difflib.get_close_matches(name, config.bases, n=1)
        hint = f"Did you mean {near[0]}?" if near else f"Its bases are {', '.join(config.bases)}."
        raise UsageError(f"--weights {name}={wanted.weights[name]:g}: {path} has no base {name}", hint)
    plain = config.model_dump(mode="json", exclude_unset=True)
    plain["registry"] = on_claim("registry", config.registry)
    plain["http"] = plain.get("http", {}) | {"host": "0.0.0.0", "port": rayservice.PORT}
    engines = []
    for key, base in config.bases.items():
        if base.path.startswith(("/", "~")):
            on_claim(f"bases.{key}.path", base.path)
        weights = wanted.weights.get(key) or weights_gib(f"bases.{key}.path", base.path)
        _require_room(key, base, weights, gpu)
        engines.append(_engines(key, base, weights))
    service = rayservice.Service(
        name=object_name(wanted.name or path.stem),
        application=APPLICATION,
        import_path=IMPORT_PATH,
        arguments=plain,
        engines=engines,
        ray_version=version("ray"),
    )
    return rayservice.documents(service, wanted.placement)


def _gpu_gib(wanted: Wanted, config: Serve) -> float | None:
    """Memory of one GPU of the fleet; None without a fleet."""
    if wanted.fleet is None:
        return None
    if not any(base.gpus for base in config.bases.values()):
        raise FleetError(
            f"--fleet {wanted.fleet}: no base of {wanted.path} has gpus, so its pods would have none",
            "Write gpus: 1 below the bases that are to have GPUs, or leave --fleet out.",
        )
    return parse_fleet(wanted.fleet, load_fleets(wanted.fleets)).gpu.memory_gib


def _require_room(name: str, base: Base, weights_gib: float, gpu_gib: float | None) -> None:
    share = {"nf4": 0.27, "int8": 0.52}.get(base.quantization or "", 1.0)  # of 16 bits, with scales
    needed, room = weights_gib * share, (gpu_gib or math.inf) * base.gpus
    if base.gpus and needed > room:
        raise ResourceError(
            f"bases.{name}: its weights are {needed:.1f} GiB, and {base.gpus:g} GPU(s) of {gpu_gib:.1f} GiB have {room:.1f}",
            f"Raise bases.{name}.gpus, quantise it, or take a larger GPU.",
        )


def _engines(name: str, base: Base, weights_gib: float) -> rayservice.Engines:
    scaling = base.autoscaling
    least, most = (scaling.min_replicas, scaling.max_replicas) if scaling else (base.replicas, base.replicas)
    gpus = math.ceil(base.gpus)
    shm = shared_memory_gib(gpus)
    # Weights pass through host memory on their way to a GPU, and stay there without one, in 32 bits where vLLM is not it.
    weights = weights_gib if gpus else 2 * weights_gib + base.memory_gib
    memory = math.ceil(SLACK * (PROCESS_GIB + weights) + shm)
    return rayservice.Engines(
        object_name(name), (least, least, most), PodSize(math.ceil(base.cpus) + 1, memory, gpus, shm)
    )
