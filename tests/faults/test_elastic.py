"""Runs whose number of workers changes, beside the run whose number does not."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import small_runs
import torch.distributed as dist
from clusters import RayCluster
from small_runs import Command
from tiny_models import make
from trainings import losses, recipe, trainer_here, write_rows, zero
from workers import run_workers

from tunesmith.cluster.metrics import read_metrics
from tunesmith.cluster.runs import RunFolder
from tunesmith.trainers.batch import digest

TRAIN = {"max_steps": None, "epochs": 2, "gradient_accumulation_steps": 2}
LEGS = ((2, 5), (1, 11), (2, None))
"""Workers of each attempt, and the step at which it is asked to stop."""


def written(folder: Path, name: str, stage: int, workers: Any, **sections: Any) -> dict[str, Any]:
    cluster = {"workers": workers, **zero(stage)}
    return recipe(folder, name, "llama", cluster=cluster, train=TRAIN | sections.pop("train", {}), **sections)


def _leg(folder: Path, made: dict[str, Any], attempt: int, until: int | None) -> None:
    """One attempt in this worker of a group, stopped as the driver stops it."""
    trainer = trainer_here(folder, made, attempt)

    def stop_in_time() -> None:
        if dist.get_rank() == 0 and until is not None and trainer.progress.step + 1 >= until:
            trainer.run_folder.request_stop_of(attempt, "there is room for another number of workers")

    trainer.moved = stop_in_time
    outcome = trainer.run()
    assert outcome.finished == (until is None)
    if until is not None:
        assert outcome.step == until
    if dist.get_rank() == 0:
        plan = trainer.plan
        planned = [plan.step(index) for index in range(trainer.total_steps)]
        said = [[step.epoch, [example for pack in step.packs for example in pack]] for step in planned]
        (folder / f"{made['name']}.json").write_text(json.dumps([said, len(trainer.data.train)]))


def train_in_legs(folder: Path, made: dict[str, Any]) -> Path:
    for attempt, (world, until) in enumerate(LEGS, 1):
        run_workers(world, _leg, folder, made, attempt, until)
    return folder / "runs" / made["name"]


def assert_every_example_once_an_epoch(folder: Path, name: str) -> None:
    """What the workers say they have trained on, step by step, is what the plan says, and that is each example once an epoch."""
    planned, count = json.loads((folder / f"{name}.json").read_text())
    lines = [line for line in read_metrics(folder / "runs" / name / "metrics.jsonl") if "loss" in line]
    assert [line["step"] for line in lines] == list(range(1, len(planned) + 1))
    assert [line["examples"] for line in lines] == [f"{digest(examples):x}" for _, examples in planned]
    for epoch in range(2):
        trained = [example for of, examples in planned if of == epoch for example in examples]
        assert sorted(trained) == list(range(count))


@pytest.mark.parametrize(
    ("stage", "adaptation"),
    [
        (1, "full"),
        pytest.param(1, {"kind": "lora", "rank": 4, "lora_dropout": 0.2}, marks=pytest.mark.matrix),
        *(pytest.param(stage, "full", marks=pytest.mark.matrix) for stage in (0, 2, 3)),
        pytest.param(3, {"kind": "lora", "rank": 4}, marks=pytest.mark.matrix),
    ],
)
@pytest.mark.timeout(300)
def test_two_workers_then_one_then_two_learn_what_two_learn(tmp_path: Path, stage: int, adaptation: Any):
    make("llama", tmp_path / "llama")
    write_rows(tmp_path / "rows.jsonl")
    fixed = written(tmp_path, "fixed", stage, 2, adaptation=adaptation)
    elastic = written(tmp_path, "elastic", stage, {"min": 1, "max": 2}, adaptation=adaptation)
    run_workers(2, _leg, tmp_path, fixed, 1, None)
    run = train_in_legs(tmp_path, elastic)
    expected, found = losses(tmp_path, "fixed"), losses(tmp_path, "elastic")
    assert len(found) > LEGS[1][1] + 3, "the last leg has steps of its own"
    assert found == pytest.approx(expected, abs=3e-4)
    assert expected[-1] < expected[0] - 0.1, "something was learned"
    assert_every_example_once_an_epoch(tmp_path, "fixed")
    assert_every_example_once_an_epoch(tmp_path, "elastic")
    workers = [line["workers"] for line in read_metrics(run / "metrics.jsonl") if "loss" in line]
    assert workers == [2] * 5 + [1] * 6 + [2] * (len(found) - 11)
    about = json.loads((run / "artifact" / "MANIFEST.json").read_text())
    assert (about["elastic"], about["workers"]) == (True, [[1, 2], [6, 1], [12, 2]])
    assert not list((run / "checkpoints").glob("*.tmp-*")), "nothing of a conversion is left"


@pytest.fixture
def cluster() -> Iterator[RayCluster]:
    with RayCluster() as started:
        yield started


def workers_seen(run: Path) -> list[int]:
    """Numbers of workers in the order in which they trained."""
    seen = [line["workers"] for line in read_metrics(run / "metrics.jsonl") if "loss" in line]
    return [count for index, count in enumerate(seen) if index == 0 or count != seen[index - 1]]


@pytest.mark.matrix
@pytest.mark.timeout(900)
def test_a_machine_that_is_lost_is_done_without_and_one_that_comes_is_used(
    tmp_path: Path, tiny_base: Path, cluster: RayCluster
):
    small_runs.write_rows(tmp_path / "rows.jsonl", 3000)

    def recipe_with(name: str, **settings: Any) -> Path:
        made = small_runs.small_recipe(name, tiny_base, tmp_path / "rows.jsonl", tmp_path / "runs")
        made["train"] |= {"learning_rate": 2e-4, "gradient_accumulation_steps": 8, "save_steps": 5}
        made["cluster"] |= {"cpus_per_worker": 1, "zero": 1, **settings}
        return small_runs.write_recipe(tmp_path, made)

    code, _, said = Command(recipe_with("fixed", cpus_per_worker=0.5)).finish()
    assert code == 0, said
    fixed, run = tmp_path / "runs" / "fixed", tmp_path / "runs" / "elastic"
    nodes = [cluster.add_node(), cluster.add_node()]
    settings = {"workers": {"min": 1, "max": 2}, "grow_after_s": 1}
    command = Command(
        recipe_with("elastic", **settings), environment=cluster.environment | {"RAY_ADDRESS": cluster.address}
    )
    try:
        command.wait_for_step(run, 6)
        nodes[1].kill()
        command.wait_until(lambda: workers_seen(run) == [2, 1], "one worker to go on alone")
        cluster.add_node()
        code, _, said = command.finish()
    finally:
        command.kill()
    assert code == 0, said
    assert "there is room for 2 workers instead of 1" in said
    assert "1 worker of at most 2, each with 16 passes a step" in said
    assert workers_seen(run) == [2, 1, 2], said
    expected, found = (
        [(line["loss"], line["examples"]) for line in read_metrics(one / "metrics.jsonl") if "loss" in line]
        for one in (fixed, run)
    )
    assert [examples for _, examples in found] == [examples for _, examples in expected]
    assert [loss for loss, _ in found] == pytest.approx([loss for loss, _ in expected], abs=3e-4)
    about = json.loads((run / "artifact" / "MANIFEST.json").read_text())
    assert about["elastic"]
    assert RunFolder(run).current_attempt() == 3, "one attempt for each number of workers"
    assert [workers for _, workers in about["workers"]] == [2, 1, 2]
