"""Writes that are tried again."""

from __future__ import annotations

import pytest

from tunesmith.cluster import patience
from tunesmith.cluster.errors import DiskFullError, FencedError, StorageError
from tunesmith.cluster.patience import patiently, pauses


@pytest.fixture
def slept(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    found: list[float] = []
    monkeypatch.setattr(patience.time, "sleep", found.append)
    return found


class Failing:
    def __init__(self, *errors: Exception) -> None:
        self.errors = list(errors)

    def __call__(self) -> str:
        if self.errors:
            raise self.errors.pop(0)
        return "written"


@pytest.mark.parametrize("patience_s", [0, 0.5, 1, 10, 120, 1000])
def test_pauses_grow_and_add_up_to_what_is_allowed(patience_s: float):
    found = list(pauses(patience_s))
    assert sum(found) == pytest.approx(patience_s)
    assert max(found, default=0) <= patience.LONGEST_PAUSE_S


def test_storage_that_comes_back_is_written_to(slept: list[float]):
    told: list[str] = []
    write = Failing(StorageError("a: I/O error"), DiskFullError("a: disk full: 9 bytes needed, 3 bytes free"))
    assert patiently(write, 10, told.append) == "written"
    assert slept == [1, 2]
    assert told == [
        "storage fails: a: I/O error; tried again in 1 s",
        "storage fails: a: disk full: 9 bytes needed, 3 bytes free; tried again in 2 s",
    ]


def test_what_does_not_come_back_is_raised_in_the_end(slept: list[float]):
    with pytest.raises(StorageError, match="number 4"):
        patiently(Failing(*(StorageError(f"number {n}") for n in range(10))), 10, lambda _: None)
    assert slept == [1, 2, 4, 3]


def test_without_patience_it_is_tried_once(slept: list[float]):
    with pytest.raises(StorageError):
        patiently(Failing(StorageError("a")), 0, lambda _: None)
    assert slept == []


def test_another_error_is_not_tried_again(slept: list[float]):
    with pytest.raises(FencedError):
        patiently(Failing(FencedError("a newer attempt")), 10, lambda _: None)
    assert slept == []
