"""Cases worked out by hand."""

from __future__ import annotations

from tunesmith.cluster.queue.decide import decide
from tunesmith.cluster.queue.state import Behind, Decision, Job, NeverFits, Next, Running
from tunesmith.cluster.resources import Need, Node

NODES = [Node(16, 4, name="a", gpu_kind="H100"), Node(16, 4, name="b", gpu_kind="H100")]
NOW = 1000.0


def job(name: str, workers: int, **about) -> Job:
    return Job(name, about.pop("user", "ann"), Need(workers, 1, 1), about.pop("at", 0.0), **about)


def held(name: str, workers: int, node: str = "a", remaining_s: float | None = None, **about) -> Running:
    state = {key: about.pop(key) for key in ("saving", "lent_until", "started_at") if key in about}
    return Running(job(name, workers, **about), {node: workers}, remaining_s=remaining_s, **state)


def started(decision: Decision) -> dict[str, dict[str, int]]:
    return {start.job.id: start.placed for start in decision.starts}


def test_a_gang_starts_whole_or_not_at_all() -> None:
    decision = decide([job("large", 9), job("small", 2, at=1)], [], NODES, NOW)
    assert started(decision) == {"small": {"a": 2}}
    assert decision.waits == {"large": NeverFits(Need(9, 1, 1), 8)}
    assert "asks for 9 workers of 1 GPU + 1 CPU; the cluster holds 8 of these" in str(decision.waits["large"])


def test_a_gang_goes_to_the_fullest_node_that_takes_it_and_else_spans_few() -> None:
    running = [held("other", 2, "a")]
    assert started(decide([job("pair", 2)], running, NODES, NOW)) == {"pair": {"a": 2}}
    assert started(decide([job("five", 5)], running, NODES, NOW)) == {"five": {"b": 4, "a": 1}}


def test_a_gang_stays_on_gpus_of_one_kind() -> None:
    nodes = [NODES[0], Node(16, 4, name="b", gpu_kind="A100")]
    decision = decide([job("six", 6), job("four", 4, gpu_kind="H100", at=1)], [], nodes, NOW)
    assert started(decision) == {"four": {"a": 4}}
    assert decision.waits["six"] == NeverFits(Need(6, 1, 1), 4)


def test_a_job_without_gpus_leaves_gpu_nodes_alone_while_it_can() -> None:
    plain = Job("plain", "ann", Need(1, 8))
    assert started(decide([plain], [], [*NODES, Node(16, name="z")], NOW)) == {"plain": {"z": 1}}
    assert started(decide([plain], [], NODES, NOW)) == {"plain": {"a": 1}}


def test_priority_comes_before_age_and_age_before_name() -> None:
    queue = [job("old", 8), job("urgent", 8, priority=1, at=5), job("b", 8, at=1), job("a", 8, at=1)]
    decision = decide(queue, [], NODES, NOW)
    assert list(started(decision)) == ["urgent"]
    assert list(decision.waits) == ["old", "a", "b"]


def test_users_take_turns_however_many_jobs_one_of_them_has() -> None:
    queue = [*(job(f"ann-{n}", 2, at=n) for n in range(4)), job("bob-0", 2, user="bob", at=9)]
    assert list(started(decide(queue, [], NODES, NOW)))[:2] == ["ann-0", "bob-0"]


def test_who_has_used_more_lately_waits_longer() -> None:
    queue = [job("ann-0", 8), job("bob-0", 8, user="bob", at=9)]
    assert list(started(decide(queue, [], NODES, NOW, usage={"ann": 0.3}))) == ["bob-0"]


def test_room_is_kept_for_the_first_in_line_and_others_fill_what_it_leaves() -> None:
    running = [held("long", 3, "a", remaining_s=600)]
    queue = [job("whole", 8), job("one", 1, at=1), job("brief", 1, at=2, expected_s=500)]
    decision = decide(queue, running, NODES, NOW)
    assert started(decision) == {"brief": {"a": 1}}
    assert decision.starts[0].lent_until == NOW + 600
    assert decision.waits["whole"] == Next(Need(8, 1, 1), 4, (), 600.0, "long")
    assert "4 of 8 workers of 1 GPU + 1 CPU fit now; room comes in about 10m 00s, with the end of long" in str(
        decision.waits["whole"]
    )
    assert decision.waits["one"] == Behind(Need(1, 1, 1), 4, "whole")
    assert "in room that is kept for whole" in str(decision.waits["one"])


def test_nothing_is_lent_when_nobody_knows_when_the_room_opens() -> None:
    queue = [job("whole", 8), job("brief", 1, at=1, expected_s=1)]
    assert decide(queue, [held("long", 3)], NODES, NOW).starts == []


def test_room_that_is_lent_is_not_given_away_a_second_time() -> None:
    nodes = [*NODES, Node(16, 1, name="c", gpu_kind="H100")]
    queue = [job("eight", 8), job("brief", 5, at=1, expected_s=100), job("one", 1, at=2)]
    decision = decide(queue, [held("long", 4, "b", remaining_s=600)], nodes, NOW)
    assert started(decision) == {"brief": {"a": 4, "c": 1}}
    assert decision.waits["one"] == Behind(Need(1, 1, 1), 0, "eight")


def test_what_the_first_in_line_leaves_over_may_be_taken_for_any_time() -> None:
    running = [held("long", 4, "a", remaining_s=600), held("half", 2, "b", remaining_s=60)]
    queue = [job("four", 4), job("one", 1, at=1)]
    nodes = [*NODES, Node(16, 1, name="c", gpu_kind="H100")]
    decision = decide(queue, running, nodes, NOW)
    assert started(decision) == {"one": {"c": 1}}
    assert decision.starts[0].lent_until is None


def test_the_fewest_jobs_of_lower_priority_save_the_youngest_first() -> None:
    running = [
        held("old", 2, "a", started_at=1),
        held("young", 2, "a", started_at=2),
        held("small", 1, "b", started_at=3),
        held("equal", 3, "b", priority=5, started_at=4),
    ]
    decision = decide([job("urgent", 2, priority=5)], running, NODES, NOW)
    assert [(preempt.victim.id, preempt.beneficiary.id) for preempt in decision.preempts] == [("young", "urgent")]
    assert decision.starts == []
    assert str(decision.waits["urgent"]).endswith("room comes when young has saved")


def test_nobody_more_is_asked_while_those_who_were_are_saving() -> None:
    running = [held("young", 4, "a", saving=True), held("other", 4, "b")]
    decision = decide([job("urgent", 4, priority=5)], running, NODES, NOW)
    assert decision.preempts == []
    assert "young has saved" in str(decision.waits["urgent"])


def test_nobody_saves_for_an_equal_or_where_it_would_not_help_or_who_may_not() -> None:
    assert decide([job("equal", 8)], [held("one", 1)], NODES, NOW).preempts == []
    running = [held("low", 4, "a"), held("high", 4, "b", priority=9)]
    assert decide([job("urgent", 8, priority=5)], running, NODES, NOW).preempts == []
    running = [held("fixed", 4, "a", preemptible=False), held("other", 4, "b", priority=5)]
    assert decide([job("urgent", 4, priority=5)], running, NODES, NOW).preempts == []


def test_a_job_that_outstays_its_loan_saves_for_an_equal() -> None:
    running = [held("slow", 1, "a", lent_until=NOW - 1, at=7)]
    decision = decide([job("whole", 8)], running, NODES, NOW)
    assert [preempt.victim.id for preempt in decision.preempts] == ["slow"]
    running = [held("slow", 1, "a", lent_until=NOW + 1, at=7)]
    assert decide([job("whole", 8)], running, NODES, NOW).preempts == []


def test_workers_on_a_lost_node_hold_nothing() -> None:
    decision = decide([job("eight", 8)], [held("gone", 4, "lost")], NODES, NOW)
    assert started(decision) == {"eight": {"a": 4, "b": 4}}


def test_an_empty_cluster_is_no_error() -> None:
    decision = decide([job("one", 1)], [], [], NOW)
    assert decision.waits == {"one": NeverFits(Need(1, 1, 1), 0)}
