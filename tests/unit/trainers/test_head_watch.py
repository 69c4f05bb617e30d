"""What the driver makes of a head that does not answer."""

from __future__ import annotations

from typing import Any

import pytest

from tunesmith.trainers.head_watch import PATIENCE_S, HeadWatch


class Session:
    head = "10.0.0.1:6379"
    answers = True
    same = True

    def head_answers(self) -> bool:
        return self.answers

    def is_same_cluster(self) -> bool:
        return self.same


@pytest.fixture
def session() -> Any:
    return Session()


def test_a_head_that_answers_is_left_alone(session: Any):
    watch = HeadWatch(session)
    assert [watch.look(now) for now in (0, 100, 1000)] == [None] * 3
    assert not watch.is_silent


def test_silence_is_borne_for_a_while_and_then_told_with_its_length(session: Any):
    watch = HeadWatch(session)
    session.answers = False
    assert watch.look(100) is None
    assert watch.is_silent
    assert watch.look(99 + PATIENCE_S) is None
    assert watch.look(102 + PATIENCE_S) == "the head of the cluster at 10.0.0.1:6379 has not answered for 32 s"


def test_a_head_that_comes_back_in_time_is_as_if_nothing_had_been(session: Any):
    watch = HeadWatch(session)
    for now, session.answers in ((0, False), (20, True), (40, False), (60, True)):
        assert watch.look(now) is None
    assert not watch.is_silent


def test_a_head_that_comes_back_without_its_memory_is_another(session: Any):
    watch = HeadWatch(session)
    session.answers = False
    watch.look(0)
    session.answers, session.same = True, False
    assert watch.look(5) == "the head of the cluster at 10.0.0.1:6379 was started again and has forgotten its cluster"
