"""What `jobs`, `logs`, `describe` and `stop` answer where the cluster is gone, and what they exit with."""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from dashboard import Answers, running
from typer.testing import CliRunner

from tunesmith.cluster.errors import TunesmithError
from tunesmith.cluster.jobs import commands, views
from tunesmith.cluster.jobs.spec import JobSpec
from tunesmith.cluster.main import app
from tunesmith.cluster.runstore import HEARD_S, JobRecord, RunStore, keep, log_file


@pytest.fixture(autouse=True)
def own_state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    monkeypatch.setattr(commands, "ASK_AGAIN_S", 0.1)
    monkeypatch.setattr(views, "ASK_CLUSTER_S", 0.1)
    for name in ("RAY_API_SERVER_ADDRESS", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH", "TUNESMITH_STORE"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def dead() -> Iterator[str]:
    """A port of this machine on which nobody listens."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        yield f"127.0.0.1:{probe.getsockname()[1]}"


def a_job(tmp_path: Path, id: str = "bot-1", **fields) -> JobRecord:
    """A job that this machine knows, as its submitter and its driver have left it."""
    folder = tmp_path / "runs/bot"
    about = {"key": "bot", "number": 1, "run": "bot", "folder": str(folder), "user": "ann", "submitted_at": time.time()}
    submitted = JobRecord(id=id, **about, cluster=fields.pop("cluster", "http://gone:8265"))
    RunStore().add(submitted, "submitted")
    left = submitted.model_copy(update={"heard_at": time.time(), **fields})
    keep(left)
    log_file(folder, id).write_text("step 1\n")
    return left


@dataclass
class Ended:
    """What a command has printed, and with which code it has ended."""

    exit_code: int
    stdout: str
    stderr: str


def run(*arguments: str) -> Ended:
    done = CliRunner().invoke(app, list(arguments))
    if isinstance(done.exception, TunesmithError):
        return Ended(done.exception.exit_code, done.stdout, f"{done.stderr}{done.exception}")
    return Ended(done.exit_code, done.stdout, done.stderr)


@pytest.mark.parametrize(
    ("state", "exit_code", "code", "says"),
    [
        ("succeeded", 0, 0, "job bot-1 has succeeded"),
        ("failed", 1, 1, "job bot-1 has failed: it broke"),
        ("failed", 2, 2, "job bot-1 has failed: it broke"),
        ("failed", -9, 1, "job bot-1 has failed: it broke"),
        ("stopped", 75, 75, "job bot-1 is stopped: it broke"),
        ("stopped", None, 75, "job bot-1 is stopped: it broke"),
        ("lost", None, 1, "job bot-1 is lost: it broke"),
    ],
)
def test_who_follows_a_log_learns_how_the_job_ended(
    tmp_path: Path, state: str, exit_code: int | None, code: int, says: str
) -> None:
    a_job(tmp_path, state=state, exit_code=exit_code, why="it broke", ended_at=time.time())
    followed = run("logs", "-f", "bot")
    assert (followed.exit_code, followed.stdout) == (code, "step 1\n")
    assert says in followed.stderr
    plain = run("logs", "bot")
    assert (plain.exit_code, plain.stdout) == (0, "step 1\n")


def test_a_driver_that_was_killed_is_lost_to_who_follows_it(tmp_path: Path, dead: str) -> None:
    a_job(tmp_path, state="running", cluster=f"http://{dead}", submitted_at=1.0, heard_at=1.0)
    followed = run("logs", "-f", "bot", "--address", dead)
    assert (followed.exit_code, followed.stdout) == (1, "step 1\n")
    assert "job bot-1 is lost: its driver was not heard of for" in followed.stderr


def test_after_down_the_store_and_the_folder_answer(tmp_path: Path) -> None:
    a_job(tmp_path, state="failed", why="it broke", exit_code=1, ended_at=time.time())
    listed = run("jobs", "--json")
    assert (listed.exit_code, [one["state"] for one in json.loads(listed.stdout)]) == (0, ["failed"])
    assert "no cluster is named: this is what is known here" in run("jobs").stderr
    described = json.loads(run("describe", "bot", "--json").stdout)
    assert (described["state"], described["why"], described["exit_code"]) == ("failed", "it broke", 1)
    (tmp_path / "state/tunesmith/jobs.db").unlink()
    rebuilt = run("jobs", "--rebuild", str(tmp_path / "runs"))
    assert rebuilt.exit_code == 0
    assert "1 job taken in" in rebuilt.stderr
    assert "bot-1" in rebuilt.stdout


def test_nothing_is_said_of_jobs_that_could_not_be_asked_for(dead: str) -> None:
    listed = run("jobs", "--address", dead)
    assert (listed.exit_code, listed.stdout) == (2, "")
    assert "no jobs" not in listed.stderr
    assert f"no cluster answers at http://{dead}" in listed.stderr
    asked = run("logs", "bot", "--address", dead)
    assert asked.exit_code == 2
    assert f"no job or run bot is known here, and no cluster answers at http://{dead}" in asked.stderr


@pytest.mark.parametrize("scheme", ["", "http://"])
def test_what_is_known_is_listed_before_it_is_said_that_the_cluster_was_not_asked(
    tmp_path: Path, dead: str, scheme: str
) -> None:
    a_job(tmp_path, state="queued", why="no room", cluster=f"http://{dead}")
    listed = run("jobs", "--json", "--address", f"{scheme}{dead}")
    assert listed.exit_code == 2
    assert [one["why"] for one in json.loads(listed.stdout)] == ["no room; the cluster does not answer now"]


def test_a_run_with_two_living_jobs_is_not_stopped_by_its_name(tmp_path: Path) -> None:
    a_job(tmp_path, "bot-1", state="running")
    a_job(tmp_path, "bot-2", state="queued")
    stopped = run("stop", "bot")
    assert stopped.exit_code == 2
    assert "run bot has 2 jobs that have not ended: bot-1, bot-2" in stopped.stderr


def test_what_is_piped_is_one_whole_line_a_job_and_an_old_end_is_left_out(tmp_path: Path) -> None:
    id = "support-lora-168-with-a-long-name-3f2a1b0c-12"
    why = "the queue has said a good deal about why this one waits, " * 3
    a_job(tmp_path, id, state="queued", why=why)
    a_job(tmp_path, "just-failed", state="failed", ended_at=time.time() - 60)
    a_job(tmp_path, "long-ago", state="failed", ended_at=time.time() - 90_000)
    lines = run("jobs").stdout.splitlines()
    assert [line for line in lines if id in line and why.strip() in line]
    assert [line.split()[0] for line in lines if "failed" in line] == ["just-failed"]
    assert "long-ago" in run("jobs", "--all").stdout


def states(*arguments: str) -> dict[str, str]:
    """By id, as `jobs` lists them."""
    return {one["id"]: one["state"] for one in json.loads(run("jobs", "--json", *arguments).stdout)}


def test_a_run_whose_folder_cannot_be_read_keeps_nobody_from_the_others(tmp_path: Path) -> None:
    a_job(tmp_path, state="running")
    (tmp_path / "file").write_text("")
    bad = RunStore().jobs()[0].model_copy(update={"id": "bad-1", "run": "bad", "folder": str(tmp_path / "file/bad")})
    RunStore().add(bad.model_copy(update={"state": "failed", "why": "no folder", "ended_at": time.time()}), "submitted")
    assert states() == {"bad-1": "failed", "bot-1": "running"}
    assert run("logs", "bot").stdout == "step 1\n"
    described = run("describe", "bad")
    assert (described.exit_code, "its folder cannot be read from here" in described.stdout) == (0, True)
    assert json.loads(run("describe", "bad", "--json").stdout)["newest_step"] is None
    unseen = run("logs", "bad")
    assert (unseen.exit_code, "no cluster is named" in unseen.stderr) == (2, True)
    assert run("artifacts", "bad").exit_code == 2
    assert run("stop", "bad").exit_code == 0


def test_a_lost_job_is_listed_for_a_while_after_it_was_last_heard_of(tmp_path: Path) -> None:
    heard_at = time.time() - HEARD_S - 60
    a_job(tmp_path, "just-now", state="running", heard_at=heard_at, submitted_at=1.0)
    a_job(tmp_path, "long-ago", state="running", heard_at=heard_at - 90_000, submitted_at=1.0)
    (listed,) = json.loads(run("jobs", "--json").stdout)
    assert (listed["id"], listed["state"], listed["ended_at"]) == ("just-now", "lost", heard_at)
    assert states("--all") == {"just-now": "lost", "long-ago": "lost"}


def test_jobs_of_a_cluster_that_is_gone_are_known_to_the_one_that_was_made_since(
    tmp_path: Path, answering: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_API_SERVER_ADDRESS", answering)
    a_job(tmp_path, "bot-1", state="succeeded", why="its artifact is whole", ended_at=time.time())
    a_job(tmp_path, "bot-2", state="running", heard_at=1.0, submitted_at=1.0)
    a_job(tmp_path, "bot-3", state="running", why="step 7")
    assert states() == {}
    assert states("--all") == {"bot-1": "succeeded", "bot-2": "lost", "bot-3": "running"}
    lost = json.loads(run("describe", "bot-2", "--json").stdout)
    assert "and its cluster, http://gone:8265, is not the one that was asked; submit it again" in lost["why"]
    living = json.loads(run("describe", "bot-3", "--json").stdout)
    assert living["why"] == "step 7; its cluster, http://gone:8265, is not the one that was asked"
    assert run("logs", "bot").stdout == "step 1\n"
    log_file(tmp_path / "runs/bot", "bot-1").unlink()
    for command in (["logs", "bot-1"], ["logs", "-f", "bot-1"], ["stop", "bot-3"]):
        refused = run(*command)
        assert refused.exit_code == 2
        assert "was submitted to http://gone:8265, and http://127.0.0.1:" in refused.stderr


def test_a_run_of_this_cluster_goes_before_its_namesakes_of_others(
    tmp_path: Path, answering: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    a_job(tmp_path, "bot-2", state="stopped", submitted_at=time.time() + 60)
    job = a_job(tmp_path, "bot-1", state="running", cluster=f"http://{answering}")
    monkeypatch.setattr(Answers, "jobs", [running(spec_of(job))])
    described = json.loads(run("describe", "bot", "--json", "--address", answering).stdout)
    assert (described["id"], described["state"]) == ("bot-1", "running")


def spec_of(job: JobRecord) -> JobSpec:
    return JobSpec(record=job, recipe={}, cwd="", versions={})


def test_who_does_not_wait_for_a_stop_is_told_that_it_was_asked_for(
    tmp_path: Path, answering: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = a_job(tmp_path, state="running", cluster=f"http://{answering}")
    monkeypatch.setattr(Answers, "jobs", [running(spec_of(job))])
    stopped = run("stop", "bot", "--no-wait", "--address", answering)
    assert stopped.exit_code == 0
    assert "job bot-1 is asked to save and stop" in stopped.stderr
    assert "is running" not in stopped.stderr


def test_lost_jobs_are_those_that_nobody_has_submitted_again(
    tmp_path: Path, answering: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    here = {"cluster": f"http://{answering}"}
    again, lost = (a_job(tmp_path, id, state="running", **here) for id in ("bot-1", "other-1"))
    lost = lost.model_copy(update={"key": "other"})
    second = a_job(tmp_path, "bot-2", state="running", **here)
    shown = [running(spec_of(again), node="gone"), running(spec_of(lost), node="gone"), running(spec_of(second))]
    monkeypatch.setattr(Answers, "jobs", shown)
    for job in (again, lost, second):
        keep(job)
    assert [one.id for one in views.View(answering).lost()] == ["other-1"]
