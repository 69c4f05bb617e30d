"""A diary tells once what was done, and keeps sums of answers alone."""

from __future__ import annotations

from typing import Any

import numpy as np

from tunesmith.cluster.sketch import PARTS, answers_in
from tunesmith.serving.engines.diary import Diary
from tunesmith.serving.engines.protocol import Version

SUPPORT, SALES = Version("a" * 64, ""), Version("b" * 64, "")


class Spells:
    """Decodes everything as one text."""

    def __init__(self, text: str = "Well") -> None:
        self.text = text

    def decode(self, ids: list[int], **_: Any) -> str:
        return self.text


def test_what_was_done_is_told_once() -> None:
    diary = Diary()
    diary.loaded("a")
    diary.loaded("a")
    diary.evicted("b")
    news = diary.take()
    assert news is not None
    assert (news.loads, news.evictions, news.sketches) == (("a", "a"), ("b",), {})
    assert diary.take() is None


def test_answers_add_up_by_version() -> None:
    diary = Diary()
    diary.answered(SUPPORT, [1, 2], [3, 4, 5], Spells())
    diary.answered(SUPPORT, [1], [3], Spells("I'm sorry, but"))
    diary.answered(SALES, [], [9], Spells())
    news = diary.take()
    assert news is not None
    support, sales = news.sketches[SUPPORT.digest], news.sketches[SALES.digest]
    assert (answers_in(support), answers_in(sales)) == (2, 1)
    assert (support[PARTS["prompt_tokens"]].sum(), support[PARTS["answer_tokens"]].sum()) == (3, 4)
    assert (support[PARTS["refusals"]], sales[PARTS["refusals"]]) == (1, 0)
    assert isinstance(support, np.ndarray)


def test_the_base_alone_and_empty_answers_are_not_kept() -> None:
    diary = Diary()
    diary.answered(None, [1], [2], Spells())
    diary.answered(SUPPORT, [1], [], Spells())
    assert diary.take() is None
