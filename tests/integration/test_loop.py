"""What the loop promises besides equal losses: patience, the best weights, short steps, dropout and offload."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tiny_models import make
from trainings import losses, recipe, train_here, trainer_here, write_rows, zero
from workers import run_workers

from tunesmith.cluster.errors import RecipeError
from tunesmith.cluster.metrics import read_metrics


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    make("llama", tmp_path / "llama")
    write_rows(tmp_path / "rows.jsonl")
    return tmp_path


def _stop_early(folder: Path) -> None:
    patience = {"early_stopping": {"patience": 2}, "learning_rate": 0.3, "max_steps": 40, "eval_steps": 2}
    written = recipe(folder, "early", "llama", train={**patience, "warmup_steps": 3})
    trainer = train_here(folder, written)
    lines = read_metrics(folder / "runs" / "early" / "metrics.jsonl")
    evaluated = {line["step"]: line["eval_loss"] for line in lines if line.get("eval_loss") and line["step"]}
    best = min(evaluated, key=lambda step: evaluated[step])
    assert trainer.progress.step == best + 4 < 40, "two evaluations after the best"
    assert trainer.held_out is not None
    again = trainer.held_out.loss(trainer.engine, trainer.device, trainer.moved)
    assert again == pytest.approx(evaluated[best], abs=1e-6), "the artifact's weights are not the best ones"
    assert (folder / "runs" / "early" / "checkpoints" / f"step-{best:08d}").is_dir()


def test_early_stopping_ends_the_run_and_keeps_the_best_weights(folder: Path) -> None:
    run_workers(1, _stop_early, folder)


def _train_few_rows(folder: Path) -> None:
    for stage in (0, 3) if dist.get_world_size() == 2 else (0,):
        rows = {"packing": False, "split": {"validation": 0.0}}
        train = {"max_steps": 6, "gradient_accumulation_steps": 4 // dist.get_world_size()}
        written = recipe(folder, f"few-{dist.get_world_size()}-{stage}", "llama", data=rows, cluster=zero(stage))
        written["train"] |= train
        del written["train"]["eval_steps"]
        train_here(folder, written)


def test_a_short_last_step_leaves_no_worker_behind(folder: Path) -> None:
    """Five rows and four a step: in every second step one row is left for two workers and two accumulation steps."""
    rows = (folder / "rows.jsonl").read_text().splitlines()[:5]
    (folder / "rows.jsonl").write_text("\n".join(rows))
    run_workers(2, _train_few_rows, folder)
    run_workers(1, _train_few_rows, folder)
    wanted = losses(folder, "few-1-0")
    assert losses(folder, "few-2-0") == pytest.approx(wanted, abs=1e-5)
    assert losses(folder, "few-2-3") == pytest.approx(wanted, abs=1e-5)


def _write_a_key_without_use(folder: Path) -> None:
    written = recipe(folder, "unread", "llama", cluster={"zero3_persistence_threshold": 7, "zero": 0})
    with pytest.raises(RecipeError, match=r"nothing in this run reads it: cluster\.zero3_persistence_threshold"):
        train_here(folder, written)


def test_a_key_that_nothing_reads_stops_the_run_before_its_first_step(folder: Path) -> None:
    run_workers(1, _write_a_key_without_use, folder)
    assert not (folder / "runs" / "unread" / "metrics.jsonl").exists()


def _stop_with_tensorboard(folder: Path) -> None:
    trainer = trainer_here(folder, recipe(folder, "stopped", "llama", output={"report_to": ["tensorboard"]}))
    trainer.run_folder.request_stop()
    assert not trainer.run().finished
    events = EventAccumulator(str(trainer.run_folder.tensorboard))
    events.Reload()
    assert [event.step for event in events.Scalars("loss")] == [1]


def test_a_run_that_is_stopped_leaves_no_step_out_of_tensorboard(folder: Path) -> None:
    run_workers(1, _stop_with_tensorboard, folder)


def _train_in_bf16(folder: Path) -> None:
    for stage in (0, 2, 3):
        train_here(folder, recipe(folder, f"bf16-{stage}", "llama", cluster=zero(stage), train={"precision": "bf16"}))


@pytest.mark.matrix
@pytest.mark.timeout(400)
def test_bf16_learns_alike_in_every_stage(folder: Path) -> None:
    run_workers(2, _train_in_bf16, folder)
    wanted = losses(folder, "bf16-2")
    assert wanted[-1] < wanted[0] - 0.2
    for stage in (0, 3):
        assert losses(folder, f"bf16-{stage}") == pytest.approx(wanted, abs=5e-2)


def _train_offloaded(folder: Path) -> None:
    for stage in (2, 3):
        for place in ("none", "cpu"):
            written = recipe(folder, f"{place}-{stage}", "llama", cluster={**zero(stage), "offload": place})
            train_here(folder, written)


@pytest.mark.matrix
@pytest.mark.timeout(600)
def test_offload_to_the_host_changes_nothing(folder: Path) -> None:
    run_workers(2, _train_offloaded, folder)
    for stage in (2, 3):
        assert losses(folder, f"cpu-{stage}") == pytest.approx(losses(folder, f"none-{stage}"), abs=1e-4)


def _train_with_dropout(folder: Path) -> None:
    lora = {"kind": "lora", "rank": 4, "lora_dropout": 0.5}
    for name in ("dropout-a", "dropout-b"):
        train_here(folder, recipe(folder, name, "llama", adaptation=lora))
    train_here(folder, recipe(folder, "dropout-none", "llama", adaptation={**lora, "lora_dropout": 0.0}))


def test_dropout_follows_from_the_step_alone(folder: Path) -> None:
    run_workers(1, _train_with_dropout, folder)
    assert losses(folder, "dropout-a") == losses(folder, "dropout-b")
    assert losses(folder, "dropout-a")[1:] != losses(folder, "dropout-none")[1:]


def test_metrics_carry_what_the_progress_bar_shows(folder: Path) -> None:
    run_workers(1, _train_once, folder)
    lines = read_metrics(folder / "runs" / "once" / "metrics.jsonl")
    assert [line["step"] for line in lines] == list(range(21))
    shown = {
        "epoch",
        "loss",
        "learning_rate",
        "grad_norm",
        "tokens_per_second",
        "memory_gib",
        "skipped_rows",
        "checkpoint",
    }
    assert shown <= lines[-1].keys()
    assert json.loads((folder / "runs" / "once" / "artifact" / "MANIFEST.json").read_text())["parity_passed"]


def _train_once(folder: Path) -> None:
    assert torch.get_default_dtype() == torch.float32
    train_here(folder, recipe(folder, "once", "llama"))
