"""PEFT's types really train: the loss falls, the base stays, every ZeRO stage is the same run, and plain PEFT loads the result."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from peft import AutoPeftModelForCausalLM
from peft_configs import PEFT_CONFIGS, adaptation
from tiny_models import make
from trainings import assert_frozen_weights_unchanged, losses, recipe, train_here, trainer_here, write_rows, zero
from workers import run_workers

from tunesmith.trainers.adaptations.peft_types import PEFT_TYPES
from tunesmith.trainers.receipts import parity

FEW = ["BOFT", "IA3", "VBLORA", "VERA"]
"""One that turns weights, one that scales, one whose layers share weights, one whose layers share buffers."""
REST = sorted(set(PEFT_CONFIGS) - set(FEW))
ON_ONE_BATCH: dict[str, Any] = {"max_steps": 8, "warmup_steps": 0, "per_device_train_batch_size": 8}
CANNOT_MERGE = {"ADAPTION_PROMPT", "BEFT"}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    make("llama", tmp_path / "llama")
    write_rows(tmp_path / "rows.jsonl", 12)
    return tmp_path


def name_of(peft_type: str, label: object) -> str:
    return f"{peft_type.lower().replace('_', '-')}-{label}"


def on_one_batch(folder: Path, peft_type: str, label: object, **sections: Any) -> dict[str, Any]:
    """Eight steps on the same rows; their validation split is for the receipt alone."""
    train = {**ON_ONE_BATCH, "learning_rate": 2e-2 if peft_type == "PVERA" else 1e-2, **sections.pop("train", {})}
    split = {"split": {"validation": 0.2}}
    made = recipe(
        folder,
        name_of(peft_type, label),
        "llama",
        adaptation=adaptation(peft_type),
        data=split,
        train=train,
        **sections,
    )
    del made["train"]["eval_steps"]
    return made


def _train(folder: Path, types: list[str]) -> None:
    for peft_type in types:
        trainer = train_here(folder, on_one_batch(folder, peft_type, "alone"))
        assert_frozen_weights_unchanged(folder, trainer)
        course = losses(folder, name_of(peft_type, "alone"))
        assert course[-1] < course[0] - 0.005, (peft_type, course)
        _assert_plain_peft_loads_it(trainer, peft_type)


def _assert_plain_peft_loads_it(trainer: Any, peft_type: str) -> None:
    artifact, data = trainer.run_folder.artifact, trainer.data
    receipt = json.loads((artifact / "receipts" / "parity.json").read_text())
    merged = set() if peft_type in CANNOT_MERGE else {"merged"}
    assert set(receipt["differences"]) == {"artifact", *merged}, (peft_type, receipt)
    assert bool(receipt["unmerged"]) == (not merged), (peft_type, receipt)
    assert ("cannot be merged" in (artifact / "README.md").read_text()) == (not merged)
    plain = AutoPeftModelForCausalLM.from_pretrained(artifact)
    ours = parity.training_logps(trainer.engine, data.train, [0, 1], 64, torch.device("cpu"))
    theirs = parity.plain_logps(plain, data.train, [0, 1])
    np.testing.assert_allclose(np.concatenate(ours), np.concatenate(theirs), atol=2e-5, err_msg=peft_type)


def test_a_few_types_train_and_load(folder: Path) -> None:
    run_workers(1, _train, folder, FEW)


@pytest.mark.matrix
@pytest.mark.parametrize("part", range(4))
def test_every_type_trains_and_loads(folder: Path, part: int) -> None:
    run_workers(1, _train, folder, REST[part::4])


def _train_at_stages(folder: Path, types: list[str]) -> None:
    train = {"max_steps": 6, "per_device_train_batch_size": 1}
    for peft_type in types:
        for stage in (0, 2) if PEFT_TYPES[peft_type].unsharded else (0, 2, 3):
            train_here(folder, on_one_batch(folder, peft_type, stage, cluster=zero(stage), train=train))


def assert_stages_agree(folder: Path, types: list[str]) -> None:
    run_workers(2, _train_at_stages, folder, types)
    for peft_type in types:
        wanted = losses(folder, name_of(peft_type, 0))
        assert len(wanted) == 6
        for stage in (2,) if PEFT_TYPES[peft_type].unsharded else (2, 3):
            assert losses(folder, name_of(peft_type, stage)) == pytest.approx(wanted, abs=1e-4), (peft_type, stage)


@pytest.mark.timeout(300)
def test_stages_agree_on_a_few_types(folder: Path) -> None:
    assert_stages_agree(folder, ["BOFT", "VERA"])


@pytest.mark.matrix
@pytest.mark.timeout(600)
@pytest.mark.parametrize("part", range(6))
def test_stages_agree_on_every_type(folder: Path, part: int) -> None:
    assert_stages_agree(folder, sorted(set(PEFT_CONFIGS) - {"BOFT", "VERA"})[part::6])


def _stop_and_go_on(folder: Path, stages: list[int]) -> None:
    for stage in stages:
        for peft_type in ("VERA", "SHIRA", "VBLORA"):
            train_here(folder, on_one_batch(folder, peft_type, f"whole-{stage}", cluster=zero(stage)))
            written = on_one_batch(folder, peft_type, f"halves-{stage}", cluster=zero(stage))
            first = trainer_here(folder, written)
            first.run_folder.request_stop()
            assert not first.run().finished
            dist.barrier()
            if dist.get_rank() == 0:
                first.run_folder.clear_stop()
            train_here(folder, written, attempt=2)


@pytest.mark.timeout(300)
@pytest.mark.matrix
def test_a_resumed_run_is_the_same_run(folder: Path) -> None:
    run_workers(2, _stop_and_go_on, folder, [2, 3])
    for stage in (2, 3):
        for peft_type in ("VERA", "SHIRA", "VBLORA"):
            whole = losses(folder, name_of(peft_type, f"whole-{stage}"))
            assert len(whole) == 8
            assert losses(folder, name_of(peft_type, f"halves-{stage}")) == whole, (peft_type, stage)


def _train_variants(folder: Path) -> None:
    variants: dict[str, dict[str, Any]] = {
        "dora": {"use_dora": True},
        "rslora": {"use_rslora": True},
        "head": {"modules_to_save": ["lm_head"]},
        "bias": {"lora_bias": True},
    }
    for label, changes in variants.items():
        for stage in (0, 3):
            written = on_one_batch(folder, "LORA", f"{label}-{stage}", cluster=zero(stage))
            written["adaptation"] = adaptation("LORA", **changes)
            train_here(folder, written)


@pytest.mark.matrix
@pytest.mark.timeout(300)
def test_variants_of_lora_agree_between_stages(folder: Path) -> None:
    run_workers(2, _train_variants, folder)
    for label in ("dora", "rslora", "head", "bias"):
        wanted = losses(folder, f"lora-{label}-0")
        assert wanted[-1] < wanted[0]
        assert losses(folder, f"lora-{label}-3") == pytest.approx(wanted, abs=1e-4), label
