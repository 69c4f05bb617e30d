from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from checkpoint_stages import Stages, after, folders, stages  # noqa: F401

from tunesmith.cluster.artifacts import verify


def _go_on(stages: Stages, run: Path, **layout: Any) -> None:  # noqa: F811
    """Trains 4 steps unbroken, then from the checkpoint of step 2: in fresh processes, and back in the same ones."""
    unbroken = stages.run(run, 4, save_at=[2], load_afterwards=2, **layout)
    resumed = stages.run(run, 4, resume="newest", **layout)
    for whole, second in zip(unbroken, resumed, strict=True):
        assert whole["saved"] == [2]
        assert second["resumed"] == 2
        assert second["losses"] == after(whole["losses"], 2)
        assert second["weights"] == whole["weights"]
        assert whole["again"] == after(whole["losses"], 2)
        assert whole["weights_again"] == whole["weights"]


@pytest.mark.parametrize("zero", [0, 1, 2, 3])
def test_a_resumed_run_is_the_unbroken_one_bit_for_bit(stages: Stages, tmp_path: Path, zero: int) -> None:  # noqa: F811
    _go_on(stages, tmp_path, zero=zero)


def test_so_it_is_in_bf16(stages: Stages, tmp_path: Path) -> None:  # noqa: F811
    _go_on(stages, tmp_path, zero=2, precision="bf16")


@pytest.mark.parametrize("zero", [0, 3])
def test_frozen_weights_are_left_out_and_come_from_the_base(stages: Stages, tmp_path: Path, zero: int) -> None:  # noqa: F811
    _go_on(stages, tmp_path, zero=zero, frozen=True, width=256)
    manifest = verify(tmp_path / "checkpoints" / "step-00000002")
    frozen_bytes = 4 * 256 * 256
    assert sum(record.size for record in manifest.files.values()) < frozen_bytes


@pytest.mark.matrix
@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("world", [1, 2])
@pytest.mark.parametrize("zero", [0, 1, 2, 3])
def test_every_layout_goes_on_bit_for_bit(
    stages: Stages,  # noqa: F811
    tmp_path: Path,
    zero: int,
    world: int,
    precision: str,
    frozen: bool,
) -> None:
    _go_on(stages, tmp_path, zero=zero, world=world, precision=precision, frozen=frozen)


def test_the_newest_and_the_best_are_kept_and_the_best_can_be_gone_back_to(stages: Stages, tmp_path: Path) -> None:  # noqa: F811
    metrics = {"1": 3.0, "2": 1.0, "3": 2.0, "4": 2.0}
    whole = stages.run(tmp_path, 5, zero=2, save_at=[1, 2, 3, 4, 5], metrics=metrics, keep=2)
    assert folders(tmp_path) == ["step-00000002", "step-00000004", "step-00000005"]
    assert json.loads((tmp_path / "best.json").read_text()) == {"checkpoint": "step-00000002", "step": 2, "metric": 1.0}
    about = verify(tmp_path / "checkpoints" / "step-00000002").about
    assert (about["step"], about["world"], about["zero_stage"], about["metric"], about["note"]) == (
        2,
        2,
        2,
        1.0,
        "kept",
    )
    best = stages.run(tmp_path, 5, zero=2, resume="best")
    assert [rank["resumed"] for rank in best] == [2, 2]
    assert best[0]["losses"] == after(whole[0]["losses"], 2)


def test_another_layout_is_refused_and_another_weight_decay_has_its_effect(stages: Stages, tmp_path: Path) -> None:  # noqa: F811
    stages.run(tmp_path, 1, zero=1, save_at=[1])
    changed = stages.run(tmp_path, 1, zero=1, resume="newest", weight_decay=0.25)
    assert [rank["decay"] for rank in changed] == [[0.25, 0.0]] * 2
    for layout in ({"zero": 2}, {"zero": 1, "world": 1}):
        for rank in stages.run(tmp_path, 1, resume="newest", **layout):
            assert rank["error"][0] == "CheckpointError"
            assert "written by 2 workers under ZeRO-1, but this run has" in rank["error"][1]


def test_an_attempt_that_was_overtaken_commits_nothing(stages: Stages, tmp_path: Path) -> None:  # noqa: F811
    for rank in stages.run(tmp_path, 2, save_at=[1, 2], fence_step=2):
        assert rank["error"] == [
            "FencedError",
            f"run {tmp_path.name}: attempt 1 may not write, attempt 2 has taken over",
        ]
    assert folders(tmp_path) == ["step-00000001"]
