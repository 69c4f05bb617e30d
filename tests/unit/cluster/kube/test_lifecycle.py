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


def called(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "tunesmith.cluster.kube.lifecycle", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)


def job_of(run: RunFolder, folder: Path, within_s: float, *command: str) -> Path:
    path = folder / "job.json"
    job = {"run": str(run.root), "within_s": within_s, "directory": str(folder), "command": list(command)}
    path.write_text(json.dumps(job))
    return path


def test_a_pod_that_ends_asks_the_workers_to_save_and_waits(run: RunFolder) -> None:
    attempt = run.begin_attempt()

    def worker() -> None:
        while not run.stop_requested(attempt):
            time.sleep(0.02)
        time.sleep(0.3)  # saving
        run.outcome(attempt).write_text(json.dumps({"kind": "stopped"}))

    training = threading.Thread(target=worker)
    training.start()
    done = called("save", run.root, "--within", 30)
    ended = run.outcome(attempt).exists()
    training.join()
    assert done.returncode == 0, done.stderr
    assert ended
    assert "is to end" in run.why_stopped(attempt)
    assert not run.stop_requested(attempt + 1), "a retry is asked nothing"


def test_a_save_that_takes_too_long_says_where_the_run_goes_on(run: RunFolder) -> None:
    run.begin_attempt()
    (run.checkpoints / "step-00000020").mkdir()
    done = called("save", run.root, "--within", 0.2)
    assert done.returncode == 1
    assert "run bot has not saved within 0.2 s; it goes on from step 20" in done.stderr


def test_a_finished_run_and_one_that_never_began_are_asked_nothing(run: RunFolder, tmp_path: Path) -> None:
    assert lifecycle.save(run, 1)
    attempt = run.begin_attempt()
    run.outcome(attempt).write_text("{}")
    assert lifecycle.save(run, 1)
    assert not run.stop_requested(attempt)
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


def test_a_run_that_is_not_free_in_time_ends_the_job_without_its_command(run: RunFolder, tmp_path: Path) -> None:
    with run.lock():
        done = called("run", job_of(run, tmp_path, 0.2, "touch", "began"))
    assert done.returncode == 1
    assert "being worked on by process" in done.stderr
    assert not (tmp_path / "began").exists()


def test_the_command_begins_in_its_directory_with_its_words_as_they_were(tmp_path: Path) -> None:
    nothing = RunFolder(tmp_path / "runs" / "other")
    words = ["adaptation={kind: lora, rank: 16}", "name=it's $HOME; a && b"]
    script = "import json, sys; json.dump(sys.argv[1:], open('words', 'w')); sys.exit(75)"
    done = called("run", job_of(nothing, tmp_path, 5, sys.executable, "-c", script, *words))
    assert done.returncode == 75, done.stderr
    assert json.loads((tmp_path / "words").read_text()) == words
    assert not nothing.root.exists(), "waiting for a run does not make it"
