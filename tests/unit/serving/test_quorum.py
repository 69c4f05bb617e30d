"""How long a mixture waits, and which proposal it takes for the best."""

from __future__ import annotations

import pytest

from tunesmith.serving.quorum import Arrivals, best, seconds_to_wait


@pytest.mark.parametrize(
    ("asked", "answered", "failed", "now", "quorum", "wait"),
    [
        # began at 100, deadline 30, grace 2
        (3, (), 0, 100, None, 30),
        (3, (), 0, 129, None, 1),
        (3, (), 0, 130, None, None),
        (3, (101,), 0, 101, None, 29),
        (3, (101, 102), 0, 110, None, 20),
        (3, (101, 102, 103), 0, 103, None, None),
        (3, (101,), 2, 101, None, None),
        (3, (), 3, 101, None, None),
        (3, (101, 102), 0, 102, 2, 2),
        (3, (101, 102), 0, 103.5, 2, 0.5),
        (3, (101, 102), 0, 104, 2, None),
        (4, (101, 102, 103), 0, 103.5, 2, 0.5),  # the third does not begin the grace anew
        (3, (129, 129.5), 0, 129.5, 2, 0.5),  # the deadline comes before the grace's end
        (3, (101,), 1, 105, 2, 25),  # the quorum needs the last one
        (3, (101,), 0, 101, 1, 2),
        (2, (101, 102), 0, 102, 5, None),
        (3, (101, 102), 0, 102, 5, 28),  # a quorum of more than there are is all of them
    ],
)
def test_the_wait_is_over_with_all_or_at_the_deadline_or_after_the_grace(asked, answered, failed, now, quorum, wait):
    got = seconds_to_wait(Arrivals(asked, answered, failed), 100, now, 30, quorum, 2)
    assert got == (None if wait is None else pytest.approx(wait))


@pytest.mark.parametrize(
    ("texts", "index"),
    [
        (["Paris"], 0),
        (["The capital is Paris.", "It is London, I guess", "the  capital is paris!"], 0),
        (["42", "41", "The answer is 42.", "The answer is 42!"], 2),
        (["a", "a"], 0),
        (["", "x y z", "x  y z"], 1),
        (["東京は日本の首都です", "大阪です", "東京は日本の首都"], 0),
        (["rambling " * 500 + "and wrong", "def f(x): return x + 1", "def f(x):\n    return x + 1"], 1),
    ],
)
def test_the_best_agrees_most_with_the_others_and_is_the_first_of_equals(texts, index):
    assert best(texts) == index
