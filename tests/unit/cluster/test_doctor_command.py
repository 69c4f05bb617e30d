"""`tunesmith doctor` as a shell sees it, where there is no cluster."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest


def doctor(*arguments: str, cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    inherited = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    command = [sys.executable, "-m", "tunesmith.cluster.main", "doctor", *arguments]
    return subprocess.run(
        command, capture_output=True, text=True, cwd=cwd, env={**inherited, **environment}, timeout=120
    )


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
    assert "nothing answers there" in found["address"]["what"]
    assert found["versions"]["verdict"] == "ok"


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


@pytest.mark.parametrize("wrong", [["--storage", "s3://bucket/runs"], ["no-such-recipe.yaml"], ["--addres", "auto"]])
def test_a_wrong_command_exits_2(wrong: list[str], tmp_path: Path):
    done = doctor(*wrong, cwd=tmp_path)
    assert done.returncode == 2
    assert "Traceback" not in done.stderr


def flat(text: str) -> str:
    """A table's text without its line breaks."""
    return " ".join(text.split())
