"""`tunesmith doctor` as a shell sees it, where there is no cluster."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from tunesmith.cluster import local
from tunesmith.cluster.doctor import command
from tunesmith.cluster.errors import UsageError
from tunesmith.cluster.local_node import NodeSpec


def doctor(*arguments: str, cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    inherited = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    inherited["XDG_STATE_HOME"] = str(cwd.parent / "state-of-nobody")
    asked = [sys.executable, "-m", "tunesmith.cluster.main", "doctor", *arguments]
    return subprocess.run(asked, capture_output=True, text=True, cwd=cwd, env={**inherited, **environment}, timeout=120)


def test_this_machine_is_looked_at_without_starting_ray(tmp_path: Path):
    done = doctor("--json", "--storage", "runs", cwd=tmp_path)
    report = json.loads(done.stdout)
    assert report["facts"]["nodes"] == []
    verdicts = [finding["verdict"] for finding in report["findings"]]
    assert done.returncode == (1 if "failure" in verdicts else 0), done.stderr
    assert report["passed"] == ("failure" not in verdicts)
    assert {"versions", "disks", "compilers", "storage speed"} <= {finding["check"] for finding in report["findings"]}
    assert list(tmp_path.iterdir()) == []


def test_what_fails_is_shown_with_its_fix_and_exits_1(tmp_path: Path):
    done = doctor("--storage", str(tmp_path), cwd=tmp_path, CXX="no-such-compiler")
    assert done.returncode == 1
    assert "no-such-compiler does not compile an extension of Python: there is none on the path" in flat(done.stdout)
    assert "apt-get install g++ python3-dev" in flat(done.stdout)
    assert "compilers" in done.stderr.splitlines()[-2]
    assert "Traceback" not in done.stderr


def test_a_cluster_that_does_not_answer_is_a_failure_and_the_rest_is_looked_at_all_the_same(tmp_path: Path):
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        done = doctor("--address", f"127.0.0.1:{closed.getsockname()[1]}", "--json", cwd=tmp_path)
    assert done.returncode == 1, done.stderr
    found = {finding["check"]: finding for finding in json.loads(done.stdout)["findings"]}
    assert found["address"]["verdict"] == "failure"
    assert "nothing answers at 127.0.0.1:" in found["address"]["what"]
    assert found["versions"]["verdict"] == "ok"


def test_a_web_server_is_no_head_and_is_said_to_be_one_at_once(tmp_path: Path):
    with ThreadingHTTPServer(("127.0.0.1", 0), BaseHTTPRequestHandler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        done = doctor("--address", f"127.0.0.1:{server.server_port}", "--json", cwd=tmp_path)
        server.shutdown()
    assert done.returncode == 1, done.stderr
    found = {one["check"]: one for one in json.loads(done.stdout)["findings"]}
    assert "no head of a Ray cluster answers" in found["address"]["what"]
    assert "a web server does" in found["address"]["what"]
    assert "gcs_client.cc" not in done.stderr


def test_the_cluster_of_up_is_looked_at_under_each_of_its_names_and_with_its_token(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.delenv("RAY_AUTH_TOKEN", raising=False)
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", "of somebody before")
    spec = NodeSpec("head", True, 1, 0, 1.0, 6399, 8299, "ray", "ready")
    known = local.Local(tmp_path, "scratch", [local.Member(spec, 1, 1.0)])
    monkeypatch.setattr(local, "find", lambda: known)
    for named in (None, "auto", "127.0.0.1:6399", "http://127.0.0.1:8299", "127.0.0.1:8299"):
        monkeypatch.delenv("RAY_AUTH_TOKEN_PATH", raising=False)
        assert command.cluster_of_up(named) == "127.0.0.1:6399"
        assert os.environ["RAY_AUTH_TOKEN_PATH"] == str(tmp_path / "token")
    assert command.cluster_of_up("local") == "local"
    assert command.cluster_of_up("10.0.0.5:6379") == "10.0.0.5:6379"
    with pytest.raises(UsageError, match="the dashboard of a cluster that `tunesmith up` has not started"):
        command.cluster_of_up("http://10.0.0.5:8265")


def test_a_recipe_says_what_its_workers_need(tmp_path: Path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        "name: bot\nmodel: {base: any}\ndata: {train: rows.jsonl}\nobjective: sft\nadaptation: lora\n"
        "cluster: {workers: 5000}\noutput: {dir: made-by-nobody}\n"
    )
    done = doctor(str(recipe), "--json", cwd=tmp_path)
    assert done.returncode == 1, done.stderr
    [resources] = [one for one in json.loads(done.stdout)["findings"] if one["check"] == "resources"]
    assert resources["what"].startswith("5000 workers × 1 CPU = 5000 CPUs")
    assert not (tmp_path / "made-by-nobody").exists()


def test_an_elastic_recipe_needs_room_for_its_fewest_workers(tmp_path: Path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        "name: bot\nmodel: {base: any}\ndata: {train: rows.jsonl}\nobjective: sft\nadaptation: lora\n"
        "cluster: {workers: {min: 1, max: 5000}, gpus_per_worker: 0, cpus_per_worker: 1}\n"
    )
    done = doctor(str(recipe), "--json", cwd=tmp_path)
    [resources] = [one for one in json.loads(done.stdout)["findings"] if one["check"] == "resources"]
    assert (resources["verdict"], resources["what"]) == ("ok", "1 worker of 1 CPU has room")


@pytest.mark.parametrize("wrong", [["--storage", "s3://bucket/runs"], ["no-such-recipe.yaml"], ["--addres", "auto"]])
def test_a_wrong_command_exits_2(wrong: list[str], tmp_path: Path):
    done = doctor(*wrong, cwd=tmp_path)
    assert done.returncode == 2
    assert "Traceback" not in done.stderr


def flat(text: str) -> str:
    """A table's text without its line breaks."""
    return " ".join(text.split())
