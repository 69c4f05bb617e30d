"""Saves in the background: what is saved is the state of its step, whatever training does meanwhile."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint_stages import Stages, after, folders, stages  # noqa: F401
from deepspeed.runtime.fp16.loss_scaler import LossScaler
from tiny_models import make
from trainings import losses, recipe, trainer_here, write_rows, zero
from workers import run_workers

from tunesmith.cluster.artifacts import verify
from tunesmith.cluster.metrics import read_metrics
from tunesmith.cluster.runs import RunFolder
from tunesmith.trainers.loop import Trainer
from tunesmith.trainers.memory.shard import Engine, checkpoint_part


def _same_checkpoint(one: Path, other: Path) -> None:
    """Byte for byte, and so in every tensor; but for when it was written."""
    first, second = verify(one), verify(other)
    assert first.files == second.files
    assert {**first.about, "written": ""} == {**second.about, "written": ""}


@pytest.mark.parametrize(
    "stage", [pytest.param(0, marks=pytest.mark.matrix), 2, pytest.param(3, marks=pytest.mark.matrix)]
)
def test_it_holds_the_state_of_its_step_and_a_resumed_run_is_the_unbroken_one(
    stages: Stages,  # noqa: F811
    tmp_path: Path,
    stage: int,
) -> None:
    """Nothing is written before another step is done, and the commit comes with the one after that."""
    there, behind = tmp_path / "there", tmp_path / "behind"
    unbroken = stages.run(there, 4, zero=stage, save_at=[2])
    ranks = stages.run(behind, 4, zero=stage, behind_at=[2], write_after=3)
    resumed = stages.run(behind, 4, zero=stage, resume="newest")
    _same_checkpoint(there / "checkpoints" / "step-00000002", behind / "checkpoints" / "step-00000002")
    for whole, rank, second in zip(unbroken, ranks, resumed, strict=True):
        assert rank["known"] == [None, None, None, 2]
        assert rank["threads"] == []
        assert (rank["losses"], rank["weights"]) == (whole["losses"], whole["weights"])
        assert second["resumed"] == 2
        assert (second["losses"], second["weights"]) == (after(whole["losses"], 2), whole["weights"])


@pytest.mark.matrix
@pytest.mark.parametrize(("precision", "frozen"), [("fp32", False), ("fp32", True), ("bf16", False), ("bf16", True)])
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_so_it_does_in_every_layout_and_takes_the_memory_that_the_planner_says(
    stages: Stages,  # noqa: F811
    tmp_path: Path,
    stage: int,
    precision: str,
    frozen: bool,
) -> None:
    layout = {"zero": stage, "precision": precision, "frozen": frozen, "width": 512}
    there, behind = tmp_path / "there", tmp_path / "behind"
    unbroken = stages.run(there, 4, save_at=[2], **layout)
    stages.run(behind, 4, behind_at=[2], write_after=3, **layout)
    saved = behind / "checkpoints" / "step-00000002"
    _same_checkpoint(there / "checkpoints" / "step-00000002", saved)
    resumed = stages.run(behind, 4, resume="newest", **layout)
    assert [rank["weights"] for rank in resumed] == [rank["weights"] for rank in unbroken]
    if not frozen and (stage, precision) != (0, "bf16"):  # which is never run: `zero.engine_stage`
        trainable = 512 * 512 + 23 * 512
        of_first = sum(record.size for name, record in verify(saved).files.items() if "pp_rank_1" not in name)
        item = 2 if precision == "bf16" else 4
        assert of_first == pytest.approx(checkpoint_part(trainable, Engine(stage, 2, item)), rel=0.02)


@pytest.mark.matrix
@pytest.mark.parametrize("failing", [0, 1])
def test_when_one_rank_cannot_write_all_learn_of_it_and_the_step_at_hand_is_saved(
    stages: Stages,  # noqa: F811
    tmp_path: Path,
    failing: int,
) -> None:
    ranks = stages.run(tmp_path, 6, zero=2, save_at=[1], behind_at=[2, 5], write_after=3, fail_rank=failing)
    for rank in ranks:
        assert rank["saved"] == [1, 2, 4, 5]
        assert rank["known"][:4] == [None, 1, 1, 1]
        assert rank["known"][4] == 4
    assert folders(tmp_path) == ["step-00000004", "step-00000005"]
    told = [json.loads(line)["text"] for line in RunFolder(tmp_path).warnings(attempt=1).read_text().splitlines()]
    assert len(told) == 1
    assert told[0].startswith("step-00000002 could not be written in the background: ")
    assert "step-00000002: disk full: " in told[0]
    resumed = stages.run(tmp_path, 6, zero=2, resume="newest")
    assert [rank["weights"] for rank in resumed] == [rank["weights"] for rank in ranks]


@pytest.mark.matrix
def test_a_kill_while_it_is_written_leaves_the_checkpoint_before(stages: Stages, tmp_path: Path) -> None:  # noqa: F811
    whole = stages.run(tmp_path / "whole", 4, zero=2)
    run = tmp_path / "killed"
    ranks = stages.run(run, 4, zero=2, save_at=[1], behind_at=[2], write_after=4, end_at=[1, 3])
    assert ranks[1]["killed"]
    before, left = folders(run)
    assert before == "step-00000001"
    assert left.startswith("step-00000002.tmp-")
    resumed = stages.run(run, 4, zero=2, behind_at=[3], resume="newest")
    for rank, unbroken in zip(resumed, whole, strict=True):
        assert (rank["resumed"], rank["warnings"]) == (1, [])
        assert (rank["losses"], rank["weights"]) == (after(unbroken["losses"], 1), unbroken["weights"])
    assert folders(run) == ["step-00000001", "step-00000003"]


@pytest.mark.matrix
def test_an_attempt_that_was_overtaken_commits_nothing(stages: Stages, tmp_path: Path) -> None:  # noqa: F811
    for rank in stages.run(tmp_path, 4, save_at=[1], behind_at=[2], write_after=3, fence_step=3):
        assert rank["error"] == [
            "FencedError",
            f"run {tmp_path.name}: attempt 1 may not write, attempt 2 has taken over",
        ]
    assert folders(tmp_path) == ["step-00000001"]


def _leave_the_loop(folder: Path, stage: int) -> None:
    """Whole runs: one that never saves behind, one that does, and one that breaks off while it does and goes on."""
    train = {"max_steps": 7, "save_steps": 2, "save_total_limit": 9}
    written = {
        name: recipe(folder, name, "llama", train={**train, "async_save": name != "waiting"}, cluster=zero(stage))
        for name in ("waiting", "behind", "broken")
    }
    trainer_here(folder, written["waiting"]).run()
    trainer_here(folder, written["behind"]).run()
    with pytest.raises(_Broken):
        _broken_in_step(trainer_here(folder, written["broken"]), 6).run()
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("checkpoint")]
    trainer_here(folder, written["broken"], attempt=2).run()


class _Broken(Exception):
    """What ends a run in this test."""


def _broken_in_step(trainer: Trainer, step: int) -> Trainer:
    def moved() -> None:
        if trainer.progress.step == step - 1:
            raise _Broken

    trainer.moved = moved
    return trainer


def _loaded(path: Path) -> dict[str, object]:
    """The hash of every tensor of a checkpoint's file, and every scalar.

    Not the file's bytes, which two runs in one process do not share under ZeRO-3, however they save: DeepSpeed numbers the
    parameters of all models of a process on and on, and each flat group is pickled with its first and last number (`ds_id`).
    """
    return dict(_leaves(torch.load(path, weights_only=False)))


def _leaves(value: Any, where: str = "") -> Iterator[tuple[str, object]]:
    if isinstance(value, torch.Tensor):
        held = value.flatten().view(torch.uint8).numpy()
        yield where, (value.dtype, value.shape, sha256(held).hexdigest())
    elif isinstance(value, dict | list | tuple):
        for key, item in value.items() if isinstance(value, dict) else enumerate(value):
            yield from _leaves(item, f"{where}/{key}")
    elif isinstance(value, LossScaler):
        yield from _leaves(vars(value), where)
    else:
        yield where, value


@pytest.mark.matrix
@pytest.mark.timeout(600)
@pytest.mark.parametrize("stage", [0, 2, 3])
def test_the_loop_saves_in_the_background_what_it_would_have_saved(tmp_path: Path, stage: int) -> None:
    make("llama", tmp_path / "llama")
    write_rows(tmp_path / "rows.jsonl")
    run_workers(2, _leave_the_loop, tmp_path, stage)
    waiting, behind, broken = (tmp_path / "runs" / name for name in ("waiting", "behind", "broken"))
    for step in (2, 4, 6, 7):
        there, other = (run / "checkpoints" / f"step-{step:08d}" for run in (waiting, behind))
        first, second = verify(there), verify(other)
        assert first.files.keys() == second.files.keys()
        for name in first.files:
            assert _loaded(there / name) == _loaded(other / name), (step, name)
        assert first.about["progress"] == second.about["progress"]
    assert losses(tmp_path, "waiting") == losses(tmp_path, "behind") == losses(tmp_path, "broken")
    named = [line["checkpoint"] for line in read_metrics(behind / "metrics.jsonl") if "loss" in line]
    assert named[:2] == [None, None]
    assert {2, 4} <= set(named) <= {None, 2, 4, 6}
    assert not list((broken / "checkpoints").glob("*.tmp-*"))
