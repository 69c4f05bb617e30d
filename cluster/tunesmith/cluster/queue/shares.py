"""Fair shares: whose job is next among those of equal priority.

A job costs its *dominant share*: the largest fraction of any one resource of the cluster that it takes (Ghodsi et al., "Dominant
Resource Fairness", NSDI 2011). Jobs of one user are tagged one after the other, each with what the user has taken and what the
user's jobs before it will cost, divided by the user's weight, and the smallest tag goes first: start-time fair queueing (Goyal,
Vin and Cheng, SIGCOMM 1996) over dominant shares, as in "Multi-Resource Fair Queueing" (Ghodsi et al., SIGCOMM 2012). What has
been taken is what runs now, and an average of the past that halves with time (Kay and Lauder, "A Fair Share Scheduler", CACM 1988).
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from operator import attrgetter

import numpy as np

from tunesmith.cluster.queue.state import Job, Policy, Running
from tunesmith.cluster.resources import Need, Node

Totals = tuple[float, float, float]
"""CPUs, GPUs and GiB of memory of the whole cluster."""


class Usage:
    """What each user has taken, as an average of dominant shares that halves every `half_life_s`."""

    def __init__(self, half_life_s: float) -> None:
        self._rate = math.log(2) / half_life_s
        self._at: dict[str, tuple[float, float]] = {}

    def charge(self, user: str, share: float, start: float, end: float) -> None:
        """The user held a dominant share from `start` to `end` (seconds of one clock; charges of a user come in order)."""
        gained = share * (1 - math.exp(-self._rate * (end - start)))
        self._at[user] = (self.of(user, end) + gained, end)

    def of(self, user: str, now: float) -> float:
        """The user's average share as it counts now, from 0 to 1."""
        share, at = self._at.get(user, (0.0, now))
        return share * math.exp(-self._rate * max(0.0, now - at))

    def now(self, now: float) -> dict[str, float]:
        """Of all users."""
        return {user: self.of(user, now) for user in self._at}


def totals_of(nodes: Sequence[Node]) -> Totals:
    """CPUs, GPUs and memory (GiB) of all nodes together."""
    return (
        sum(node.cpus for node in nodes),
        sum(node.gpus for node in nodes),
        sum(node.memory_gib for node in nodes),
    )


def dominant_share(need: Need, totals: Totals) -> float:
    """The largest fraction of one of the cluster's resources that the gang takes; resources without a limit do not count."""
    taken = (need.cpus * need.workers, need.gpus * need.workers, need.memory_gib * need.workers)
    return max((part / whole for part, whole in zip(taken, totals, strict=True) if 0 < whole < math.inf), default=0.0)


def in_order(
    queue: Sequence[Job], running: Sequence[Running], usage: Mapping[str, float], totals: Totals, policy: Policy
) -> list[Job]:
    """The queue in the order in which jobs are to start: by priority, then fair share, then age."""

    taken = defaultdict(float, usage)
    for held in running:
        taken[held.job.user] += dominant_share(held.job.need, totals)
    tags = {user: share / policy.weights.get(user, 1.0) for user, share in taken.items()}
    costs: dict[str, float] = {}
    by_age = sorted(queue, key=attrgetter("id"))
    by_age.sort(key=attrgetter("submitted_at"))  # two sorts by one key each are faster than one by both
    own_tags, next_tags = [], {}
    for job in by_age:
        user, gang = job.user, job.gang
        cost = costs.get(gang)
        if cost is None:
            cost = costs[gang] = dominant_share(job.need, totals)
        line = job.priority, user
        tag = next_tags.get(line)
        if tag is None:
            tag = tags.get(user, 0.0)
        own_tags.append(tag)
        next_tags[line] = tag + cost / policy.weights.get(user, 1.0)
    ranks = np.lexsort((own_tags, [-job.priority for job in by_age]))  # of equals, the older stays first
    return [by_age[rank] for rank in ranks.tolist()]
