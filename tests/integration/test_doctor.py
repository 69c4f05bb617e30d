"""The doctor at a Ray that runs: of one node, as a run starts it, and of two."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import ray
from clusters import RayCluster

from tunesmith.cluster.doctor.census import Census
from tunesmith.cluster.doctor.checks import findings
from tunesmith.cluster.doctor.gather import gather
from tunesmith.cluster.session import RaySession


def test_a_node_is_looked_at_by_a_process_of_its_own(ray_session: RaySession, tmp_path: Path):
    ray_session.nodes()  # other tests may have closed it
    folder = tmp_path / "runs"
    seen = gather("auto", folder, None, lambda _: None)
    assert [node.name for node in seen.nodes] == ["node 127.0.0.1"]
    assert seen.nodes[0].versions == seen.driver.versions
    assert seen.nodes[0].auth_mode == "token"
    ports = {one.address for one in seen.nodes[0].listeners}
    assert {one.process for one in seen.nodes[0].listeners} >= {"raylet", "gcs_server"}
    assert ports <= {"127.0.0.1", "::ffff:127.0.0.1", "::1"}
    [volume] = seen.volumes
    assert (volume.reads_ours, volume.we_read, volume.sees_lock, volume.error) == (True, True, True, "")
    assert volume.write_mb_s is not None
    assert volume.write_mb_s > 0
    [clock] = seen.clocks
    assert abs(clock.offset_s) <= clock.uncertainty_s  # it is the same clock
    verdicts = {finding.check: finding.verdict for finding in findings(seen)}
    assert {verdicts[check] for check in ("address", "python", "same versions", "storage", "listeners")} == {"ok"}
    assert verdicts["network"] == "skipped"
    assert not folder.exists(), "it leaves nothing behind"


def test_a_node_that_goes_while_it_is_asked_is_silent_from_then_on(ray_session: RaySession, tmp_path: Path):
    ray_session.nodes()
    with Census() as census:
        (name,) = (machine.name for machine in census.machines(["ray"], str(tmp_path)))
        ray.kill(census._witnesses[name])
        assert census.clocks() == []
        assert list(census.silent) == [name]


def doctor(address: str, folder: Path, **environment: str) -> tuple[int, dict[str, Any], str]:
    """Exit code, what was printed as JSON, and what was said."""
    command = [sys.executable, "-m", "tunesmith.cluster.main", "doctor", "--json"]
    options = ["--address", address, "--storage", str(folder)]
    done = subprocess.run(
        command + options, capture_output=True, text=True, timeout=300, env={**os.environ, **environment}
    )
    assert done.stdout, done.stderr
    return done.returncode, json.loads(done.stdout), done.stderr


def told(report: dict[str, Any], check: str) -> list[dict[str, str]]:
    return [finding for finding in report["findings"] if finding["check"] == check]


@pytest.mark.matrix
def test_two_nodes_are_measured_against_each_other_and_who_has_another_token_learns_it(tmp_path: Path):
    with RayCluster(durable=False) as cluster:
        cluster.add_node()
        sound = {name: cluster.environment[name] for name in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN")}
        code, report, said = doctor(cluster.address, tmp_path, **sound)
        refused, about, lines = doctor(cluster.address, tmp_path, **sound | {"RAY_AUTH_TOKEN": "0" * 64})
    seen = report["facts"]
    assert len({node["name"] for node in seen["nodes"]}) == 2
    assert [(one["reads_ours"], one["we_read"], one["sees_lock"]) for one in seen["volumes"]] == [
        (True, True, True)
    ] * 2
    assert len(seen["clocks"]) == 2
    assert seen["exchange"]["backend"] == "gloo"
    assert seen["exchange"]["error"] == ""
    assert 0 < seen["exchange"]["seconds"] < 60
    assert seen["dashboard"][1] == 401
    assert {one["verdict"] for check in ("address", "token", "listeners") for one in told(report, check)} == {"ok"}
    failed = {one["check"] for one in report["findings"] if one["verdict"] == "failure"}
    assert failed <= {"network"}, said  # a machine that is busy may be slower than the floor
    assert code == (1 if failed else 0)
    assert list(tmp_path.iterdir()) == []

    assert refused == 1
    (why,) = told(about, "address")
    assert "the cluster asks for a token, and this is not its own" in why["what"]
    assert "gcs_client.cc" not in lines


@pytest.mark.matrix
def test_a_cluster_that_takes_anybodys_jobs_fails(tmp_path: Path):
    with RayCluster(durable=False, RAY_AUTH_MODE="disabled") as cluster:
        code, report, said = doctor(cluster.address, tmp_path, RAY_AUTH_MODE="disabled")
    assert code == 1
    wrong = {one["verdict"]: one["what"] for one in told(report, "token") if one["verdict"] != "ok"}
    assert wrong["warning"].startswith("RAY_AUTH_MODE is disabled")
    assert "shows its jobs to anybody (HTTP 200 without a token)" in wrong["failure"]
    assert "token" in said.splitlines()[-2]
