"""The queue's one decision: from what waits, what runs and what there is, to who starts, who saves, and why the rest waits.

Jobs are taken by priority, then fair share, then age (`shares.py`). Whoever fits starts, whole or not at all. The first that does
not fit keeps room: where it will fit soonest, judging by when running jobs end. Those behind it may start if they are out of
its way: in nodes that it leaves over, or for a time that ends before its room opens (EASY backfill: Lifka, "The ANL/IBM SP Scheduling
System", 1995). A job that outstays such a loan may be asked to save, as may one of lower priority than the first in line; no
more of them than it takes.

Room is kept for one job, so the others of its priority wait for it in turn: a large job is never starved by small ones.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from tunesmith.cluster.queue.room import Amounts, Cluster, Held
from tunesmith.cluster.queue.shares import in_order, totals_of
from tunesmith.cluster.queue.state import (
    Behind,
    Decision,
    Job,
    NeverFits,
    Next,
    Policy,
    Preempt,
    Reason,
    Running,
    Start,
)
from tunesmith.cluster.resources import Node


def decide(
    queue: Sequence[Job],
    running: Sequence[Running],
    nodes: Sequence[Node],
    now: float,
    usage: Mapping[str, float] | None = None,
    policy: Policy | None = None,
) -> Decision:
    """What to do now. The same arguments give the same decision, in whichever order they come.

    Args:
        queue: jobs that wait.
        running: jobs that hold workers, also those that are saving.
        nodes: what each node has for jobs of this queue, free or not.
        now: on the clock of the jobs' times, seconds.
        usage: average dominant share that each user has taken (`shares.Usage.now`).
    """
    nodes = sorted(nodes, key=lambda node: node.name)
    running = sorted(running, key=lambda held: held.job.id)
    cluster = Cluster(nodes)
    order = in_order(queue, running, usage or {}, totals_of(nodes), policy or Policy())
    held = Held(cluster, running)
    return _Pass(cluster, running, held, cluster.total_N3 - held.by(running), now).over(order)


@dataclass(frozen=True)
class _Kept:
    """Room that is kept for the first in line."""

    job: Job
    saving: tuple[str, ...]
    opens_at: float
    """When its room opens: minus infinity when jobs are saving for it, infinity when nobody knows."""
    opens_with: str
    over_N3: Amounts
    """What is free now and that it leaves over."""


@dataclass
class _Pass:
    """One walk over the queue. Free room only shrinks meanwhile, so what did not fit will not fit later."""

    cluster: Cluster
    running: list[Running]
    """Those that started in this pass too."""
    held: Held
    """By those that ran before this pass, or by all when room was first kept."""
    free_N3: Amounts
    now: float
    starts: list[Start] = field(default_factory=list)
    preempts: list[Preempt] = field(default_factory=list)
    kept: _Kept | None = None
    crowded: set[str] = field(default_factory=set)
    """What does not even fit in all that is free."""

    def over(self, order: Sequence[Job]) -> Decision:
        never: dict[str, NeverFits | None] = {}
        """Of each gang, why it never fits, if so."""
        too_large: dict[str, Job] = {}
        """By gang, a job that did not fit where it would be in nobody's way."""
        waiting: list[Job] = []
        hopeless: dict[str, Reason] = {}
        for job in order:
            gang = job.gang
            if gang not in never:
                most = self.cluster.fit(job, self.cluster.total_N3)
                never[gang] = NeverFits(job.need, most) if most < job.need.workers else None
            if (why := never[gang]) is not None:
                hopeless[job.id] = why
            elif gang not in too_large and (placed := self._place(job)) is not None:
                self._start(job, placed)
            elif (placed := self._borrow(job)) is not None:
                self._start(job, placed, lent=True)
            else:
                too_large[gang] = job
                waiting.append(job)
                if self.kept is None:
                    self.kept = self._keep(job)
        return Decision(self.starts, self.preempts, self._reasons(waiting, too_large) | hopeless)

    def _place(self, job: Job) -> dict[str, int] | None:
        """Where the job is in nobody's way."""
        return self.cluster.place(job, self.free_N3 if self.kept is None else self.kept.over_N3)

    def _borrow(self, job: Job) -> dict[str, int] | None:
        """Where the job fits in kept room, if it ends before that opens and could be asked to save if it does not."""
        kept = self.kept
        if kept is None or job.expected_s is None or not job.preemptible or math.isinf(kept.opens_at):
            return None
        if self.now + job.expected_s > kept.opens_at or job.gang in self.crowded:
            return None
        placed = self.cluster.place(job, self.free_N3)
        if placed is None:
            self.crowded.add(job.gang)
        return placed

    def _start(self, job: Job, placed: dict[str, int], lent: bool = False) -> None:
        lent_until = self.kept.opens_at if lent and self.kept is not None else None
        self.starts.append(Start(job, placed, lent_until))
        self.running.append(Running(job, placed, self.now, job.expected_s, lent_until=lent_until))
        self.cluster.take(self.free_N3, job.need, placed)
        if self.kept is not None and lent_until is None:
            self.cluster.take(self.kept.over_N3, job.need, placed)
        elif self.kept is not None:  # what is lent cannot be given away a second time
            np.minimum(self.kept.over_N3, self.free_N3, out=self.kept.over_N3)

    def _keep(self, job: Job) -> _Kept:
        """Where and when the first in line will have room; asks others to save if that makes it."""
        if self.starts:
            self.held = Held(self.cluster, self.running)
        saving = [held for held in self.running if held.saving]
        releases = self._needed(job, saving)
        if releases is None:
            victims = self._victims(job, saving)
            self.preempts += [Preempt(victim.job, job) for victim in victims or ()]
            releases = [*saving, *victims] if victims else None
        if releases is not None:
            names = tuple(held.job.id for held in releases)
            return _Kept(job, names, -math.inf, "", self._over(job, releases))
        ends = sorted(self.running, key=lambda held: (*self._end(held), held.job.id))
        releases = self._needed(job, ends)
        assert releases, f"{job.id} fits the empty cluster, but not after every running job has ended"
        last = releases[-1]
        return _Kept(job, (), self._end(last)[0], last.job.id, self._over(job, releases))

    def _end(self, held: Running) -> tuple[float, float]:
        """When a running job ends; of those of which nobody knows, the oldest first."""
        if held.saving:
            return self.now, held.started_at
        known = math.inf if held.remaining_s is None else self.now + held.remaining_s
        return known, held.started_at

    def _victims(self, job: Job, saving: Sequence[Running]) -> list[Running] | None:
        """Running jobs whose saving makes room for this one; without any of them there would be none.

        The lowest priority first, of one priority the youngest, which loses least.
        """
        candidates = sorted(
            (held for held in self.running if not held.saving and self._may_preempt(job, held)),
            key=lambda held: (held.job.priority, -held.started_at, held.job.id),
        )
        chosen = self._needed(job, [*saving, *candidates], at_least=len(saving))
        if chosen is None:
            return None
        victims = chosen[len(saving) :]
        for held in reversed(victims[:]):
            spared = [other for other in victims if other is not held]
            if self._fits_after(job, [*saving, *spared]):
                victims = spared
        return victims

    def _may_preempt(self, job: Job, held: Running) -> bool:
        outstays = held.lent_until is not None and held.lent_until <= self.now and held.job.priority <= job.priority
        return held.job.preemptible and (held.job.priority < job.priority or outstays)

    def _needed(self, job: Job, ends: Sequence[Running], at_least: int = 0) -> list[Running] | None:
        """The shortest beginning of `ends` after which the job fits, or None; by bisection, as room only grows."""
        low, high = at_least, len(ends)
        if not self._fits_after(job, ends):
            return None
        while low < high:
            middle = (low + high) // 2
            if self._fits_after(job, ends[:middle]):
                high = middle
            else:
                low = middle + 1
        return list(ends[:high])

    def _fits_after(self, job: Job, ends: Sequence[Running]) -> bool:
        return self.cluster.fit(job, self._free_after(ends)) >= job.need.workers

    def _free_after(self, ends: Sequence[Running]) -> Amounts:
        return self.free_N3 + self.held.by(ends)

    def _over(self, job: Job, releases: Sequence[Running]) -> Amounts:
        """What is free now and stays free when the job has its room."""
        after_N3 = self._free_after(releases)
        placed = self.cluster.place(job, after_N3)
        assert placed is not None, f"{job.id} fits, but cannot be placed"
        self.cluster.take(after_N3, job.need, placed)
        return np.minimum(self.free_N3, after_N3)

    def _reasons(self, waiting: Sequence[Job], gangs: Mapping[str, Job]) -> dict[str, Reason]:
        """Why each waits, judged by what is free in the end; `gangs` has one job of each gang that waits."""
        if self.kept is None:
            return {}
        kept, first = self.kept, waiting[0]
        opens_in = kept.opens_at - self.now if math.isfinite(kept.opens_at) else None
        fits = {gang: self.cluster.fit(job, self.free_N3) for gang, job in gangs.items()}
        behind = {gang: Behind(job.need, fits[gang], first.id) for gang, job in gangs.items()}
        reasons: dict[str, Reason] = {job.id: behind[job.gang] for job in waiting}
        reasons[first.id] = Next(first.need, fits[first.gang], kept.saving, opens_in, kept.opens_with)
        return reasons
