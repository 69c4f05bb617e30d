"""A sweep whose driver or worker is killed goes on as if nothing had happened."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml
from sweeps import outcome, results, sweep_recipe, with_base_and_rows

from tunesmith.tuning.records import SweepFolder

PATIENCE_S = 240


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return with_base_and_rows(tmp_path_factory.mktemp("sweep-faults"))


@pytest.fixture(scope="module")
def unbroken(folder: Path) -> list[tuple[object, ...]]:
    """What the sweep comes to when nothing happens."""
    run = start(folder, "unbroken")
    assert run.wait(PATIENCE_S) == 0, said(folder, "unbroken")
    return outcome(folder, "unbroken")


GRID = {
    "searcher": "grid",
    "trials": None,
    "space": {"train.learning_rate": {"grid": [1e-4, 1e-3, 1e-2]}, "adaptation.rank": {"grid": [4, 8]}},
}


def start(folder: Path, name: str, max_failures: int = 3, **tune: Any) -> subprocess.Popen[bytes]:
    """`tunesmith sweep` of the test's recipe under this name."""
    path = folder / f"{name}.yaml"
    train = {"max_steps": 40, "max_failures": max_failures}
    path.write_text(yaml.safe_dump(sweep_recipe(folder, name, train=train, reports=8, **tune)))
    log = (folder / f"{name}.log").open("ab")
    command = [sys.executable, "-m", "tunesmith.cluster.main", "sweep", str(path)]
    return subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True)


def said(folder: Path, name: str) -> str:
    return (folder / f"{name}.log").read_text()[-3000:]


def wait_until(run: subprocess.Popen[bytes], condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not condition():
        assert run.poll() is None, "the sweep ended first"
        assert time.monotonic() < deadline
        time.sleep(0.02)


def reports(folder: Path, name: str) -> int:
    """Reports of all trials so far."""
    return sum(len(trial.reports()) for trial in SweepFolder(folder / "runs" / name).trials())


def test_a_killed_driver_loses_nothing(folder: Path, unbroken: list[tuple[object, ...]]) -> None:
    kill_and_start_again(folder, "killed")
    assert outcome(folder, "killed") == unbroken


@pytest.mark.matrix
def test_a_killed_driver_of_a_grid_loses_nothing(folder: Path) -> None:
    whole = start(folder, "whole-grid", **GRID)
    assert whole.wait(PATIENCE_S) == 0, said(folder, "whole-grid")
    kill_and_start_again(folder, "killed-grid", **GRID)
    assert outcome(folder, "killed-grid") == outcome(folder, "whole-grid")


def kill_and_start_again(folder: Path, name: str, **tune: Any) -> None:
    """SIGKILL of the driver half-way, then the same command to its end; nothing that was reported is reported again."""
    run = start(folder, name, **tune)
    wait_until(run, lambda: reports(folder, name) >= 20)
    below = psutil.Process(run.pid).children(recursive=True)
    run.kill()
    run.wait()
    psutil.wait_procs(below, timeout=60)
    kept = {
        trial.number: (trial.root / "reports.jsonl").read_text()
        for trial in SweepFolder(folder / "runs" / name).trials()
        if trial.reports()
    }
    assert kept
    again = start(folder, name, **tune)
    assert again.wait(PATIENCE_S) == 0, said(folder, name)
    for number, before in kept.items():
        after = (SweepFolder(folder / "runs" / name).trial(number).root / "reports.jsonl").read_text()
        assert after.startswith(before), f"trial {number} was run again"


def kill_the_shared_worker(run: subprocess.Popen[bytes], folder: Path, name: str) -> None:
    wait_until(run, lambda: reports(folder, name) >= 10)
    shells = [one for one in psutil.Process(run.pid).children(recursive=True) if "Shell" in " ".join(one.cmdline())]
    assert len(shells) == 1, "the shared worker was not found"
    shells[0].kill()


def test_a_killed_worker_is_replaced(folder: Path, unbroken: list[tuple[object, ...]]) -> None:
    run = start(folder, "lost")
    kill_the_shared_worker(run, folder, "lost")
    assert run.wait(PATIENCE_S) == 0, said(folder, "lost")
    assert outcome(folder, "lost") == unbroken


def test_a_worker_that_may_not_be_replaced_ends_the_sweep_and_says_why(
    folder: Path, unbroken: list[tuple[object, ...]]
) -> None:
    run = start(folder, "once", max_failures=0)
    kill_the_shared_worker(run, folder, "once")
    assert run.wait(PATIENCE_S) not in (0, 75), said(folder, "once")
    last = said(folder, "once").partition("error:")[2]
    assert "could not be trained: a shared worker was lost: " in last
    assert "the same command goes on" in last
    again = start(folder, "once", max_failures=0)
    assert again.wait(PATIENCE_S) == 0, said(folder, "once")
    assert outcome(folder, "once") == unbroken


def test_a_sweep_that_is_asked_to_stop_goes_on_later(folder: Path, unbroken: list[tuple[object, ...]]) -> None:
    run = start(folder, "stopped")
    wait_until(run, lambda: reports(folder, "stopped") >= 6)
    os.kill(run.pid, signal.SIGTERM)
    assert run.wait(60) == 75, said(folder, "stopped")
    assert "The same command goes on from there." in said(folder, "stopped")
    assert not results(folder, "stopped")["complete"]
    again = start(folder, "stopped")
    assert again.wait(PATIENCE_S) == 0, said(folder, "stopped")
    assert outcome(folder, "stopped") == unbroken
