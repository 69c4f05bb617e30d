"""What each worker gets, and whether the machines have it: arithmetic on plain numbers, before anything is launched."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tunesmith.cluster.errors import ResourceError
from tunesmith.cluster.recipe.schema import Cluster

GIB = 2**30


@dataclass(frozen=True)
class Node:
    """What one machine has for us."""

    cpus: float
    """CPU cores."""
    gpus: float = 0
    """GPUs."""
    memory_gib: float = math.inf
    """Host memory that may be reserved, in GiB."""
    name: str = "this machine"
    """How a message names it."""
    gpu_kind: str = ""
    """What its GPUs are called, if that is known."""


@dataclass(frozen=True)
class Need:
    """What the workers ask for. A worker is whole on one node."""

    workers: int
    cpus: float
    gpus: float = 0
    memory_gib: float = 0

    def ray_resources(self) -> dict[str, float]:
        """Of one worker, as Ray wants it. CPUs always: without them Ray pins a GPU worker to one thread."""
        asked = {"CPU": self.cpus, "GPU": self.gpus, "memory": self.memory_gib * GIB}
        return {name: amount for name, amount in asked.items() if amount > 0}

    def __str__(self) -> str:
        """As in `4 workers of 1 GPU + 8 CPUs`."""
        parts = [f"{self.gpus:g} GPU{'s' if self.gpus != 1 else ''}"] if self.gpus else []
        parts += [f"{self.cpus:g} CPU{'s' if self.cpus != 1 else ''}"] if self.cpus else []
        parts += [f"{self.memory_gib:g} GiB"] if self.memory_gib else []
        return f"{self.workers} worker{'s' if self.workers != 1 else ''} of {' + '.join(parts) or 'nothing'}"


def needs(cluster: Cluster, nodes: Sequence[Node]) -> Need:
    """What the recipe asks for on these nodes, with as many workers as it may have.

    A worker's CPUs, when not written, are the cores of a node divided by the workers on it, rounded down, at least 1.
    """
    gpus = cluster.gpus_per_worker
    if gpus is None:
        gpus = 1 if any(node.gpus >= 1 for node in nodes) else 0
    cpus = cluster.cpus_per_worker
    if cpus is None:
        hosts = sorted((node for node in nodes if node.gpus >= gpus), key=lambda node: node.cpus) or list(nodes)
        workers_on_node = math.ceil(cluster.most_workers / max(1, len(hosts)))
        if gpus:
            workers_on_node = max(1, min(cluster.most_workers, int(max(node.gpus for node in hosts) // gpus)))
        cpus = max(1, min(node.cpus for node in hosts) // workers_on_node) if hosts else 1
    return Need(cluster.most_workers, float(cpus), float(gpus), cluster.memory_gib_per_worker or 0.0)


def require_resources(need: Need, have: Sequence[Node]) -> None:
    """Checks that all workers fit at once.

    Raises:
        ResourceError: with the arithmetic, and the recipe values that would fit.
    """
    kinds = (
        ("CPUs", need.cpus, [node.cpus for node in have]),
        ("GPUs", need.gpus, [node.gpus for node in have]),
        ("GiB of memory", need.memory_gib, [node.memory_gib for node in have]),
    )
    where = have[0].name if len(have) == 1 else f"the cluster's {len(have)} nodes"
    verb = "has" if len(have) == 1 else "have"
    for kind, each, amounts in kinds:
        if each > 0 and sum(amounts) < each * need.workers:
            total = _number(each * need.workers)
            raise ResourceError(
                f"{need.workers} workers × {_number(each)} {_unit(kind, each)} = {total} {_unit(kind, each * need.workers)}; "
                f"{where} {verb} {_number(sum(amounts))}",
                _advice(kind, need, amounts),
            )
    together = sum(fitting(node, need) for node in have)
    if together < need.workers:
        each = " + ".join(f"{_number(amount)} {_unit(kind, amount)}" for kind, amount, _ in kinds if amount > 0)
        nodes = "; ".join(f"{node.name}: {fitting(node, need)}" for node in have)
        raise ResourceError(
            f"{need.workers} workers of {each} each, and a worker is whole on one node: only {together} fit ({nodes})",
            f"Use cluster.workers: {together}." if together else "Ask for less per worker.",
        )


def fitting(node: Node, need: Need) -> int:
    """Workers that fit a node at once."""
    pairs = ((node.cpus, need.cpus), (node.gpus, need.gpus), (node.memory_gib, need.memory_gib))
    return int(min((has + 1e-9) // each for has, each in pairs if each > 0 and not math.isinf(has)))


def _advice(kind: str, need: Need, amounts: Sequence[float]) -> str:
    key, each = {
        "CPUs": ("cpus_per_worker", need.cpus),
        "GPUs": ("gpus_per_worker", need.gpus),
        "GiB of memory": ("memory_gib_per_worker", need.memory_gib),
    }[kind]
    options = []
    fewer = int(sum(amount // each for amount in amounts))
    if fewer >= 1:
        options.append(f"cluster.workers: {fewer}")
    if kind == "GPUs":
        options.append("cluster.gpus_per_worker: 0 (trains on CPUs)")
    else:
        share = math.floor(sum(amounts) / need.workers * 100) / 100
        if share > 0:
            options.append(f"cluster.{key}: {_number(share)}")
    options.append("a larger cluster (cluster.address)")
    return "Use " + ", or ".join(options) + "."


def _number(value: float) -> str:
    return f"{value:.2f}".rstrip("0").rstrip(".")


def _unit(kind: str, amount: float) -> str:
    return kind[:-1] if kind.endswith("s") and amount == 1 else kind


def this_machine() -> Node:
    """The cores, GPUs and available memory that this process may use, containers' limits included."""
    import psutil

    memory = min(psutil.virtual_memory().available, _cgroup_memory())
    return Node(cpus=_usable_cpus(), gpus=_visible_gpus(), memory_gib=memory / GIB)


def _usable_cpus() -> int:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota = _read_words("/sys/fs/cgroup/cpu.max")
    if len(quota) == 2 and quota[0] != "max":
        cores = min(cores, math.ceil(int(quota[0]) / int(quota[1])))
    return max(1, cores)


def _cgroup_memory() -> float:
    limit, used = _read_words("/sys/fs/cgroup/memory.max"), _read_words("/sys/fs/cgroup/memory.current")
    if not limit or limit[0] == "max" or not used:
        return math.inf
    return max(0, int(limit[0]) - int(used[0]))


def _visible_gpus() -> int:
    installed = len(list(Path("/dev").glob("nvidia[0-9]*")))
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is None:
        return installed
    return min(installed, len([name for name in visible.split(",") if name.strip() not in ("", "-1")]))


def _read_words(path: str) -> list[str]:
    try:
        return Path(path).read_text().split()
    except OSError:
        return []
