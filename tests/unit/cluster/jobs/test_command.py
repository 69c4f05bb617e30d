"""A job's command as its driver sees it: a real `tunesmith`, whose errors and end are read."""

from __future__ import annotations

import os
import signal
from pathlib import Path

from tunesmith.cluster.jobs.command import Command


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
