"""What `submit` refuses before it asks any cluster, and what it says when there is none."""

from __future__ import annotations

import json
import os
import re
import socket
from pathlib import Path
from typing import Any

import pytest
import yaml
from dashboard import Answers, running
from typer.testing import CliRunner

from tunesmith.cluster.errors import RecipeError, ResourceError, UsageError
from tunesmith.cluster.jobs import commands
from tunesmith.cluster.jobs.client import Cluster, dashboard_address
from tunesmith.cluster.jobs.spec import JobSpec, job_id, left_out, prefix
from tunesmith.cluster.main import app
from tunesmith.cluster.recipe.load import load_recipe, recipe_hash
from tunesmith.cluster.runstore import JobRecord

RECIPE: dict[str, Any] = {
    "name": "bot",
    "model": {"base": "/nowhere/llama"},
    "data": {"train": "rows.jsonl"},
    "objective": "sft",
    "adaptation": "lora",
}


@pytest.fixture(autouse=True)
def nobody_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    for name in ("RAY_API_SERVER_ADDRESS", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"):
        monkeypatch.delenv(name, raising=False)


def submit(tmp_path: Path, wish: commands.Wish | None = None, **changes: Any) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(RECIPE | changes))
    commands.submit(path, [], wish or commands.Wish(), as_json=True)


def test_without_a_cluster_it_says_how_to_name_one(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no cluster is named") as refused:
        submit(tmp_path)
    assert "tunesmith up" in refused.value.fix


def test_a_recipe_that_names_a_cluster_is_refused_with_its_line(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"recipe.yaml:\d+: a job runs on the cluster that it is submitted to"):
        submit(tmp_path, cluster={"address": "auto"})


@pytest.mark.parametrize("below", ["", "/deeper/still"])
def test_a_folder_that_is_a_file_is_refused_where_it_is_seen(tmp_path: Path, below: str) -> None:
    (tmp_path / "taken").write_text("")
    with pytest.raises(UsageError, match=r"/taken is a file: the run's folder cannot be made there"):
        submit(tmp_path, output={"dir": f"{tmp_path}/taken{below}"})


@pytest.mark.parametrize("wish", [commands.Wish(key=""), commands.Wish(user=" ")], ids=["key", "user"])
def test_a_key_and_a_user_say_something(tmp_path: Path, wish: commands.Wish) -> None:
    with pytest.raises(UsageError, match=r"--(key|user) is empty"):
        submit(tmp_path, wish)


@pytest.mark.parametrize("priority", [-1_000_001, 1_000_001])
def test_a_priority_has_bounds(tmp_path: Path, priority: int) -> None:
    refused = CliRunner().invoke(app, ["submit", "recipe.yaml", "--priority", str(priority)])
    assert refused.exit_code == 2
    assert "Invalid value for '--priority'" in refused.stderr


def test_a_cluster_that_does_not_answer_is_named_after_it_was_said_to_be_waited_for() -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = f"http://127.0.0.1:{probe.getsockname()[1]}"
    told: list[str] = []
    with pytest.raises(ResourceError, match=f"no cluster answers at {address}"):
        Cluster(address, patience_s=1.5, tell=told.append)
    (said,) = told
    assert re.fullmatch(rf"{address} does not answer \(Connection refused\); trying until \d\d:\d\d:\d\d", said)


@pytest.mark.parametrize("address", ["auto", "ray://127.0.0.1:10001", "ftp://head:8265", "http://", "head:port"])
def test_what_is_no_dashboards_address_is_refused_before_anything_is_tried(address: str) -> None:
    with pytest.raises(UsageError, match="jobs are handed to a cluster's dashboard"):
        dashboard_address(address)


def test_a_dashboards_address_has_one_form() -> None:
    assert {dashboard_address(one) for one in ("head:8265", "http://head:8265", "http://head:8265/")} == {
        "http://head:8265"
    }


def test_a_name_that_nothing_has_ends_at_once() -> None:
    with pytest.raises(ResourceError, match=r"no cluster answers at http://no-such-host\.invalid:8265"):
        Cluster("no-such-host.invalid:8265", patience_s=600, tell=pytest.fail)


def test_https_to_a_dashboard_that_speaks_http_ends_at_once(answering: str) -> None:
    with pytest.raises(ResourceError, match=f"no cluster answers at https://{answering}"):
        Cluster(f"https://{answering}", patience_s=600, tell=pytest.fail)


@pytest.mark.parametrize("name", ["RAY_API_SERVER_ADDRESS", "RAY_ADDRESS"])
def test_the_cluster_that_is_named_is_asked_whatever_the_environment_names(
    answering: str, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(name, "http://127.0.0.1:1")
    assert Cluster(answering, patience_s=0).look() == ({}, {})
    assert os.environ[name] == "http://127.0.0.1:1"


def test_what_the_cluster_refuses_is_told_at_once_and_not_tried_again(answering: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=f"at http://{answering} does not take the job: .*no such package"):
        submit(tmp_path, commands.Wish(address=answering))


def test_a_job_that_is_there_and_is_not_ends_the_patience(
    answering: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Answers, "refusal", (400, "Job with submission_id bot-1 already exists."))
    cluster = Cluster(answering, patience_s=0.5)
    monkeypatch.setattr(commands, "Cluster", lambda *_, **__: cluster)
    with pytest.raises(ResourceError, match="already exists"):
        submit(tmp_path, commands.Wish(address=answering))


def test_what_a_head_that_has_not_joined_itself_believes_counts_for_nothing(
    answering: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    cluster = Cluster(answering, patience_s=0.5)
    assert cluster.look() == ({}, {})
    monkeypatch.setattr(Answers, "hostname", None)
    with pytest.raises(ResourceError, match="its head has not yet joined it"):
        cluster.look()


def at_work(tmp_path: Path, **fields: Any) -> JobSpec:
    """The job that the recipe of `submit` stands for, as it was submitted before."""
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(RECIPE | {"output": {"dir": str(tmp_path / "runs")}}))
    folder = str(tmp_path / "runs/bot")
    record = JobRecord(
        id=job_id("bot", folder, 1), key=folder, number=1, run="bot", folder=folder, user="ann", priority=3,
        recipe=recipe_hash(load_recipe(path, [])), submitted_at=1.0,
    )  # fmt: skip
    return JobSpec(record=record, recipe={}, cwd="", versions={}, **fields)


def test_options_that_the_living_job_of_a_key_has_not_are_named(
    answering: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = at_work(tmp_path)
    monkeypatch.setattr(Answers, "jobs", [running(job, {"COLOUR": "blue", "RAY_JOB_STOP_WAIT_TIME_S": "600"})])
    same = ["submit", str(tmp_path / "recipe.yaml"), "--address", answering, "--user", "ann", "--env", "COLOUR=blue"]
    again = CliRunner().invoke(app, [*same, "--priority", "3"])
    assert (again.exit_code, again.stdout) == (0, f"{job.record.id}\n")
    assert "warning" not in again.stderr
    other = CliRunner().invoke(app, [*same, "--priority", "9", "--env", "A=b", "--grace", "30", "--json"])
    assert json.loads(other.stdout)["left_out"] == ["--priority 9", "--env A", "--grace 30"]
    warned = f"warning: job {job.record.id} was submitted without --priority 9, --env A, --grace 30, and goes on"
    assert warned in other.stderr


def test_what_was_given_and_the_job_has_not_is_left_out(tmp_path: Path) -> None:
    job = at_work(tmp_path, secrets={"KEY": "env:KEY"}, expected_s=3600.0)
    shipped = {"py_modules": ["tunesmith"], "env_vars": {"A": "1"}}
    assert left_out(job, shipped, job, shipped) == []
    plain = job.model_copy(update={"secrets": {}, "expected_s": None})
    assert left_out(plain, {}, job, shipped) == []
    more = job.model_copy(
        update={"preemptible": False, "check_versions": False, "expected_s": 7200.0, "secrets": {"KEY": "env:OTHER"}}
    )
    assert left_out(more, shipped, job, {"env_vars": {"A": "2"}}) == [
        "--expected-hours 2", "--not-preemptible", "--any-version", "--ship-code", "--env A", "--env KEY",
    ]  # fmt: skip
    other = job.model_copy(update={"record": job.record.model_copy(update={"user": "bob"})})
    assert left_out(other, {}, job, {}) == ["--user bob"]


def test_ids_tell_the_run_and_differ_by_key_and_number() -> None:
    assert job_id("my.bot", "a", 1).startswith("my-bot-")
    assert len({job_id("bot", key, number) for key in "ab" for number in (1, 2)}) == 4
    assert job_id("bot", "a", 7) == prefix("bot", "a") + "7"


def test_status_and_down_without_a_cluster() -> None:
    status = CliRunner().invoke(app, ["status", "--json"])
    assert (status.exit_code, status.stdout) == (1, "{}\n")
    assert CliRunner().invoke(app, ["down", "--json"]).stdout == '{"ended": []}\n'
