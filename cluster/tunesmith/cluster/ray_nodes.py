"""The nodes of the Ray that this process is connected to, asked of its head within a bound.

Ray's own calls for it wait for a head that is away, and when they have waited for 60 s Ray ends the process.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from tunesmith.cluster.errors import LostHeadError
from tunesmith.cluster.resources import GIB, Node

PATIENCE_S = 5.0


@dataclass(frozen=True)
class RayNode:
    """A live node, as Ray describes it."""

    id: str
    """Ray's, in hexadecimal digits."""
    address: str
    total: dict[str, float]
    """All of each of its resources; `memory` in bytes."""
    free: dict[str, float] = field(default_factory=dict)
    """What nobody has reserved of them."""
    is_draining: bool = False
    """Whether it is about to be taken away."""
    deadline: float | None = None
    """When, in seconds since 1970, if that was said."""

    @property
    def gpu_kind(self) -> str:
        """What Ray calls its accelerators: it announces a resource of that name."""
        prefix = "accelerator_type:"
        return next((name.removeprefix(prefix) for name in self.total if name.startswith(prefix)), "unnamed")

    def has(self, name: str) -> Node:
        """All that it has, under this name."""
        return _node(self.total, name, self.gpu_kind)

    def has_free(self, name: str) -> Node:
        """What nobody uses of it, under this name."""
        return _node(self.free, name, self.gpu_kind)


def ray_nodes() -> list[RayNode]:
    """All live nodes.

    Raises:
        LostHeadError: the head does not answer within 5 s.
    """
    head = _client()
    draining = _ask(head.get_draining_nodes)
    usage = {one.node_id: one for one in _ask(head.get_all_resource_usage).resource_usage_data.batch}
    found = []
    for about in _ask(head.get_all_node_info).values():
        if about.state != about.ALIVE:
            continue
        id, reported = about.node_id.hex(), usage.get(about.node_id)  # of a node that is new, nothing is reported yet
        found.append(
            RayNode(
                id,
                about.node_manager_address,
                dict(about.resources_total),
                dict(reported.resources_available) if reported is not None else {},
                id in draining,
                draining[id] / 1000 if draining.get(id) else None,
            )
        )
    return sorted(found, key=lambda node: node.id)


def joined_cluster_id() -> str:
    """What tells the cluster that this process has joined from every other."""
    return _client().cluster_id.hex()


def cluster_id(address: str) -> str:
    """The same of the cluster whose head answers at an address."""
    from ray import _raylet

    raylet: Any = _raylet
    return raylet.GcsClient(address=address).cluster_id.hex()


def _client() -> Any:
    from ray._private.worker import global_worker

    worker: Any = global_worker
    return worker.gcs_client


def _ask(call: Callable[..., Any]) -> Any:
    from ray.exceptions import RpcError

    try:
        return call(timeout=PATIENCE_S)
    except RpcError as silent:
        raise LostHeadError(f"the head of the cluster does not answer: {silent}") from silent


def _node(resources: dict[str, float], name: str, gpu_kind: str) -> Node:
    memory_gib = resources.get("memory", 0) / GIB
    return Node(resources.get("CPU", 0), resources.get("GPU", 0), memory_gib, name, gpu_kind)
