"""Slow workers are named."""

from __future__ import annotations

import time

import torch

from tunesmith.trainers.pace import SLOW, WINDOW, Pace, Paces


def told(*ranks: float, steps: int = WINDOW) -> list[str]:
    paces, said = Paces(), list[str]()
    for _ in range(steps):
        paces.note(ranks, said.append)
    return said


def test_a_slow_worker_is_named_once_with_the_numbers():
    assert told(1e-6, 1e-6, 1.5e-6, 1e-6, steps=5 * WINDOW) == [
        "rank 2 takes 1.5 times as long for a token as is usual among the workers (1.5 against 1.0 µs, forward), "
        "and all wait for it"
    ]


def test_of_two_workers_the_slower_is_named():
    assert told(2e-6, 1e-6)[0].startswith("rank 0 takes 2.0 times")


def test_small_differences_single_steps_and_lone_workers_are_nothing():
    assert told(1e-6, (SLOW - 0.05) * 1e-6) == []
    assert told(1e-6) == []
    paces, said = Paces(), list[str]()
    for step in range(WINDOW):
        paces.note((1e-6, 9e-6 if step % 5 == 0 else 1e-6), said.append)
    assert said == []


def test_the_pace_is_time_by_tokens_and_begins_anew_when_it_is_taken():
    pace = Pace(torch.device("cpu"))
    for _ in range(2):
        with pace.forward(tokens=5):
            time.sleep(0.05)
    assert 0.01 <= pace.take() < 0.05
    assert pace.take() == 0.0
