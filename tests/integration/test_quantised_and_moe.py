"""QLoRA and mixture-of-experts models train alike under every ZeRO stage, and what is frozen stays as it was."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import make, tokenizer
from trainings import assert_frozen_weights_unchanged, losses, recipe, train_here, write_rows, zero
from transformers import AutoModelForCausalLM
from workers import run_workers

from tunesmith.trainers.loop import Trainer
from tunesmith.trainers.moe import moe_blocks

A_ROW, B_ROW = "aaaaaaaaaaaaaaaaaaaaaaaa", "bbbbbbbbbbbbbbbbbbbbbbbb"


def _train_quantised(folder: Path, stages: tuple[int, ...]) -> None:
    for stage in stages:
        written = recipe(
            folder,
            f"nf4-{stage}",
            "llama",
            model={"quantization": "nf4"},
            adaptation={"kind": "lora", "rank": 4, "target_modules": "all-linear"},
            cluster=zero(stage),
        )
        assert_frozen_weights_unchanged(folder, train_here(folder, written))


@pytest.mark.timeout(400)
def test_qlora_agrees_between_stages(tmp_path: Path) -> None:
    make("llama", tmp_path / "llama", hidden_size=64, head_dim=16)
    write_rows(tmp_path / "rows.jsonl")
    run_workers(2, _train_quantised, tmp_path, (0, 2, 3))
    wanted = losses(tmp_path, "nf4-0")
    assert len(wanted) == 20
    assert wanted[-1] < wanted[0]
    for stage in (2, 3):
        assert losses(tmp_path, f"nf4-{stage}") == pytest.approx(wanted, abs=1e-2), stage


def _make_split_router(kind: str, folder: Path) -> None:
    """A model that sends the letters a and b to disjoint experts, in every layer."""
    make(kind, folder)
    model: Any = AutoModelForCausalLM.from_pretrained(folder)
    a, b = (tokenizer().encode(letter)[0] for letter in "ab")
    with torch.no_grad():
        direction = torch.randn(model.config.hidden_size)
        model.get_input_embeddings().weight[a] = 5 * direction
        model.get_input_embeddings().weight[b] = -5 * direction
        for block in moe_blocks(model):
            weight: Any = block.gate.weight
            weight.mul_(0.1)
            weight[: len(weight) // 2] += direction
            weight[len(weight) // 2 :] -= direction
    model.save_pretrained(folder)


def _experts_of(folder: Path, row: str) -> set[tuple[int, int]]:
    """The experts that a row's tokens are sent to, by layer."""
    model: Any = AutoModelForCausalLM.from_pretrained(folder)
    chosen: set[tuple[int, int]] = set()
    top_k = model.config.num_experts_per_tok
    for layer, block in enumerate(moe_blocks(model)):

        def note(_module: Any, _args: Any, output: Any, layer: int = layer) -> None:
            logits = output[0] if isinstance(output, tuple) else output
            chosen.update((layer, int(expert)) for expert in logits.topk(top_k).indices.flatten())

        block.gate.register_forward_hook(note)  # type: ignore[operator, union-attr]
    model(torch.tensor([tokenizer().encode(row)]))
    return chosen


def _train_moe(folder: Path, kind: str, runs: list[tuple[str, int]]) -> None:
    for adaptation, stage in runs:
        written = recipe(
            folder,
            f"{kind}-{adaptation}-{stage}",
            kind,
            objective="cpt",
            data={"packing": False, "split": {"validation": 0.0}},
            adaptation={"kind": adaptation, **({"rank": 4} if adaptation == "lora" else {})},
            train={"eval_steps": None},
            cluster=zero(stage),
        )
        del written["train"]["eval_steps"]
        trainer = train_here(folder, written)
        assert _ranks_were_apart(trainer), "no step gave the two ranks different letters"
        if adaptation == "lora":
            assert_frozen_weights_unchanged(folder, trainer)


def _ranks_were_apart(trainer: Trainer) -> bool:
    store = trainer.data.train
    firsts = [[int(store.example(pack[0])[0][0]) for pack in trainer.plan.step(step).packs] for step in range(20)]
    return any(len(set(first)) == 2 for first in firsts)


def _moe(folder: Path, kind: str, runs: list[tuple[str, int]]) -> None:
    _make_split_router(kind, folder / kind)
    assert not _experts_of(folder / kind, A_ROW) & _experts_of(folder / kind, B_ROW)
    rows = [json.dumps({"text": row[: 8 + n]}) for n in range(16) for row in (A_ROW, B_ROW)]
    (folder / "rows.jsonl").write_text("\n".join(rows))
    run_workers(2, _train_moe, folder, kind, runs)
    for adaptation in {adaptation for adaptation, _ in runs}:
        wanted = losses(folder, f"{kind}-{adaptation}-2")
        assert len(wanted) == 20
        assert wanted[-1] < wanted[0]
        assert losses(folder, f"{kind}-{adaptation}-3") == pytest.approx(wanted, abs=1e-3)


@pytest.mark.timeout(300)
def test_mixtral_routes_apart_without_hanging(tmp_path: Path) -> None:
    _moe(tmp_path, "mixtral", [("lora", 2), ("lora", 3)])


@pytest.mark.matrix
@pytest.mark.timeout(600)
@pytest.mark.parametrize("kind", ["mixtral", "qwen3_moe"])
def test_moe_full_and_lora_agree_between_stages(tmp_path: Path, kind: str) -> None:
    _moe(tmp_path, kind, [("full", 2), ("full", 3), ("lora", 2), ("lora", 3)])
