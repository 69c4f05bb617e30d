"""What `submit` refuses before it asks any cluster, and what it says when there is none."""

from __future__ import annotations

import json
import re
import socket
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

from tunesmith.cluster.errors import RecipeError, ResourceError, UsageError
from tunesmith.cluster.jobs import commands
from tunesmith.cluster.jobs.client import Cluster, dashboard_address
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


class Answers(BaseHTTPRequestHandler):
    """A cluster without jobs that takes none: it answers a submission with what `refusal` says."""

    refusal = (400, "runtime_env: no such package")
    hostname: str | None = "here"
    """Of the head; None while all that is known of it was read from what a head before it has left."""

    def do_GET(self) -> None:
        head = {"nodeId": "h1", "state": "ALIVE", "isHeadNode": True, "startTimeMs": "1795330048495"}
        nodes = {"data": {"summary": [{"raylet": head, "hostname": self.hostname}]}}
        known = {"/api/version": {"ray_version": "2.60.0"}, "/api/jobs/": []}
        self._say(200, json.dumps(known.get(self.path, nodes)))

    def do_POST(self) -> None:
        self._say(*self.refusal)

    def _say(self, status: int, text: str) -> None:
        self.send_response(status)
        self.end_headers()
        self.wfile.write(text.encode())

    def log_message(self, format: str, *args: object) -> None: ...


@pytest.fixture
def answering() -> Iterator[str]:
    with ThreadingHTTPServer(("127.0.0.1", 0), Answers) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"127.0.0.1:{server.server_port}"
        server.shutdown()


def test_https_to_a_dashboard_that_speaks_http_ends_at_once(answering: str) -> None:
    with pytest.raises(ResourceError, match=f"no cluster answers at https://{answering}"):
        Cluster(f"https://{answering}", patience_s=600, tell=pytest.fail)


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


def test_ids_tell_the_run_and_differ_by_key_and_number() -> None:
    assert job_id("my.bot", "a", 1).startswith("my-bot-")
    assert len({job_id("bot", key, number) for key in "ab" for number in (1, 2)}) == 4
    assert job_id("bot", "a", 7) == prefix("bot", "a") + "7"


def test_status_and_down_without_a_cluster() -> None:
    status = CliRunner().invoke(app, ["status", "--json"])
    assert (status.exit_code, status.stdout) == (1, "{}\n")
    assert CliRunner().invoke(app, ["down", "--json"]).stdout == '{"ended": []}\n'
