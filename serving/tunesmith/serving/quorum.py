"""The two decisions of a mixture: how long to wait for proposals, and which of them is the best."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Arrivals:
    """What has become of a layer's proposers.

    Attributes:
        asked: how many there are.
        answered: when those that answered did, in the clock's seconds, in order.
        failed: how many will not answer.
    """

    asked: int
    answered: tuple[float, ...]
    failed: int


def seconds_to_wait(
    arrivals: Arrivals, began: float, now: float, deadline_s: float, quorum: int | None, grace_s: float
) -> float | None:
    """How long to go on waiting; None when it is time to go on with what has come.

    That is when all have answered or failed, at the deadline, or `grace_s` after as many as the quorum have answered. A
    quorum that failures have put out of reach waits for the rest.
    """
    if len(arrivals.answered) + arrivals.failed >= arrivals.asked:
        return None
    until = began + deadline_s
    enough = min(quorum or arrivals.asked, arrivals.asked)
    if len(arrivals.answered) >= enough:
        until = min(until, arrivals.answered[enough - 1] + grace_s)
    return until - now if now < until else None


def best(texts: Sequence[str]) -> int:
    """The index of the text that agrees most with the others: the highest mean similarity, the first of equals.

    Errors differ and right answers are alike, so the middle of the answers is the safest (minimum Bayes risk, as
    self-consistency does for short answers). It costs no further model and does not favour length, as choosing the
    longest would. Similarity is Dice's coefficient over sets of three characters, which suits every language and code.
    """
    grams = [_grams(text) for text in texts]
    agreement = [
        sum(_dice(mine, other) for index, other in enumerate(grams) if index != own) for own, mine in enumerate(grams)
    ]
    return agreement.index(max(agreement))


def _grams(text: str) -> set[str]:
    even = re.sub(r"\s+", " ", text.casefold()).strip()
    return {even[at : at + 3] for at in range(max(1, len(even) - 2))}


def _dice(one: set[str], other: set[str]) -> float:
    return 2 * len(one & other) / (len(one) + len(other))
