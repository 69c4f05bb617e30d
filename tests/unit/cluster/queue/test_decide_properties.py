"""What holds of every decision, on clusters and queues that nobody thought of."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import replace

import plain_queue
from hypothesis import given, settings
from hypothesis import strategies as st

from tunesmith.cluster.queue.decide import decide
from tunesmith.cluster.queue.state import Behind, Decision, Job, NeverFits, Next, Running
from tunesmith.cluster.resources import Need, Node

NOW = 1000.0
USERS = ("ann", "bob", "cyd")

nodes_lists = st.lists(
    st.builds(Node, st.sampled_from([4.0, 8.0]), st.sampled_from([0.0, 2.0, 4.0]), st.sampled_from([16.0, math.inf])),
    max_size=5,
).map(lambda nodes: [replace(node, name=f"n{at}", gpu_kind="AB"[at % 2]) for at, node in enumerate(nodes)])
needs = st.builds(
    Need, st.integers(1, 9), st.sampled_from([0.5, 1.0, 2.0]), st.sampled_from([0.0, 1.0]), st.sampled_from([0.0, 4.0])
)
jobs = st.builds(
    Job,
    st.just(""),
    st.sampled_from(USERS),
    needs,
    st.integers(0, 5).map(float),
    st.integers(0, 2),
    st.sampled_from(["", "", "A"]),
    st.booleans(),
    st.none() | st.integers(1, 50).map(float),
)
queues = st.lists(jobs, max_size=12).map(lambda some: [replace(job, id=f"j{at:02}") for at, job in enumerate(some)])
usages = st.dictionaries(st.sampled_from(USERS), st.floats(0, 1))


@st.composite
def situations(draw: st.DrawFn) -> tuple[list[Job], list[Running], list[Node], dict[str, float]]:
    """A queue, and a cluster on which an earlier queue has started what fitted."""
    nodes = draw(nodes_lists)
    earlier = [replace(job, id=f"r{job.id}") for job in draw(queues)]
    running = [
        Running(
            start.job,
            start.placed,
            draw(st.integers(0, 9)),
            draw(st.none() | st.integers(1, 60).map(float)),
            draw(st.booleans()),
            draw(st.none() | st.sampled_from([NOW - 1, NOW + 1])),
        )
        for start in decide(earlier, [], nodes, NOW).starts
    ]
    return draw(queues), running, nodes, draw(usages)


def held_by_node(running: list[Running], decision: Decision) -> Counter[tuple[str, int]]:
    held: Counter[tuple[str, int]] = Counter()
    placed = [(one.job, one.placed) for one in running] + [(start.job, start.placed) for start in decision.starts]
    for job, where in placed:
        for name, workers in where.items():
            for at, each in enumerate(plain_queue.amounts_of(job.need)):
                held[name, at] += workers * each  # type: ignore[assignment]
    return held


@given(situations())
@settings(max_examples=300, deadline=None)
def test_the_decision_is_that_of_the_plain_twin(situation) -> None:
    queue, running, nodes, usage = situation
    decision = decide(queue, running, nodes, NOW, usage)
    starts, preempts, waits = plain_queue.decide(queue, running, nodes, NOW, usage)
    assert [(start.job.id, start.placed, start.lent_until) for start in decision.starts] == starts
    assert [(preempt.victim.id, preempt.beneficiary.id) for preempt in decision.preempts] == preempts
    assert list(decision.waits) == waits


@given(situations(), st.randoms())
@settings(max_examples=150, deadline=None)
def test_it_depends_on_what_there_is_and_not_on_its_order(situation, random) -> None:
    queue, running, nodes, usage = situation
    before = decide(queue, running, nodes, NOW, usage)
    for some in (queue, running, nodes):
        random.shuffle(some)
    assert decide(queue, running, nodes, NOW, usage) == before


@given(situations())
@settings(max_examples=300, deadline=None)
def test_nothing_is_given_away_twice_and_every_gang_is_whole_and_of_one_kind(situation) -> None:
    queue, running, nodes, usage = situation
    decision = decide(queue, running, nodes, NOW, usage)
    held = held_by_node(running, decision)
    for node in nodes:
        for at, has in enumerate((node.cpus, node.gpus, node.memory_gib)):
            assert held[node.name, at] <= has
    kinds = {node.name: node.gpu_kind for node in nodes}
    for start in decision.starts:
        assert sum(start.placed.values()) == start.job.need.workers
        if start.job.need.gpus:
            assert len({kinds[name] for name in start.placed}) == 1
    assert {start.job.id for start in decision.starts} | set(decision.waits) == {job.id for job in queue}
    assert not {start.job.id for start in decision.starts} & set(decision.waits)


@given(situations())
@settings(max_examples=300, deadline=None)
def test_only_lower_priorities_and_overdue_loans_save_and_no_more_than_it_takes(situation) -> None:
    queue, running, nodes, usage = situation
    decision = decide(queue, running, nodes, NOW, usage)
    by_id = {one.job.id: one for one in running}
    for preempt in decision.preempts:
        victim = by_id[preempt.victim.id]
        overdue = victim.lent_until is not None and victim.lent_until <= NOW
        assert victim.job.preemptible
        assert not victim.saving
        assert victim.job.priority < preempt.beneficiary.priority or (
            overdue and victim.job.priority <= preempt.beneficiary.priority
        )
    if decision.preempts:
        gone = {preempt.victim.id for preempt in decision.preempts} | {one.job.id for one in running if one.saving}
        first = decision.preempts[0].beneficiary
        started = [Running(start.job, start.placed) for start in decision.starts]
        for spared in [None, *(preempt.victim.id for preempt in decision.preempts)]:
            left = [one for one in running if one.job.id not in gone or one.job.id == spared]
            free = plain_queue.after(empty(nodes), [*left, *started], sign=-1)
            fits = plain_queue.place(first, free, nodes) is not None
            assert fits == (spared is None), f"{spared} need not have been asked"


@given(situations())
@settings(max_examples=300, deadline=None)
def test_every_reason_is_true(situation) -> None:
    queue, running, nodes, usage = situation
    decision = decide(queue, running, nodes, NOW, usage)
    by_id = {job.id: job for job in queue}
    started = [Running(start.job, start.placed) for start in decision.starts]
    free = plain_queue.after(empty(nodes), [*running, *started], sign=-1)
    firsts = [name for name, reason in decision.waits.items() if isinstance(reason, Next)]
    assert len(firsts) <= 1
    for name, reason in decision.waits.items():
        need = by_id[name].need
        if isinstance(reason, NeverFits):
            assert reason.most == most(by_id[name], empty(nodes), nodes) < need.workers
            continue
        assert reason.fit == most(by_id[name], free, nodes)
        assert f"{reason.fit} of {need.workers} worker" in str(reason)
        if isinstance(reason, Behind):
            assert reason.first == firsts[0]
        elif reason.saving:
            assert set(reason.saving) <= {one.job.id for one in running}
        else:
            assert reason.opens_with in {one.job.id for one in [*running, *started]}


@given(nodes_lists, queues)
@settings(max_examples=100, deadline=None)
def test_nobody_starves_every_job_that_can_ever_fit_starts_in_the_end(nodes, queue) -> None:
    """Jobs run 10 s, whatever was expected of them; a victim saves at once and goes back into the queue."""
    hopeless = {job.id for job in queue if most(job, empty(nodes), nodes) < job.need.workers}
    waiting, running, now, rounds = list(queue), [], 0.0, 0
    while len(waiting) > len(hopeless):
        rounds += 1
        assert rounds <= 4 * len(queue) + 4, f"{[job.id for job in waiting]} starve"
        decision = decide(waiting, running, nodes, now)
        victims = {preempt.victim.id for preempt in decision.preempts}
        starts = {start.job.id for start in decision.starts}
        waiting = [job for job in waiting if job.id not in starts]
        waiting += [one.job for one in running if one.job.id in victims]
        running = [one for one in running if one.job.id not in victims]
        running += [
            Running(start.job, start.placed, now, 10.0, lent_until=start.lent_until) for start in decision.starts
        ]
        if not starts and not victims:
            now += 10.0
            running = [one for one in running if now - one.started_at < 10.0]
    assert {job.id for job in waiting} == hopeless


@given(situations())
@settings(max_examples=300, deadline=None)
def test_those_behind_never_delay_the_first_in_line(situation) -> None:
    """With true estimates: when its room opens, it is there, whoever has started meanwhile."""
    queue, running, nodes, usage = situation
    decision = decide(queue, running, nodes, NOW, usage)
    for name, reason in decision.waits.items():
        if isinstance(reason, Next) and reason.opens_in_s is not None:
            opens = NOW + reason.opens_in_s
            left = [one for one in running if (one.remaining_s or math.inf) + NOW > opens and not one.saving]
            left += [
                Running(start.job, start.placed)
                for start in decision.starts
                if start.job.expected_s is None or NOW + start.job.expected_s > opens
            ]
            free = plain_queue.after(empty(nodes), left, sign=-1)
            job = next(job for job in queue if job.id == name)
            assert plain_queue.place(job, free, nodes) is not None


def empty(nodes: list[Node]) -> plain_queue.Free:
    return {node.name: [node.cpus, node.gpus, node.memory_gib] for node in nodes}


def most(job: Job, free: plain_queue.Free, nodes: list[Node]) -> int:
    """Workers of the job that fit at once on nodes that may host it together."""
    counts = Counter(
        {
            (node.gpu_kind if job.need.gpus else ""): 0
            for node in nodes
            if not job.need.gpus or (node.gpus >= 1 and job.gpu_kind in ("", node.gpu_kind))
        }
    )
    for node in nodes:
        kind = node.gpu_kind if job.need.gpus else ""
        if kind in counts and not (job.need.gpus and node.gpus < 1):
            counts[kind] += plain_queue.hosts(job.need, free[node.name])
    return max(counts.values(), default=0)
