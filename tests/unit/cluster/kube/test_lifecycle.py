"""What pods do before their command and before their end, as KubeRay calls it: another process."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from tunesmith.cluster.errors import RunBusyError
from tunesmith.cluster.kube import lifecycle
from tunesmith.cluster.runs import RunFolder


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    folder = RunFolder(tmp_path / "runs" / "bot")
    folder.create()
    return folder


def called(what: str, run: RunFolder, within: float) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "tunesmith.cluster.kube.lifecycle", what, str(run.root), "--within", str(within)]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)


def test_a_pod_that_ends_asks_the_workers_to_save_and_waits(run: RunFolder) -> None:
    attempt = run.begin_attempt()

    def worker() -> None:
        while not run.stop_requested():
            time.sleep(0.02)
        time.sleep(0.3)  # saving
        run.outcome(attempt).write_text(json.dumps({"kind": "stopped"}))

    training = threading.Thread(target=worker)
    training.start()
    done = called("save", run, 30)
    ended = run.outcome(attempt).exists()
    training.join()
    assert done.returncode == 0, done.stderr
    assert ended


def test_a_save_that_takes_too_long_says_where_the_run_goes_on(run: RunFolder) -> None:
    run.begin_attempt()
    (run.checkpoints / "step-00000020").mkdir()
    done = called("save", run, 0.2)
    assert done.returncode == 1
    assert "run bot has not saved within 0.2 s; it goes on from step 20" in done.stderr


def test_a_finished_run_and_one_that_never_began_are_asked_nothing(run: RunFolder, tmp_path: Path) -> None:
    assert lifecycle.save(run, 1)
    assert not run.stop_requested()
    run.outcome(run.begin_attempt()).write_text("{}")
    assert lifecycle.save(run, 1)
    assert not run.stop_requested()
    nothing = RunFolder(tmp_path / "runs" / "other")
    assert lifecycle.save(nothing, 1)
    assert not nothing.root.exists()


def test_a_retry_waits_until_the_attempt_before_lets_go(run: RunFolder) -> None:
    locked, release = threading.Event(), threading.Event()

    def before() -> None:
        with run.lock():
            locked.set()
            release.wait(30)

    other = threading.Thread(target=before)
    other.start()
    assert locked.wait(10)
    with pytest.raises(RunBusyError, match="being worked on by process"):
        lifecycle.wait_for_turn(run, 0.2)
    threading.Timer(0.5, release.set).start()
    began = time.monotonic()
    lifecycle.wait_for_turn(run, 30)
    assert time.monotonic() - began > 0.3
    other.join()


def test_waiting_for_a_run_that_does_not_exist_does_not_make_it(tmp_path: Path) -> None:
    nothing = RunFolder(tmp_path / "runs" / "other")
    assert called("turn", nothing, 5).returncode == 0
    assert not nothing.root.exists()
