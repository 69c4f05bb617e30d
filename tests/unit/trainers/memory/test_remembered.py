"""Simulations are kept between commands, and only found again for the same question."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest

from tunesmith.trainers.memory import remembered
from tunesmith.trainers.memory.simulate import ParameterKind, Simulation

MADE = Simulation({"forward": Counter(activations=7)}, {ParameterKind(4, 4, 2, True, False, True, "body"): 3.0}, 1.5, 4)


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path


def test_what_was_kept_is_found_whole() -> None:
    assert remembered.recall(["question"]) is None
    remembered.remember(["question"], MADE)
    assert remembered.recall(["question"]) == MADE


def test_another_question_or_other_code_finds_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    remembered.remember(["question"], MADE)
    assert remembered.recall(["another"]) is None
    monkeypatch.setattr(remembered, "_code", lambda: ["other code"])
    assert remembered.recall(["question"]) is None


def test_a_damaged_file_counts_as_nothing(home: Path) -> None:
    remembered.remember(["question"], MADE)
    (kept,) = (home / "tunesmith" / "simulations").iterdir()
    kept.write_text("{")
    assert remembered.recall(["question"]) is None


def test_a_home_that_cannot_be_written_to_costs_no_plan(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    remembered.remember(["question"], MADE)
    assert remembered.recall(["question"]) is None
