"""Runs whose number of workers changes, beside the run whose number does not."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import deepspeed
import pytest
import small_runs
import torch.distributed as dist
from clusters import RayCluster
from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state
from small_runs import Command
from tiny_models import make
from trainings import losses, recipe, trainer_here, write_rows, zero
from workers import run_workers

from tunesmith.cluster.artifacts import verify
from tunesmith.cluster.metrics import read_metrics
from tunesmith.cluster.resources import this_machine
from tunesmith.cluster.runs import RunFolder
from tunesmith.trainers.batch import digest

TRAIN = {"max_steps": None, "epochs": 2, "gradient_accumulation_steps": 2}
ROUNDING = 3e-4
"""Nats by which the loss of a step may differ from the fixed run's, because gradients are summed in another order."""
ROUNDING_BF16 = 1e-2
"""In bf16 each of those sums, and each weight after its update, is rounded to 8 bits, 0.4 %. With one worker throughout instead of
two, where nothing is converted, this run differs by up to 3.3e-3; an elastic one by as much. That the change of workers itself adds
nothing is seen from the state, which is carried over bit for bit."""
LEGS = ((2, 5), (1, 11), (2, None))
"""Workers of each attempt, and the step at which it is asked to stop."""


def written(folder: Path, name: str, stage: int, workers: Any, **sections: Any) -> dict[str, Any]:
    cluster = {"workers": workers, **zero(stage)}
    return recipe(folder, name, "llama", cluster=cluster, train=TRAIN | sections.pop("train", {}), **sections)


def _leg(folder: Path, made: dict[str, Any], attempt: int, until: int | None) -> None:
    """One attempt in this worker of a group, stopped as the driver stops it."""
    trainer = trainer_here(folder, made, attempt)
    resume, states = trainer.resume, []

    def resume_and_look() -> None:
        resume()
        states.append(_state(trainer.engine) if attempt > 1 else None)

    def stop_in_time() -> None:
        if dist.get_rank() == 0 and until is not None and trainer.progress.step + 1 >= until:
            trainer.run_folder.request_stop_of(attempt, "there is room for another number of workers")

    trainer.moved, trainer.resume = stop_in_time, resume_and_look
    outcome = trainer.run()
    states.append(_state(trainer.engine) if until is not None else None)
    assert outcome.finished == (until is None)
    if until is not None:
        assert outcome.step == until
    assert deepspeed.comm.comm.cdb.shm_comm_op is None, "minutes went into compiling what nothing calls"
    if dist.get_rank() == 0:
        (folder / f"{made['name']}-{attempt}.json").write_text(json.dumps(states))
        plan = trainer.plan
        planned = [plan.step(index) for index in range(trainer.total_steps)]
        said = [[step.epoch, [example for pack in step.packs for example in pack]] for step in planned]
        (folder / f"{made['name']}.json").write_text(json.dumps([said, len(trainer.data.train)]))


def _state(engine: Any) -> str:
    """Digest of the fp32 weights and both moments of all that is trained, put together from the shards; collective."""
    digest, plain = hashlib.sha256(), engine.optimizer.state if engine.zero_optimization_stage() == 0 else None
    if engine.zero_optimization_stage() in (1, 2):  # DeepSpeed has looked for the moments before all groups had theirs
        engine.optimizer._hp_optimizer_states_linked = False
        engine.optimizer._lazy_init_hp_params_optimizer_state()
    for name, parameter in engine.module.named_parameters():
        if not parameter.requires_grad:
            continue
        if plain is not None:
            values = [parameter, plain[parameter]["exp_avg"], plain[parameter]["exp_avg_sq"]]
        else:
            moments = (safe_get_full_optimizer_state(parameter, key) for key in ("exp_avg", "exp_avg_sq"))
            values = [safe_get_full_fp32_param(parameter), *moments]
        digest.update(name.encode())
        for value in values:
            assert value is not None, name
            digest.update(value.detach().contiguous().numpy().tobytes())
    return digest.hexdigest()


def train_in_legs(folder: Path, made: dict[str, Any]) -> Path:
    for attempt, (world, until) in enumerate(LEGS, 1):
        run_workers(world, _leg, folder, made, attempt, until)
    return folder / "runs" / made["name"]


def assert_the_state_is_carried_over_bit_for_bit(folder: Path, name: str) -> None:
    """What a leg begins with is what the one before has ended with, however the shards are cut."""
    legs = [json.loads((folder / f"{name}-{attempt}.json").read_text()) for attempt, _ in enumerate(LEGS, 1)]
    for (_, left), (found, _) in pairwise(legs):
        assert found == left
        assert left is not None


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
    ("stage", "adaptation", "precision", "within"),
    [
        (1, "full", "fp32", ROUNDING),
        pytest.param(1, {"kind": "lora", "rank": 4, "lora_dropout": 0.2}, "fp32", ROUNDING, marks=pytest.mark.matrix),
        *(pytest.param(stage, "full", "fp32", ROUNDING, marks=pytest.mark.matrix) for stage in (0, 2, 3)),
        pytest.param(3, {"kind": "lora", "rank": 4}, "fp32", ROUNDING, marks=pytest.mark.matrix),
        *(pytest.param(stage, "full", "bf16", ROUNDING_BF16, marks=pytest.mark.matrix) for stage in (1, 3)),
    ],
)
@pytest.mark.timeout(300)
def test_two_workers_then_one_then_two_learn_what_two_learn(
    tmp_path: Path, stage: int, adaptation: Any, precision: str, within: float
):
    make("llama", tmp_path / "llama")
    write_rows(tmp_path / "rows.jsonl")
    sections = {"adaptation": adaptation, "train": {"precision": precision}}
    fixed = written(tmp_path, "fixed", stage, 2, **sections)
    elastic = written(tmp_path, "elastic", stage, {"min": 1, "max": 2}, **sections)
    run_workers(2, _leg, tmp_path, fixed, 1, None)
    run = train_in_legs(tmp_path, elastic)
    expected, found = losses(tmp_path, "fixed"), losses(tmp_path, "elastic")
    assert len(found) > LEGS[1][1] + 3, "the last leg has steps of its own"
    assert found == pytest.approx(expected, abs=within)
    assert expected[-1] < expected[0] - 0.1, "something was learned"
    assert_every_example_once_an_epoch(tmp_path, "fixed")
    assert_every_example_once_an_epoch(tmp_path, "elastic")
    assert_the_state_is_carried_over_bit_for_bit(tmp_path, "elastic")
    workers = [line["workers"] for line in read_metrics(run / "metrics.jsonl") if "loss" in line]
    assert workers == [2] * 5 + [1] * 6 + [2] * (len(found) - 11)
    about = json.loads((run / "artifact" / "MANIFEST.json").read_text())
    assert (about["elastic"], about["workers"]) == (True, [[1, 2], [6, 1], [12, 2]])
    assert not list((run / "checkpoints").glob("*.tmp-*")), "nothing of a conversion is left"


@pytest.mark.matrix
@pytest.mark.timeout(300)
def test_a_group_of_parameters_may_have_fewer_elements_than_there_are_workers(tmp_path: Path):
    """The two gates are a group of their own, without weight decay, and the first of two workers holds both."""
    make("llama", tmp_path / "llama")
    write_rows(tmp_path / "rows.jsonl")
    gates = {"peft_type": "ADAPTION_PROMPT", "adapter_len": 4, "adapter_layers": 2}
    sections = {"adaptation": {"kind": "peft", "config": gates}, "train": {"learning_rate": 1e-2}}
    run_workers(2, _leg, tmp_path, written(tmp_path, "fixed", 1, 2, **sections), 1, None)
    train_in_legs(tmp_path, written(tmp_path, "elastic", 1, {"min": 1, "max": 2}, **sections))
    expected = losses(tmp_path, "fixed")
    assert losses(tmp_path, "elastic") == pytest.approx(expected, abs=ROUNDING)
    assert expected[-1] < expected[0] - 0.005, "something was learned"
    assert_the_state_is_carried_over_bit_for_bit(tmp_path, "elastic")


@pytest.fixture
def cluster() -> Iterator[RayCluster]:
    with RayCluster() as started:
        yield started


def workers_seen(run: Path) -> list[int]:
    """Numbers of workers in the order in which they trained."""
    seen = [line["workers"] for line in read_metrics(run / "metrics.jsonl") if "loss" in line]
    return [count for index, count in enumerate(seen) if index == 0 or count != seen[index - 1]]


def recipe_with(folder: Path, base: Path, name: str, **cluster: Any) -> Path:
    """A run of about a hundred steps."""
    made = small_runs.small_recipe(name, base, folder / "rows.jsonl", folder / "runs")
    made["train"] |= {"learning_rate": 2e-4, "gradient_accumulation_steps": 8, "save_steps": 5}
    made["cluster"] |= {"cpus_per_worker": 1, "zero": 1, **cluster}
    return small_runs.write_recipe(folder, made)


@pytest.fixture(scope="module")
def fixed(tmp_path_factory: pytest.TempPathFactory, tiny_base: Path) -> Path:
    """The run of two workers on this machine, to which nothing happens."""
    folder = tmp_path_factory.mktemp("fixed")
    small_runs.write_rows(folder / "rows.jsonl", 3000)
    code, _, said = Command(recipe_with(folder, tiny_base, "fixed", cpus_per_worker=0.5)).finish()
    assert code == 0, said
    return folder / "runs" / "fixed"


def elastic_on(cluster: RayCluster, folder: Path, base: Path) -> tuple[Command, Path]:
    """The same run of one or two workers on a cluster, and its folder."""
    small_runs.write_rows(folder / "rows.jsonl", 3000)
    made = recipe_with(folder, base, "elastic", workers={"min": 1, "max": 2}, grow_after_s=1)
    environment = cluster.environment | {"RAY_ADDRESS": cluster.address}
    return Command(made, environment=environment), folder / "runs" / "elastic"


def assert_it_learnt_the_same(run: Path, fixed: Path, worlds: list[int], attempts: int) -> None:
    """Step by step, with these numbers of workers one after another."""
    assert workers_seen(run) == worlds
    expected, found = (
        [(line["loss"], line["examples"]) for line in read_metrics(one / "metrics.jsonl") if "loss" in line]
        for one in (fixed, run)
    )
    assert [examples for _, examples in found] == [examples for _, examples in expected]
    assert [loss for loss, _ in found] == pytest.approx([loss for loss, _ in expected], abs=ROUNDING)
    about = json.loads((run / "artifact" / "MANIFEST.json").read_text())
    assert about["elastic"]
    assert RunFolder(run).current_attempt() == attempts
    assert [workers for _, workers in about["workers"]] == worlds


@pytest.mark.matrix
@pytest.mark.timeout(900)
def test_a_machine_that_is_lost_is_done_without_and_one_that_comes_is_used(
    tmp_path: Path, tiny_base: Path, fixed: Path, cluster: RayCluster
):
    nodes = [cluster.add_node(), cluster.add_node()]
    command, run = elastic_on(cluster, tmp_path, tiny_base)
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
    assert_it_learnt_the_same(run, fixed, [2, 1, 2], attempts=3)


@pytest.mark.matrix
@pytest.mark.timeout(900)
def test_a_machine_that_is_drained_is_left_at_once_and_no_step_is_lost(
    tmp_path: Path, tiny_base: Path, fixed: Path, cluster: RayCluster
):
    within_s = 600
    for _ in range(2):
        cluster.add_node()
    command, run = elastic_on(cluster, tmp_path, tiny_base)
    reached = [0]

    def goes_on_alone() -> bool:
        if workers_seen(run) == [2]:
            reached.append(small_runs.last_step(run))
        return workers_seen(run) == [2, 1]

    try:
        command.wait_for_step(run, 6)
        drained_at = time.monotonic()
        cluster.drain(json.loads((run / "control" / "rank-1.json").read_text())["node"], within_s)
        command.wait_until(goes_on_alone, "one worker to go on alone")
        waited_s = time.monotonic() - drained_at
        code, _, said = command.finish()
    finally:
        command.kill()
    assert code == 0, said
    assert " lost " not in said, "the machine was there until its worker had left it"
    assert "of rank 1 is to be taken away within" in said
    assert waited_s < within_s / 3
    lines = [line for line in read_metrics(run / "metrics.jsonl") if "loss" in line]
    alone = next(line["step"] for line in lines if line["workers"] == 1)
    assert alone > max(reached), "steps were repeated"
    assert_it_learnt_the_same(run, fixed, [2, 1], attempts=2)


@pytest.mark.matrix
@pytest.mark.timeout(900)
def test_a_kill_while_the_first_worker_converts_costs_nothing_but_the_work(
    tmp_path: Path, tiny_base: Path, fixed: Path
):
    small_runs.write_rows(tmp_path / "rows.jsonl", 3000)
    elastic, run = {"workers": {"min": 1, "max": 2}}, tmp_path / "runs" / "elastic"

    def command_with(cpus: float) -> Command:
        return Command(recipe_with(tmp_path, tiny_base, "elastic", cpus_per_worker=cpus, **elastic))

    first = command_with(0.5)
    first.wait_for_step(run, 6)
    first.process.terminate()
    assert first.finish()[0] == 75
    all_of_it = int(this_machine().cpus)  # so that there is room for one worker
    killed = command_with(all_of_it)
    killed.wait_until(lambda: any(run.glob("checkpoints/converted.tmp-*")), "a conversion")
    small_runs.kill_worker(run, 0)
    killed.kill()
    assert any(run.glob("checkpoints/converted.tmp-*")), "the kill came too late"
    verify(run / "checkpoints" / f"step-{RunFolder(run).newest_step():08d}")
    code, _, said = command_with(all_of_it).finish()
    assert code == 0, said
    assert "written by 2 workers, is cut anew for 1" in said
    assert not any(run.glob("checkpoints/*.tmp-*"))
    assert_it_learnt_the_same(run, fixed, [2, 1], attempts=3)
