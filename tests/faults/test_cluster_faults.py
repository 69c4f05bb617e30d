"""Machines that are lost, drained and come back: several raylets on this machine, killed from outside."""

from __future__ import annotations

import json
import os
import re
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import small_runs
from clusters import RayCluster
from small_runs import Command

from tunesmith.cluster.runs import RunFolder

Start = Callable[[str], Command]


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
def durable(request: pytest.FixtureRequest) -> bool:
    """Whether a head that is started again remembers its cluster."""
    return getattr(request, "param", True)


@pytest.fixture
def cluster(durable: bool) -> Iterator[RayCluster]:
    with RayCluster(durable) as started:
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
    made["train"]["epochs"] = 4  # after the first checkpoint, more than a second of a fast machine
    made["cluster"] |= {"cpus_per_worker": 1, "wait_s": 120}
    return small_runs.write_recipe(folder, made)


def assert_the_same_run(run: Path, unbroken: Path) -> None:
    assert small_runs.what_was_learned(run) == small_runs.what_was_learned(unbroken)
    assert small_runs.weights(run / "artifact") == small_runs.weights(unbroken / "artifact")


def newest_checkpoint(run: Path) -> int:
    return max(int(path.name[5:]) for path in (run / "checkpoints").glob("step-????????"))


def assert_it_went_on_from(saved: int, words: str) -> None:
    """The step that the command says it goes on from is at least that of the newest checkpoint when the fault came."""
    found = re.search(r"going on from the checkpoint of step (\d+)", words)
    assert found, words
    assert int(found[1]) >= saved


def begun(cluster: RayCluster, start: Start, run: Path) -> Command:
    """The run on two nodes, with a checkpoint and some steps more."""
    cluster.add_node()
    cluster.add_node()
    command = start(run.name)
    command.wait_until(lambda: RunFolder(run).newest_step() >= 3, "a checkpoint")
    return command


def test_a_machine_that_is_gone_is_waited_for_and_nothing_else_is_lost(
    folder: Path, unbroken: Path, cluster: RayCluster, start: Start
):
    run = folder / "runs" / "lost-node"
    command = begun(cluster, start, run)
    with small_runs.frozen(run):  # else a fast machine is done before the node is gone
        saved = newest_checkpoint(run)
        cluster.nodes[1].kill()
    command.wait_for_words("waiting up to 120 s for machines")
    assert RunFolder(run).current_attempt() == 1, "there is nowhere to go on"
    cluster.add_node()
    code, _, words = command.finish()
    assert code == 0, words
    assert "warning: attempt 1 lost" in words
    assert "gloo" not in words, "what a library says of it means nothing to a reader"
    assert_it_went_on_from(saved, words)
    assert_the_same_run(run, unbroken)


@pytest.mark.matrix
def test_a_machine_that_is_drained_is_left_in_time(folder: Path, unbroken: Path, cluster: RayCluster, start: Start):
    run = folder / "runs" / "drained"
    cluster.add_node()
    cluster.add_node()
    command = start("drained")
    path = run / "control" / "rank-1.json"
    command.wait_until(path.exists, "rank 1 to begin")
    with small_runs.frozen(run):  # else a fast machine is done before the drain is announced
        cluster.drain(json.loads(path.read_text())["node"], within_s=60)
        command.wait_until(RunFolder(run).attempt_stop_file(1).exists, "the workers to be told")
    code, out, words = command.finish()
    assert (code, out) == (75, ""), words
    assert "of rank 1 is to be taken away within" in words
    assert newest_checkpoint(run) == small_runs.last_step(run)
    cluster.add_node()
    code, _, words = start("drained").finish()
    assert code == 0, words
    assert_the_same_run(run, unbroken)


@pytest.mark.matrix
def test_a_driver_that_is_killed_leaves_the_cluster_free_and_the_same_command_goes_on(
    folder: Path, unbroken: Path, cluster: RayCluster, start: Start
):
    run = folder / "runs" / "driver"
    command = begun(cluster, start, run)
    pids = [small_runs.worker_pid(run, rank) for rank in (0, 1)]
    os.killpg(command.process.pid, signal.SIGKILL)
    command.finish()
    code, _, words = start("driver").finish()
    assert code == 0, words
    small_runs.wait_for_end_of(pids)
    assert RunFolder(run).current_attempt() == 2
    assert_the_same_run(run, unbroken)


@pytest.mark.matrix
@pytest.mark.parametrize("durable", [True, False], ids=["remembers", "has forgotten"], indirect=True)
def test_a_head_that_is_killed_and_started_again_costs_an_interval_at_most(
    folder: Path, unbroken: Path, cluster: RayCluster, start: Start, durable: bool
):
    run = folder / "runs" / f"beheaded-{durable}".lower()
    command = begun(cluster, start, run)
    assert cluster.head is not None
    with small_runs.frozen(run):  # else a fast machine is done before anybody misses the head
        saved = newest_checkpoint(run)
        cluster.head.kill()
        command.wait_for_words("the cluster: no Ray cluster could be joined at 127.0.0.1")
    cluster.start_head()
    if not durable:  # nodes of another cluster end themselves
        cluster.add_node()
        cluster.add_node()
    code, _, words = command.finish()
    assert code == 0, words
    assert "Traceback" not in words
    assert_it_went_on_from(saved, words)
    assert_the_same_run(run, unbroken)
