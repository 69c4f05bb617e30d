"""What the driver does about workers that seem to hang, and about storage on which nothing can be heard."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tunesmith.cluster.runs import RunFolder
from tunesmith.trainers.heartbeat import Heartbeat
from tunesmith.trainers.watchman import Watchman


@pytest.fixture
def silent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Watchman:
    """The watchman of two workers that have given one sign of life and no other in the time that they had for it."""
    monkeypatch.setattr("tunesmith.trainers.watchman.interval", lambda stall_s: 0.0)
    monkeypatch.setattr("tunesmith.trainers.watchman._kill", lambda beat: None)  # the beats are this process's
    run = RunFolder(tmp_path / "run")
    run.create()
    watchman = Watchman(run, 1, 2, 0.0, head=None, is_elastic=False, more=lambda: None)
    for rank in range(2):
        Heartbeat(run, 1, rank, 600.0)  # beats once when it is made
    return watchman


def look(watchman: Watchman, times: int) -> list[str]:
    said: list[Any] = []
    for _ in range(times):
        watchman.look(said.append)
    return [event.text for event in said]


def test_workers_that_say_nothing_are_given_up(silent: Watchman):
    assert "attempt 1 hangs: rank 0" in look(silent, 1)[0]
    assert silent.folder.abort_file(1).exists()


def test_nobody_is_given_up_while_storage_fails(silent: Watchman, monkeypatch: pytest.MonkeyPatch):
    really_open = Path.open

    def full(path: Path, mode: str = "r", *arguments: Any, **settings: Any) -> Any:
        if "a" in mode:
            raise OSError(28, "No space left on device")
        return really_open(path, mode, *arguments, **settings)

    with monkeypatch.context() as failing:
        failing.setattr(Path, "open", full)
        assert look(silent, 5) == [
            "storage fails: [Errno 28] No space left on device; whether the workers hang cannot be told meanwhile"
        ]
    assert silent.stall is None
    assert "attempt 1 hangs" in look(silent, 1)[0]
