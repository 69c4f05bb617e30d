"""Machines that are lost, drained and come back: several raylets on this machine, killed from outside."""

from __future__ import annotations

import json
import os
import re
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import small_runs
from clusters import RayCluster
from small_runs import Command

from tunesmith.cluster.runs import RunFolder

Start = Callable[[str], Command]
NOTICED_S = 10.0
"""After which a head that checks every half second has noticed that a node is gone."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("clusters")
    small_runs.write_rows(made / "rows.jsonl")
    return made


@pytest.fixture(scope="module")
def unbroken(folder: Path, tiny_base: Path) -> Path:
    """The run as it goes on this machine alone when nothing happens to it."""
    code, _, said = Command(recipe(folder, tiny_base, "unbroken")).finish()
    assert code == 0, said
    return folder / "runs" / "unbroken"


@pytest.fixture
def cluster() -> Iterator[RayCluster]:
    with RayCluster() as started:
        yield started


@pytest.fixture
def start(folder: Path, tiny_base: Path, cluster: RayCluster) -> Iterator[Start]:
    commands: list[Command] = []

    def begin(name: str) -> Command:
        environment = cluster.environment | {"RAY_ADDRESS": cluster.address}
        commands.append(Command(recipe(folder, tiny_base, name), environment=environment))
        return commands[-1]

    yield begin
    for command in commands:
        command.kill()


def recipe(folder: Path, base: Path, name: str) -> Path:
    made = small_runs.small_recipe(name, base, folder / "rows.jsonl", folder / "runs")
    made["cluster"] |= {"cpus_per_worker": 1, "wait_s": 120}
    return small_runs.write_recipe(folder, made)


def assert_the_same_run(run: Path, unbroken: Path) -> None:
    assert small_runs.what_was_learned(run) == small_runs.what_was_learned(unbroken)
    assert small_runs.weights(run / "artifact") == small_runs.weights(unbroken / "artifact")


def newest_checkpoint(run: Path) -> int:
    return max(int(path.name[5:]) for path in (run / "checkpoints").glob("step-????????"))


def test_a_machine_that_is_gone_is_waited_for_and_nothing_else_is_lost(
    folder: Path, unbroken: Path, cluster: RayCluster, start: Start
):
    run = folder / "runs" / "lost-node"
    nodes = [cluster.add_node(), cluster.add_node()]
    command = start("lost-node")
    command.wait_for_step(run, 5)
    reached = small_runs.last_step(run)
    nodes[1].kill()
    time.sleep(NOTICED_S)
    assert RunFolder(run).current_attempt() == 1, "there is nowhere to go on"
    cluster.add_node()
    code, _, words = command.finish()
    assert code == 0, words
    assert "waiting up to 120 s for machines" in words
    assert "warning: attempt 1 lost" in words
    found = re.search(r"going on from the checkpoint of step (\d+)", words)
    assert found, words
    assert int(found[1]) >= reached // 3 * 3, "more than one interval is repeated"
    assert_the_same_run(run, unbroken)


@pytest.mark.matrix
def test_a_machine_that_is_drained_is_left_in_time(folder: Path, unbroken: Path, cluster: RayCluster, start: Start):
    run = folder / "runs" / "drained"
    cluster.add_node()
    cluster.add_node()
    command = start("drained")
    path = run / "control" / "rank-1.json"
    command.wait_until(path.exists, "rank 1 to begin")
    cluster.drain(json.loads(path.read_text())["node"], within_s=60)
    code, out, words = command.finish()
    assert (code, out) == (75, ""), words
    assert "of rank 1 is to be taken away within" in words
    assert newest_checkpoint(run) == small_runs.last_step(run)
    cluster.add_node()
    code, _, words = start("drained").finish()
    assert code == 0, words
    assert_the_same_run(run, unbroken)


def begun(cluster: RayCluster, start: Start, run: Path, step: int) -> Command:
    """The run on two nodes, so many steps on."""
    cluster.add_node()
    cluster.add_node()
    command = start(run.name)
    command.wait_for_step(run, step)
    return command


@pytest.mark.matrix
def test_a_driver_that_is_killed_leaves_the_cluster_free_and_the_same_command_goes_on(
    folder: Path, unbroken: Path, cluster: RayCluster, start: Start
):
    run = folder / "runs" / "driver"
    command = begun(cluster, start, run, step=5)
    pids = [small_runs.worker_pid(run, rank) for rank in (0, 1)]
    os.killpg(command.process.pid, signal.SIGKILL)
    command.finish()
    code, _, words = start("driver").finish()
    assert code == 0, words
    assert "goes on from step" in words
    small_runs.wait_for_end_of(pids)
    assert_the_same_run(run, unbroken)


@pytest.mark.matrix
def test_a_head_that_is_killed_and_comes_back_loses_nothing(
    folder: Path, unbroken: Path, cluster: RayCluster, start: Start
):
    run = folder / "runs" / "beheaded"
    command = begun(cluster, start, run, step=5)
    assert cluster.head is not None
    cluster.head.kill()
    code, out, words = command.finish()
    assert (code, out) == (1, ""), words
    assert "head of the cluster" in words
    assert "Traceback" not in words
    for node in cluster.nodes:
        node.kill()
    cluster.start_head()
    cluster.add_node()
    cluster.add_node()
    code, _, words = start("beheaded").finish()
    assert code == 0, words
    assert_the_same_run(run, unbroken)
