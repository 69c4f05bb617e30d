"""What `submit` refuses before it asks any cluster, and what it says when there is none."""

from __future__ import annotations

import socket
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

from tunesmith.cluster.errors import RecipeError, ResourceError, UsageError
from tunesmith.cluster.jobs import commands
from tunesmith.cluster.jobs.client import Cluster
from tunesmith.cluster.jobs.spec import job_id, prefix
from tunesmith.cluster.main import app

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


def test_a_cluster_that_does_not_answer_is_named_after_it_was_said_to_be_waited_for() -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = f"http://127.0.0.1:{probe.getsockname()[1]}"
    told: list[str] = []
    with pytest.raises(ResourceError, match=f"no cluster answers at {address}"):
        Cluster(address, patience_s=1.5, tell=told.append)
    assert told == [f"{address} does not answer; trying for 2 s"]


def test_ids_tell_the_run_and_differ_by_key_and_number() -> None:
    assert job_id("my.bot", "a", 1).startswith("my-bot-")
    assert len({job_id("bot", key, number) for key in "ab" for number in (1, 2)}) == 4
    assert job_id("bot", "a", 7) == prefix("bot", "a") + "7"


def test_status_and_down_without_a_cluster() -> None:
    status = CliRunner().invoke(app, ["status", "--json"])
    assert (status.exit_code, status.stdout) == (1, "{}\n")
    assert CliRunner().invoke(app, ["down", "--json"]).stdout == '{"ended": []}\n'
