"""The queue's decision without arrays, bisection or memory of what did not fit: the twin that `tunesmith.cluster.queue` must equal."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from tunesmith.cluster.queue.shares import in_order
from tunesmith.cluster.queue.state import Job, Policy, Running
from tunesmith.cluster.resources import Need, Node

Free = dict[str, list[float]]
Decided = tuple[list[tuple[str, dict[str, int], float | None]], list[tuple[str, str]], list[str]]
"""Starts with places and loans, victims with beneficiaries, and who waits in which order."""


def decide(
    queue: Sequence[Job], running: Sequence[Running], nodes: Sequence[Node], now: float, usage: Mapping[str, float]
) -> Decided:
    nodes = sorted(nodes, key=lambda node: node.name)
    held = sorted(running, key=lambda one: one.job.id)
    totals = (sum(n.cpus for n in nodes), sum(n.gpus for n in nodes), sum(n.memory_gib for n in nodes))
    empty = {node.name: [node.cpus, node.gpus, node.memory_gib] for node in nodes}
    free = after(empty, held, sign=-1)
    kept, opens_at, over = None, math.inf, free
    starts, preempts, waits, never = [], [], [], []
    for job in in_order(queue, held[:], usage, totals, Policy()):
        if place(job, empty, nodes) is None:
            never.append(job.id)
            continue
        lent_until = None
        placed = place(job, free if kept is None else over, nodes)
        known = kept is not None and math.isfinite(opens_at) and job.expected_s is not None
        if placed is None and known and job.preemptible and now + (job.expected_s or 0) <= opens_at:
            placed, lent_until = place(job, free, nodes), opens_at
        if placed is not None:
            starts.append((job.id, placed, lent_until))
            held.append(Running(job, placed, now, job.expected_s, lent_until=lent_until))
            free = after(free, [held[-1]], sign=-1)
            over = after(over, [held[-1]], sign=-1) if lent_until is None else least(over, free)
            continue
        waits.append(job.id)
        if kept is None:
            kept = job
            releases, victims, opens_at = make_room(job, held, free, nodes, now)
            preempts = [(victim.job.id, job.id) for victim in victims]
            later = after(free, releases)
            mine = place(job, later, nodes)
            assert mine is not None
            over = least(free, after(later, [Running(job, mine)], sign=-1))
    return starts, preempts, [*waits, *never]


def make_room(
    job: Job, held: Sequence[Running], free: Free, nodes: Sequence[Node], now: float
) -> tuple[list[Running], list[Running], float]:
    """Whose end the job waits for, whom to ask to save, and when there is room."""
    saving = [one for one in held if one.saving]
    for count in range(len(saving) + 1):
        if place(job, after(free, saving[:count]), nodes) is not None:
            return saving[:count], [], -math.inf
    lower = [
        one
        for one in held
        if not one.saving and one.job.preemptible
        and (one.job.priority < job.priority
             or (one.lent_until is not None and one.lent_until <= now and one.job.priority <= job.priority))
    ]  # fmt: skip
    lower.sort(key=lambda one: (one.job.priority, -one.started_at, one.job.id))
    for count in range(1, len(lower) + 1):
        if place(job, after(free, [*saving, *lower[:count]]), nodes) is not None:
            victims = lower[:count]
            for one in reversed(lower[:count]):
                spared = [other for other in victims if other is not one]
                if place(job, after(free, [*saving, *spared]), nodes) is not None:
                    victims = spared
            return [*saving, *victims], victims, -math.inf

    def end(one: Running) -> float:
        return now if one.saving else math.inf if one.remaining_s is None else now + one.remaining_s

    ends = sorted(held, key=lambda one: (end(one), one.started_at, one.job.id))
    for count in range(1, len(ends) + 1):
        if place(job, after(free, ends[:count]), nodes) is not None:
            return ends[:count], [], end(ends[count - 1])
    raise AssertionError("does not fit the empty cluster")


def after(free: Free, some: Sequence[Running], sign: int = 1) -> Free:
    """The room when these have given theirs back; with `sign` -1, when they have taken it."""
    left = {name: list(amounts) for name, amounts in free.items()}
    for one in some:
        for name, workers in one.placed.items():
            if name in left:
                for at, each in enumerate(amounts_of(one.job.need)):
                    left[name][at] += sign * workers * each
    return left


def least(one: Free, other: Free) -> Free:
    return {name: [min(pair) for pair in zip(one[name], other[name], strict=True)] for name in one}


def amounts_of(need: Need) -> tuple[float, float, float]:
    return need.cpus, need.gpus, need.memory_gib


def hosts(need: Need, amounts: Sequence[float]) -> int:
    """Workers that fit in these amounts."""
    most = min((has // each for has, each in zip(amounts, amounts_of(need), strict=True) if each), default=1 << 30)
    return max(0, int(most))


def place(job: Job, free: Free, nodes: Sequence[Node]) -> dict[str, int] | None:
    """On the fullest node that takes all that is left, else on the emptiest, again and again."""
    if job.need.gpus:
        kinds = sorted({node.gpu_kind for node in nodes if node.gpus >= 1})
        wanted = [kind for kind in kinds if job.gpu_kind in ("", kind)]
        groups = [[node.name for node in nodes if node.gpus >= 1 and node.gpu_kind == kind] for kind in wanted]
    else:
        groups = [[node.name for node in nodes if node.gpus < 1], [node.name for node in nodes]]
    for group in groups:
        room = {name: hosts(job.need, free[name]) for name in group}
        if sum(room.values()) < job.need.workers:
            continue
        left, placed = job.need.workers, {}
        while left:
            enough = [name for name in room if room[name] >= left]
            name = min(enough, key=room.__getitem__) if enough else max(room, key=room.__getitem__)
            placed[name] = min(left, room.pop(name))
            left -= placed[name]
        return placed
    return None
