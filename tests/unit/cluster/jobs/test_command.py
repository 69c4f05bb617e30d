"""A job's command as its driver sees it: a real `tunesmith`, whose errors and end are read."""

from __future__ import annotations

import io
import os
import signal
from pathlib import Path

from tunesmith.cluster.jobs.command import Command, _Reader


def test_the_last_error_of_a_command_is_kept_and_all_that_it_prints_is_said(tmp_path: Path) -> None:
    said: list[str] = []
    command = Command(["validate", str(tmp_path / "none.yaml")], {}, said.append)
    assert command.wait() == 2
    assert "none.yaml" in command.error
    assert f"error: {command.error}" in said
    assert command.waits == ""


def test_a_command_that_has_no_handler_yet_ends_of_the_signal(tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    os.mkfifo(recipe)  # whoever reads it waits
    command = Command(["validate", str(recipe)], {}, lambda _: None)
    assert command.is_running
    command.save()
    assert command.wait() == -signal.SIGTERM


def test_what_becomes_of_attempts_is_told_apart_from_all_that_is_printed() -> None:
    lost = "attempt 1 lost rank 1 (process 7 on node-1 died); going on from the checkpoint of step 4"
    said: list[str] = []
    reader = _Reader(
        io.StringIO(f"step 5\nwarning: {lost}\nwarning: rank 1 takes 1.3 times as long\nerror: no\n"), said.append
    )
    reader.join(30)
    assert len(said) == 4
    assert list(reader.faults) == [lost]
    assert reader.error == "no"
