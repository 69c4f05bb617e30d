"""Memory that the planner simulates is the memory that a real training takes, for every ZeRO stage; and its receipt."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from memory_runs import WORKERS, Run, prepare, recipe_of, train_and_compare
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack
from trainings import gradient_norms, losses, recipe, trainer_here, write_rows, zero
from workers import run_workers

from tunesmith.cluster.artifacts import PlanReceipt
from tunesmith.trainers.export import ADAPTER_WEIGHTS
from tunesmith.trainers.loop import Trainer
from tunesmith.trainers.memory import measure
from tunesmith.trainers.memory.tracker import MemoryTracker

STAGES = (0, 1, 2, 3)
KEPT_BYTES = 1024  # that a probe may leave: DeepSpeed's counters; the smallest adapter's gradients are 200 times that
CORE = [
    *(Run(stage) for stage in STAGES),
    *(Run(stage, "lora", "bf16", 2) for stage in STAGES[1:]),  # 16-bit formats begin at stage 1
]
KINDS = [
    (stage, adaptation, precision, accumulation)
    for stage in STAGES
    for adaptation in ("full", "lora")
    for precision in ("fp32", "bf16")
    for accumulation in (1, 2)
]
GRID = [Run(*kind) for kind in KINDS]
EXPERTS = [Run(*kind, model="qwen3_moe") for kind in KINDS]
CHECKPOINTED = [Run(*kind, checkpointing=True) for kind in KINDS]


TRIES = 3
"""Gloo's thread lets a reduced bucket go a moment after the worker has gone on. Where it loses its core in between, one bucket
more is alive at the worst moment: a run that measures more than was foreseen is run again."""


def _errors(folder: Path, runs: list[Run]) -> dict[str, float]:
    """Relative difference of the predicted from the measured peak, by run."""
    prepare(folder)
    errors = {}
    for run in runs:
        for _ in range(TRIES):
            run_workers(WORKERS, train_and_compare, folder, run)
            figures = json.loads((folder / "figures" / f"{run.name}.json").read_text())
            errors[run.name] = sum(figures["predicted"].values()) / sum(figures["measured"].values()) - 1
            if errors[run.name] > -0.01:
                break
    return errors


def test_the_simulated_peak_is_the_tracked_one(tmp_path: Path) -> None:
    errors = _errors(tmp_path, CORE)
    assert {name: error for name, error in errors.items() if abs(error) > 0.01} == {}


@pytest.mark.matrix
@pytest.mark.timeout(1800)
@pytest.mark.parametrize(
    "runs",
    [
        pytest.param(GRID, id="plain"),
        pytest.param(
            EXPERTS,
            id="experts",
            marks=pytest.mark.xfail(strict=True, reason="LoRA in fp32 under ZeRO-1 and 2 is foreseen 4 % too large"),
        ),
        pytest.param(CHECKPOINTED, id="checkpointed"),
    ],
)
def test_the_whole_grid_agrees(tmp_path: Path, runs: list[Run]) -> None:
    errors = _errors(tmp_path, runs)
    assert {name: error for name, error in errors.items() if abs(error) > 0.01} == {}


def _train(folder: Path, name: str, stage: int, measured: int, steps: int = 4) -> Trainer:
    """The LoRA recipe, of whose steps so many are measured."""
    measure.STEPS = measured
    written = recipe_of(folder, Run(stage, "lora"))
    written["name"] = name
    written["train"] |= {"max_steps": steps, "save_steps": 2}
    trainer = trainer_here(folder, written)
    trainer.run()
    return trainer


def _train_measured_and_not(folder: Path) -> None:
    for stage in (0, 3):
        _train(folder, f"plain-{stage}", stage, measured=0)
        trainer = _train(folder, f"measured-{stage}", stage, measured=2)
        assert trainer.meter.steps == 2
        assert _get_current_dispatch_mode_stack() == []


@pytest.mark.matrix
def test_measuring_changes_no_loss(tmp_path: Path) -> None:
    prepare(tmp_path)
    run_workers(WORKERS, _train_measured_and_not, tmp_path)
    for stage in (0, 3):
        found = losses(tmp_path, f"measured-{stage}")
        assert len(found) == 4
        assert found == losses(tmp_path, f"plain-{stage}")
        assert _receipt(tmp_path, f"measured-{stage}").within is not None
        unmeasured = _receipt(tmp_path, f"plain-{stage}")
        assert (unmeasured.within, unmeasured.problem) == (None, "no step was trained, so nothing was measured")


def _receipt(folder: Path, name: str) -> PlanReceipt:
    return PlanReceipt.model_validate_json(
        (folder / "runs" / name / "artifact" / "receipts" / "plan.json").read_bytes()
    )


def _train_two_steps(folder: Path) -> None:
    _train(folder, "measured", 2, measured=2, steps=2)


def test_the_receipt_is_within_a_percent_for_every_worker(tmp_path: Path) -> None:
    prepare(tmp_path)
    run_workers(WORKERS, _train_two_steps, tmp_path)
    receipt = _receipt(tmp_path, "measured")
    assert (receipt.problem, receipt.device, receipt.steps) == ("", "cpu", 2)
    assert [worker.rank for worker in receipt.workers] == list(range(WORKERS))
    for worker in receipt.workers:
        assert (worker.tokens, worker.labels) == (64, 63)
        assert sum(worker.measured.values()) == worker.measured_bytes
        assert sum(worker.predicted.values()) == worker.predicted_bytes
        assert worker.measured["adapter"] == worker.predicted["adapter"]
    assert receipt.within is not None
    assert receipt.within <= 0.01
    card = (tmp_path / "runs" / "measured" / "artifact" / "README.md").read_text()
    assert f"- plan (within {receipt.within:.1%})" in card
    run_workers(WORKERS, _train_two_steps, tmp_path)  # all is done already: what was measured before is kept
    assert _receipt(tmp_path, "measured") == receipt


class _Probed(Trainer):
    """Probes on a CPU too."""

    def open_books(self) -> None:
        before = _alive()
        self.probe_memory()
        if self.recipe.cluster.zero != 3:  # which keeps the weights that its last forward pass has gathered
            assert _alive() <= before + KEPT_BYTES, "the probe's gradients are still there"
        super().open_books()


def _alive() -> int:
    """Bytes of all tensors."""
    tracker = MemoryTracker()
    tracker.claim_everything_alive("found")
    return tracker.live.total()


def _train_probed_and_not(folder: Path, precision: str, accumulation: int) -> None:
    for stage in STAGES:
        for kind in (Trainer, _Probed):
            written = recipe(
                folder,
                f"{kind.__name__.strip('_').lower()}-{stage}",
                "llama",
                cluster=zero(stage),
                adaptation={"kind": "lora", "lora_dropout": 0.1},
                train={"gradient_accumulation_steps": accumulation, "precision": precision, "max_steps": 4},
            )
            kind(trainer_here(folder, written).job, lambda: None).run()


@pytest.mark.matrix
@pytest.mark.parametrize(
    ("precision", "accumulation"), [("fp32", 1), pytest.param("bf16", 2, marks=pytest.mark.matrix)]
)
def test_a_probe_leaves_the_run_as_it_was(tmp_path: Path, precision: str, accumulation: int) -> None:
    """Bit for bit: every loss, gradient norm and weight."""
    prepare(tmp_path)
    write_rows(tmp_path / "rows.jsonl")
    run_workers(WORKERS, _train_probed_and_not, tmp_path, precision, accumulation)
    for stage in STAGES:
        plain, probed = f"trainer-{stage}", f"probed-{stage}"
        assert len(losses(tmp_path, probed)) == 4
        assert losses(tmp_path, probed) == losses(tmp_path, plain)
        assert gradient_norms(tmp_path, probed) == gradient_norms(tmp_path, plain)
        weights = [(tmp_path / "runs" / name / "artifact" / ADAPTER_WEIGHTS).read_bytes() for name in (plain, probed)]
        assert weights[0] == weights[1]
