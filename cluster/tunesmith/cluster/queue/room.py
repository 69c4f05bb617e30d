"""Room on nodes, as arrays: how many workers of a shape fit, and where a gang goes.

Legend: N nodes, 3 resources (CPUs, GPUs, GiB of memory).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from tunesmith.cluster.queue.state import Job, Running
from tunesmith.cluster.resources import Need, Node

_ROUNDING = 1e-9
"""Shares of a core that sums of fractions may be off by."""
_ENDLESS = 1 << 30
"""Workers that fit where a resource has no limit."""

Amounts = NDArray[np.float64]


class Cluster:
    """The nodes by kind of GPU. A gang never spans two kinds: the slower one would set the pace of all."""

    def __init__(self, nodes: Sequence[Node]) -> None:
        self.names = [node.name for node in nodes]
        self.index = {name: at for at, name in enumerate(self.names)}
        self.total_N3: Amounts = np.array(
            [(node.cpus, node.gpus, node.memory_gib) for node in nodes], np.float64
        ).reshape(-1, 3)
        with_gpus = np.array([node.gpus >= 1 for node in nodes], bool)
        self._by_kind = {
            kind: np.array([has and node.gpu_kind == kind for node, has in zip(nodes, with_gpus, strict=True)], bool)
            for kind in sorted({node.gpu_kind for node, has in zip(nodes, with_gpus, strict=True) if has})
        }
        self._bare, self._all = ~with_gpus, np.ones(len(nodes), bool)

    def groups(self, job: Job) -> Iterable[NDArray[np.bool_]]:
        """The sets of nodes that may host the job, the preferred first: a job without GPUs leaves GPU nodes alone if it can."""
        if not job.need.gpus:
            return (self._bare, self._all)
        if job.gpu_kind:
            return (self._by_kind[job.gpu_kind],) if job.gpu_kind in self._by_kind else ()
        return self._by_kind.values()

    def take(self, amounts_N3: Amounts, need: Need, placed: Mapping[str, int]) -> None:
        """Takes what workers take away, in place."""
        at = [self.index[name] for name in placed]
        each = (need.cpus, need.gpus, need.memory_gib)
        amounts_N3[at] -= np.outer(list(placed.values()), each)

    def fit(self, job: Job, free_N3: Amounts) -> int:
        """Workers of the job that fit at once, on the best of the groups that may host it."""
        hosts_N = workers_that_fit(job.need, free_N3)
        return max((int(hosts_N[group].sum()) for group in self.groups(job)), default=0)

    def place(self, job: Job, free_N3: Amounts) -> dict[str, int] | None:
        """Where the whole gang goes, or None when it does not fit.

        Best fit: on the fullest node that takes all of it, else on the emptiest nodes, so that it spans few, with its
        rest again on the fullest node that takes it.
        """
        hosts_N = workers_that_fit(job.need, free_N3)
        for group in self.groups(job):
            workers = job.need.workers
            if hosts_N[group].sum() < workers:
                continue
            room_N = np.where(group, hosts_N, 0)
            placed: dict[str, int] = {}
            for at in np.argsort(-room_N, kind="stable"):
                enough = np.flatnonzero(room_N >= workers)
                if len(enough):
                    placed[self.names[enough[np.argmin(room_N[enough])]]] = workers
                    return placed
                placed[self.names[at]] = int(room_N[at])
                workers -= int(room_N[at])
                room_N[at] = 0
        return None


def workers_that_fit(need: Need, free_N3: Amounts) -> NDArray[np.int64]:
    """Workers of a shape that each node takes."""
    hosts_N = np.full(len(free_N3), float(_ENDLESS))
    for at, each in enumerate((need.cpus, need.gpus, need.memory_gib)):
        if each > 0:
            np.minimum(hosts_N, np.floor(free_N3[:, at] / each + _ROUNDING), out=hosts_N)
    return np.maximum(hosts_N, 0).astype(np.int64)


class Held:
    """What running jobs hold, as rows of one table, so that any set of them is summed at once.

    Legend: R rows, one for each job and node; J jobs. Workers on nodes that are gone hold nothing.
    """

    def __init__(self, cluster: Cluster, running: Sequence[Running]) -> None:
        self._nodes = len(cluster.names)
        self._number = {held.job.id: number for number, held in enumerate(running)}
        rows = [
            (cluster.index[name], number, workers)
            for number, held in enumerate(running)
            for name, workers in held.placed.items()
            if name in cluster.index
        ]
        self._at_R, self._job_R, workers_R = np.array(rows, np.int64).reshape(-1, 3).T
        needs = [held.job.need for held in running]
        each_J3 = np.array([(need.cpus, need.gpus, need.memory_gib) for need in needs], np.float64).reshape(-1, 3)
        self._amounts_R3 = each_J3[self._job_R] * workers_R[:, None]

    def by(self, some: Sequence[Running]) -> Amounts:
        """What these jobs hold together, by node."""
        counted_J = np.zeros(len(self._number), bool)
        counted_J[[self._number[held.job.id] for held in some]] = True
        rows_R = counted_J[self._job_R]
        at, amounts = self._at_R[rows_R], self._amounts_R3[rows_R]
        columns = [np.bincount(at, amounts[:, of], self._nodes) for of in range(3)]
        return np.stack(columns, axis=1).astype(np.float64, copy=False)
