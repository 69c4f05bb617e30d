"""Where jobs of a cluster ask for their turn: one actor that knows who waits and who runs, and lets `queue.decide` decide.

Every driver says each second what its job asks for and which workers it holds, and is told what to do. Whoever is not heard of for
`LEASE_S` is gone, and its workers with it. So the desk has nothing to remember but how much each user has taken; one that was
restarted listens for as long before it lets anybody start.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import ray

from tunesmith.cluster.queue.decide import decide
from tunesmith.cluster.queue.shares import Usage, dominant_share, totals_of
from tunesmith.cluster.queue.state import Behind, Decision, Job, NeverFits, Policy, Running
from tunesmith.cluster.ray_nodes import ray_nodes
from tunesmith.cluster.resources import Need, Node

NAME, NAMESPACE = "tunesmith-desk", "tunesmith"
LEASE_S = 20.0
DECIDE_S = 0.5


@dataclass(frozen=True)
class Answer:
    """What a driver is to do."""

    act: Literal["wait", "start", "go on", "save"]
    why: str = ""
    placed: Mapping[str, int] = field(default_factory=dict)
    """Of `start`: workers by the id of the node on which they are to be."""


@dataclass
class _Ticket:
    job: Job
    heard_at: float
    running: Running | None = None


class Desk:
    """The actor. All times are of this process's own clock, which never goes back."""

    def __init__(self, policy: Policy | None = None, lease_s: float = LEASE_S) -> None:
        self._lease_s = lease_s
        self._policy = policy or Policy()
        self._usage = Usage(self._policy.half_life_s)
        self._tickets: dict[str, _Ticket] = {}
        self._reasons: dict[str, str] = {}
        self._decided_at = 0.0
        self._machines: list[dict[str, float]] = []
        again = ray.get_runtime_context().was_current_actor_reconstructed
        self._opens_at = time.monotonic() + (lease_s if again else 0.0)

    def ask(self, job: Job, waited_s: float, holds: Mapping[str, int] | None, remaining_s: float | None) -> Answer:
        """A driver tells of its job and is told what to do.

        Args:
            job: with any `submitted_at`.
            waited_s: since it was submitted.
            holds: the workers with which it was told to start, if it has not ended since.
            remaining_s: how long it still runs, if it knows; else what its submitter expects counts.
        """
        now = time.monotonic()
        ticket = self._tickets.setdefault(job.id, _Ticket(replace(job, submitted_at=now - waited_s), now))
        ticket.heard_at = now
        if ticket.running is None:
            ticket.job = replace(job, submitted_at=ticket.job.submitted_at)
        if holds is not None and ticket.running is None:  # the desk is new, or has lost it
            ticket.running = Running(ticket.job, holds, now)
        if ticket.running is not None:
            if remaining_s is None and job.expected_s is not None:
                remaining_s = max(0.0, ticket.running.started_at + job.expected_s - now)
            ticket.running = replace(ticket.running, remaining_s=remaining_s)
        if now - self._decided_at >= DECIDE_S:
            self._decide(now)
        if ticket.running is None:
            return Answer("wait", self._reasons.get(job.id, "the queue looks at it in a moment"))
        if ticket.running.saving:
            return Answer("save", self._reasons.get(job.id, ""))
        return Answer("start", placed=ticket.running.placed) if holds is None else Answer("go on")

    def leave(self, id: str) -> None:
        """A job has ended, or waits no more."""
        ticket = self._tickets.pop(id, None)
        if ticket is not None:
            self._release(ticket, time.monotonic())

    def _release(self, ticket: _Ticket, now: float) -> None:
        if ticket.running is not None:
            share = dominant_share(ticket.job.need, totals_of([node.has(node.id) for node in ray_nodes()]))
            self._usage.charge(ticket.job.user, share, ticket.running.started_at, now)
            ticket.running = None

    def _decide(self, now: float) -> None:
        self._decided_at = now
        for id in [id for id, ticket in self._tickets.items() if now - ticket.heard_at > self._lease_s]:
            self.leave(id)
        waiting = [ticket.job for ticket in self._tickets.values() if ticket.running is None]
        if now < self._opens_at:
            why = f"the queue was restarted and listens for {self._opens_at - now:.0f} s more who is still at work"
            self._reasons = {job.id: why for job in waiting}
            return
        running = [ticket.running for ticket in self._tickets.values() if ticket.running is not None]
        decision = decide(waiting, running, _ours(running), now, self._usage.now(now), self._policy)
        self._reasons = {
            id: f"{place}. in line: {reason}" if isinstance(reason, Behind) else str(reason)
            for place, (id, reason) in enumerate(decision.waits.items(), 1)
        }
        for start in decision.starts:
            ticket = self._tickets[start.job.id]
            ticket.running = Running(ticket.job, start.placed, now, start.job.expected_s, lent_until=start.lent_until)
        for preempt in decision.preempts:
            victim = self._tickets[preempt.victim.id]
            assert victim.running is not None, f"{preempt.victim.id} holds nothing that it could give back"
            victim.running = replace(victim.running, saving=True)
            self._reasons[preempt.victim.id] = f"makes room for {preempt.beneficiary.id}"
        self._ask_for_machines([one.need for one in wanted(decision, waiting)])

    def _ask_for_machines(self, waiting: list[Need]) -> None:
        """Tells an autoscaler, where the cluster has one, what is to be there at once; nothing while nobody waits."""
        from ray.autoscaler.sdk import request_resources  # loads much, which drivers do without

        held = [ticket.job.need for ticket in self._tickets.values() if ticket.running is not None]
        workers = [need.ray_resources() for need in (*held, *waiting) for _ in range(need.workers)] if waiting else []
        if workers != self._machines:
            request_resources(bundles=workers)
            self._machines = workers


def _ours(running: list[Running]) -> list[Node]:
    """What each node has for jobs of the queue: all that nobody else holds, as Ray sees it."""
    nodes = []
    for found in ray_nodes():
        if found.is_draining:
            continue  # what would start there would be told to save at once
        node, left = found.has(found.id), found.has_free(found.id)
        held = [(one.job.need, one.placed[node.name]) for one in running if node.name in one.placed]
        cpus = node.cpus - left.cpus - sum(need.cpus * workers for need, workers in held)
        gpus = node.gpus - left.gpus - sum(need.gpus * workers for need, workers in held)
        memory = node.memory_gib - left.memory_gib - sum(need.memory_gib * workers for need, workers in held)
        others = (max(0.0, cpus), max(0.0, gpus), max(0.0, memory))
        nodes.append(
            replace(
                node,
                cpus=node.cpus - others[0],
                gpus=node.gpus - others[1],
                memory_gib=node.memory_gib - others[2],
            )
        )
    return nodes


def wanted(decision: Decision, waiting: Sequence[Job]) -> list[Job]:
    """For which of the jobs that wait machines are asked for: the first in line, and the first that the cluster is too small for."""
    too_large = [id for id, reason in decision.waits.items() if isinstance(reason, NeverFits)]
    first = {*list(decision.waits)[:1], *too_large[:1]}
    return [job for job in waiting if job.id in first]


def find_desk() -> Any:
    """The desk of the cluster that this process is connected to; made if it is not there. It needs no CPU of its own."""
    made = ray.remote(Desk).options(
        name=NAME, namespace=NAMESPACE, lifetime="detached", get_if_exists=True, max_restarts=-1, num_cpus=0
    )
    return made.remote()
