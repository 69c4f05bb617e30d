"""Eight bits: a base held as LLM.int8, and AdamW's moments."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from peft_configs import adaptation
from tiny_models import make
from trainings import assert_frozen_weights_unchanged, losses, recipe, train_here, trainer_here, write_rows, zero
from workers import run_workers

from tunesmith.trainers.loop import Trainer


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    make("llama", tmp_path / "llama", hidden_size=128, head_dim=32)  # tensors of under 4,096 numbers keep 32 bits
    write_rows(tmp_path / "rows.jsonl")
    return tmp_path


def _train_over_int8(folder: Path) -> None:
    for kind in ("lora", "IA3"):
        for stage in (0, 1, 2):
            written = recipe(
                folder,
                f"{kind.lower()}-{stage}",
                "llama",
                model={"quantization": "int8"},
                adaptation={"kind": "lora", "rank": 4} if kind == "lora" else adaptation(kind),
                cluster=zero(stage),
                train={"max_steps": 10, "learning_rate": 1e-2},
            )
            trainer = train_here(folder, written)
            codes = [p for p in trainer.engine.module.parameters() if p.dtype == torch.int8]
            assert len(codes) == 14, "seven linear layers in each of two blocks"
            assert_frozen_weights_unchanged(folder, trainer)


@pytest.mark.timeout(300)
@pytest.mark.matrix
def test_adapters_over_int8_agree_between_stages(folder: Path) -> None:
    run_workers(2, _train_over_int8, folder)
    for kind in ("lora", "ia3"):
        wanted = losses(folder, f"{kind}-0")
        assert wanted[-1] < wanted[0]
        for stage in (1, 2):
            assert losses(folder, f"{kind}-{stage}") == pytest.approx(wanted, abs=2e-2), (kind, stage)


def eight_bits(folder: Path, name: str, stage: int, optimizer: str = "adamw_8bit") -> dict[str, Any]:
    return recipe(folder, name, "llama", cluster=zero(stage), train={"optimizer": optimizer, "max_steps": 12})


def _train_with_8_bit_moments(folder: Path, stages: list[int]) -> None:
    for stage in stages:
        train_here(folder, eight_bits(folder, f"plain-{stage}", stage, "adamw"))
        trainer = train_here(folder, eight_bits(folder, f"whole-{stage}", stage))
        bytes_of_moments, elements = _moments(trainer)
        assert 2.0 < bytes_of_moments / elements < 2.2, (stage, bytes_of_moments, elements)
        written = eight_bits(folder, f"halves-{stage}", stage)
        first = trainer_here(folder, written)
        first.run_folder.request_stop()
        assert not first.run().finished
        dist.barrier()
        if dist.get_rank() == 0:
            first.run_folder.clear_stop()
        train_here(folder, written, attempt=2)


def _moments(trainer: Trainer) -> tuple[int, int]:
    """Bytes of this worker's moments, with the scales of their blocks, and the elements they are of."""
    optimizer: Any = trainer.engine.optimizer
    states = getattr(optimizer, "optimizer", optimizer).state
    held = [
        value.nbytes
        for state in states.values()
        for key, value in state.items()
        if isinstance(value, torch.Tensor) and not key.startswith("qmap")  # the table of 256 numbers is one for all
    ]
    return sum(held), sum(parameter.numel() for parameter in states)


@pytest.mark.timeout(400)
def test_8_bit_moments_train_alike_take_a_quarter_and_resume(folder: Path) -> None:
    run_workers(2, _train_with_8_bit_moments, folder, [0, 2, 3])
    for stage in (0, 2, 3):
        whole = losses(folder, f"whole-{stage}")
        assert len(whole) == 12
        assert whole == pytest.approx(losses(folder, f"plain-{stage}"), abs=0.1), stage
        assert whole != losses(folder, f"plain-{stage}")
        assert losses(folder, f"halves-{stage}") == whole, stage
