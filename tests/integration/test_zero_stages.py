"""The same recipe under every ZeRO stage and world size is the same run."""

from __future__ import annotations

from pathlib import Path

import pytest
from tiny_models import make
from trainings import gradient_norms, losses, recipe, train_here, write_rows, zero
from workers import run_workers

STAGES = (0, 1, 2, 3)


def _prepare(folder: Path) -> None:
    make("llama", folder / "llama")
    write_rows(folder / "rows.jsonl")


def _train_each_stage(folder: Path) -> None:
    for stage in STAGES:
        two_rows = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 2}
        train_here(folder, recipe(folder, f"two-{stage}", "llama", cluster=zero(stage), train=two_rows))


def _train_alone(folder: Path) -> None:
    for name, batch in (
        ("one-rows", {"per_device_train_batch_size": 4}),
        ("one-accumulated", {"gradient_accumulation_steps": 4}),
    ):
        train_here(folder, recipe(folder, name, "llama", cluster=zero(0), train=batch))


@pytest.mark.timeout(300)
def test_stages_and_world_sizes_agree(tmp_path: Path) -> None:
    _prepare(tmp_path)
    run_workers(2, _train_each_stage, tmp_path)
    run_workers(1, _train_alone, tmp_path)
    wanted = losses(tmp_path, "two-0")
    assert len(wanted) == 20
    assert wanted[-1] < wanted[0] - 0.3
    for name in ("two-1", "two-2", "two-3", "one-rows", "one-accumulated"):
        assert losses(tmp_path, name) == pytest.approx(wanted, abs=1e-3), name
    norms = {name: gradient_norms(tmp_path, name) for name in ("two-0", "two-2", "two-3", "one-rows")}
    assert min(norms["two-0"]) > 0
    for name in ("two-2", "two-3", "one-rows"):
        assert norms[name] == pytest.approx(norms["two-0"], rel=1e-2), name
