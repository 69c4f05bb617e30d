"""Memory that the planner simulates is the memory that a real training takes, for every ZeRO stage; and its receipt."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from memory_runs import WORKERS, Run, prepare, train_and_compare
from workers import run_workers

STAGES = (0, 1, 2, 3)
CORE = [
    *(Run(stage) for stage in STAGES),
    *(Run(stage, "lora", "bf16", 2) for stage in STAGES[1:]),  # 16-bit formats begin at stage 1
]
GRID = [
    Run(stage, adaptation, precision, accumulation, model, checkpointing)
    for stage in STAGES
    for adaptation in ("full", "lora")
    for precision in ("fp32", "bf16")
    for accumulation in (1, 2)
    for model, checkpointing in (("llama", False), ("llama", True), ("qwen3_moe", False))
]


def _errors(folder: Path, runs: list[Run]) -> dict[str, float]:
    """Relative difference of the predicted from the measured peak, by run."""
    prepare(folder)
    errors = {}
    for run in runs:
        run_workers(WORKERS, train_and_compare, folder, run)
        figures = json.loads((folder / "figures" / f"{run.name}.json").read_text())
        errors[run.name] = sum(figures["predicted"].values()) / sum(figures["measured"].values()) - 1
    return errors


def test_the_simulated_peak_is_the_tracked_one(tmp_path: Path) -> None:
    errors = _errors(tmp_path, CORE)
    assert {name: error for name, error in errors.items() if abs(error) > 0.01} == {}


@pytest.mark.matrix
@pytest.mark.timeout(1800)
def test_the_whole_grid_agrees(tmp_path: Path) -> None:
    errors = _errors(tmp_path, GRID)
    assert {name: error for name, error in errors.items() if abs(error) > 0.01} == {}
