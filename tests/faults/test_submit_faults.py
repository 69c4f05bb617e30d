"""Heads and drivers that die while jobs are submitted and at work. A job is one run, and none says running for ever."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import cluster_here
import psutil
import pytest
import small_runs
from cluster_here import jobs, small_job, told, tunesmith, wait_for_state, wait_until

from tunesmith.cluster import local
from tunesmith.cluster.local import Local
from tunesmith.cluster.runs import RunFolder
from tunesmith.cluster.runstore import log_file


@pytest.fixture(scope="module")
def here(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Local]:
    with cluster_here.cluster_here(tmp_path_factory.mktemp("state")) as known:
        yield known


class Started:
    """A `tunesmith` command that goes on meanwhile; what it prints goes to files."""

    def __init__(self, *arguments: str, folder: Path) -> None:
        folder.mkdir()
        self._out, self._said = folder / "stdout", folder / "stderr"
        with self._out.open("w") as out, self._said.open("w") as said:
            command = [sys.executable, "-m", "tunesmith.cluster.main", *arguments]
            self._process = subprocess.Popen(command, stdout=out, stderr=said)

    @property
    def stdout(self) -> str:
        return self._out.read_text()

    @property
    def stderr(self) -> str:
        return self._said.read_text()

    def finish(self, code: int = 0) -> str:
        """All that it has printed, once it has ended with this code."""
        assert self._process.wait(cluster_here.PATIENCE_S) == code, self.stderr
        return self.stdout


def submitted(folder: Path, base: Path, name: str) -> tuple[Path, RunFolder, str]:
    """A job: its recipe, the folder of its run, and its id."""
    recipe = small_job(folder, base, name, epochs=5)
    return recipe, RunFolder(folder / "runs" / name), told("submit", str(recipe))["id"]


def kill_head() -> None:
    """All processes of the head's node at once, as when its machine is switched off."""
    known = local.find()
    assert known is not None
    os.killpg(known.members[0].pid, signal.SIGKILL)
    wait_until_gone(known.members[0])


def wait_until_gone(member: local.Member) -> None:
    deadline = time.monotonic() + 30
    while member.alive:
        assert time.monotonic() < deadline
        time.sleep(0.05)


def bring_back(here: Local) -> None:
    local.up(len(here.members), here.head.cpus, here.head.gpus)


def driver_pid(here: Local) -> int:
    known = local.find()
    assert known is not None
    below = small_runs.processes_below(known.members[0].pid)
    (pid,) = (pid for pid in below if "jobs.driver" in " ".join(psutil.Process(pid).cmdline()))
    return pid


def test_a_killed_head_loses_a_job_that_says_so_and_goes_on_and_submissions_meanwhile_are_one_run(
    here: Local, tmp_path: Path, tiny_base: Path
) -> None:
    recipe, run, first = submitted(tmp_path, tiny_base, "beheaded")
    wait_until(lambda: run.newest_step() >= 3, "a checkpoint")
    with small_runs.frozen(run.root):
        kill_head()
    assert jobs()[first]["why"].endswith("the cluster does not answer now")
    saved = run.newest_step()

    submitting = [Started("submit", str(recipe), "--json", folder=tmp_path / f"submit-{at}") for at in range(6)]
    wait_until(lambda: all("; trying until" in one.stderr for one in submitting), "submission that waits")
    bring_back(here)
    answers = [json.loads(one.finish()) for one in submitting]
    assert len({one["id"] for one in answers}) == 1
    second = answers[0]
    assert (second["number"], [one["new"] for one in answers].count(True)) == (2, 1)
    assert jobs()[first]["state"] == "lost"
    assert "goes on from its newest checkpoint" in jobs()[first]["why"]

    wait_for_state(second["id"], "succeeded")
    assert f"goes on from step {saved}" in tunesmith("logs", second["id"]).stdout
    assert "run beheaded starts" in tunesmith("logs", first).stdout  # later lines come now and then
    steps = [line[0] for line in small_runs.what_was_learned(run.root) if line[1] is not None]
    assert steps == list(range(1, len(steps) + 1))


@pytest.mark.matrix
def test_a_killed_driver_ends_its_job_and_leaves_no_worker_and_the_next_goes_on(
    here: Local, tmp_path: Path, tiny_base: Path
) -> None:
    recipe, run, first = submitted(tmp_path, tiny_base, "shot")
    wait_until(lambda: small_runs.last_step(run.root) >= 4, "step 4")
    with small_runs.frozen(run.root):
        workers = [small_runs.worker_pid(run.root, rank) for rank in (0, 1)]
        os.kill(driver_pid(here), signal.SIGKILL)
    assert "its driver was killed (SIGKILL)" in wait_for_state(first, "failed")["why"]
    small_runs.wait_for_end_of(workers, patience_s=120)
    second = told("submit", str(recipe))
    assert second["number"] == 2
    wait_for_state(second["id"], "succeeded")
    assert "goes on from step" in tunesmith("logs", second["id"]).stdout


@pytest.mark.matrix
def test_following_a_log_goes_on_through_a_restart_of_the_head_and_nothing_is_said_twice(
    here: Local, tmp_path: Path, tiny_base: Path
) -> None:
    _, run, first = submitted(tmp_path, tiny_base, "told")
    wait_until(lambda: small_runs.last_step(run.root) >= 2, "step 2")
    with small_runs.frozen(run.root):
        followed = Started("logs", "-f", first, folder=tmp_path / "followed")
        wait_until(lambda: "has its workers" in followed.stdout, "word of the job")
        kill_head()
    brought = told("up", "--nodes", str(len(here.members)), "--cpus-per-node", str(here.head.cpus))
    assert brought["lost_jobs"] == [first]
    assert followed.finish(code=1) == log_file(run.root, first).read_text()
    assert f"job {first} is lost: " in followed.stderr
    assert jobs()[first]["state"] == "lost"
