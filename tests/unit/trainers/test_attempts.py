"""When lost workers are started again, and when not."""

from __future__ import annotations

import pytest

from tunesmith.trainers.attempts import GiveUp, LostAttempt, Retry, decide


def history(*checkpoints: tuple[int, int]) -> list[LostAttempt]:
    return [
        LostAttempt(number, {1: "process 7 on host died"}, before, after)
        for number, (before, after) in enumerate(checkpoints, start=1)
    ]


def test_a_first_loss_is_retried_and_says_who_and_from_where():
    decision = decide(history((0, 20)), max_failures=3)
    assert decision == Retry("attempt 1 lost rank 1 (process 7 on host died); going on from the checkpoint of step 20")


def test_without_a_checkpoint_it_starts_again():
    decision = decide(history((0, 0)), max_failures=3)
    assert isinstance(decision, Retry)
    assert decision.warning.endswith("starting again from the beginning")


@pytest.mark.parametrize("max_failures", [0, 1, 3])
def test_as_many_restarts_without_a_newer_checkpoint_as_allowed_then_no_more(max_failures: int):
    losses = [(0, 0)] * (max_failures + 1)
    for count in range(1, max_failures + 1):
        assert isinstance(decide(history(*losses[:count]), max_failures), Retry)
    gave_up = decide(history(*losses), max_failures)
    assert isinstance(gave_up, GiveUp)
    assert "rank 1 (process 7 on host died)" in gave_up.what


def test_progress_forgives_earlier_losses():
    assert isinstance(decide(history((0, 0), (0, 0), (0, 20), (20, 20)), max_failures=2), Retry)


def test_a_run_that_keeps_progressing_is_restarted_without_end():
    assert isinstance(decide(history(*((n, n + 1) for n in range(100))), max_failures=1), Retry)
