"""Whether an attempt hangs, and who keeps the others waiting."""

from __future__ import annotations

from dataclasses import replace

from tunesmith.trainers.heartbeat import Beat, collective_of
from tunesmith.trainers.stall import StallWatch

WAITS = (
    "loop.py:9 step",
    "torch/distributed/distributed_c10d.py:88 wrapper",
    "torch/distributed/distributed_c10d.py:77 all_reduce",
)
WORKS = ("loop.py:9 step", "policy.py:3 forward")


def beat(rank: int, count: int = 1, still_s: float = 0.0, stack: tuple[str, ...] = WORKS) -> Beat:
    return Beat(1, 100 + rank, "h", count=count, still_s=still_s, stack=stack, collective=collective_of(stack))


def test_the_innermost_collective_is_named_and_not_its_wrappers():
    nested = (*WAITS, "torch/distributed/distributed_c10d.py:99 wrapper")
    assert collective_of(WAITS) == collective_of(nested) == "all_reduce"
    assert collective_of(WORKS) == ""


def test_a_rank_that_falls_silent_is_the_odd_one():
    watch = StallWatch(world=2, stall_s=10)
    for now in range(0, 10, 2):
        assert watch.look({0: beat(0, count=now), 1: beat(1, count=3)}, now) is None
    stall = watch.look({0: beat(0, count=10, stack=WAITS), 1: beat(1, count=3)}, 10)
    assert stall is not None
    assert list(stall.odd) == [1]
    assert stall.what == "rank 1 (process 101 on h) has given no sign of life for 10 s; rank 0 waits in all_reduce"
    assert "    policy.py:3 forward" in stall.report()


def test_clocks_of_machines_do_not_matter_only_that_beats_come():
    watch = StallWatch(world=1, stall_s=10)
    assert all(watch.look({0: beat(0, count=now)}, now) is None for now in range(0, 100, 5))


def test_waiting_for_a_rank_that_still_gets_on_is_no_hang():
    watch = StallWatch(world=2, stall_s=10)
    beats = {0: beat(0, 1, still_s=99, stack=WAITS), 1: beat(1, 1, still_s=3)}
    assert watch.look(beats, 0) is None


def test_when_nobody_gets_on_the_one_outside_the_collective_is_odd():
    watch = StallWatch(world=2, stall_s=10)
    stall = watch.look({0: beat(0, 1, 11, WAITS), 1: beat(1, 1, 11, WORKS)}, 0)
    assert stall is not None
    assert stall.odd == {1: "stands in policy.py:3 forward for 11 s"}


def test_the_minority_is_odd_whatever_it_waits_in():
    watch = StallWatch(world=4, stall_s=10)
    other = (*WAITS[:-1], "torch/distributed/distributed_c10d.py:70 barrier")
    beats = {rank: beat(rank, 1, 11, other if rank == 2 else WAITS) for rank in range(4)}
    stall = watch.look(beats, 0)
    assert stall is not None
    assert stall.odd == {2: "waits in barrier for 11 s"}
    assert "ranks 0, 1, 3 wait in all_reduce" in stall.what


def test_when_all_stand_at_one_place_all_are_named():
    watch = StallWatch(world=2, stall_s=10)
    stall = watch.look({rank: beat(rank, 1, 11, WAITS) for rank in range(2)}, 0)
    assert stall is not None
    assert sorted(stall.odd) == [0, 1]


def test_a_rank_that_has_left_or_not_begun_is_not_waited_for():
    watch = StallWatch(world=2, stall_s=10)
    left = replace(beat(0), has_left=True)
    assert watch.look({0: left}, 0) is None
    assert watch.look({0: left}, 50) is None
    assert StallWatch(world=2, stall_s=10).look({0: beat(0, 1, 60, WAITS)}, 0) is None, "rank 1 is still starting"
