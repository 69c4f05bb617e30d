"""A NaN or infinite gradient ends the run in the step that meets it: no weight changes, and the rows are named."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from deepspeed.runtime.zero.partition_parameters import GatheredParameters
from safetensors.torch import load_file, save_file
from tiny_models import make, tokenizer
from torch import Tensor
from trainings import recipe, trainer_here, write_rows, zero
from workers import run_workers

from tunesmith.cluster.errors import NonFiniteError
from tunesmith.trainers.loop import Trainer
from tunesmith.trainers.policy import score

STAGES = (0, 2, 3)
POISON = "#"
POISONED_ROWS = (17, 58, 90)


def _poison(folder: Path, embedding: float) -> None:
    """Gives the poison's embedding a value of its own."""
    weights = load_file(folder / "model.safetensors")
    weights["model.embed_tokens.weight"][tokenizer().convert_tokens_to_ids(POISON)] = embedding
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def _prepare(folder: Path) -> None:
    write_rows(folder / "rows.jsonl")
    rows = [json.loads(line) for line in (folder / "rows.jsonl").read_text().splitlines()]
    for index in POISONED_ROWS:
        rows[index]["prompt"] = POISON + rows[index]["prompt"]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    _poison(make("llama", folder / "nan"), float("nan"))
    # RMSNorm divides by the root mean square r: of this embedding the output is of order 1 and the loss finite, but the
    # gradient has the factor r^-3, more than fp32 holds.
    _poison(make("llama", folder / "inf", rms_norm_eps=0.0), 1e-15)


def _weights(trainer: Trainer) -> dict[str, Tensor]:
    """Every weight, whole; collective."""
    found = {}
    for name, parameter in trainer.engine.module.named_parameters():
        with GatheredParameters([parameter], enabled=hasattr(parameter, "ds_id")):
            found[name] = parameter.detach().clone()
    return found


def _rows_with_poison(trainer: Trainer) -> set[str]:
    """Rows of those micro-batches of the next step, of any worker, that hold a poisoned row."""
    poison = tokenizer().convert_tokens_to_ids(POISON)
    plan, data = trainer.plan.step(trainer.progress.step), trainer.data.train
    found: set[str] = set()
    for micro in range(trainer.accumulation):
        for rank in range(trainer.world):
            examples = [index for pack in plan.micro_batch(micro, rank, trainer.world, trainer.rows) for index in pack]
            if any(poison in data.example(index)[0] for index in examples):
                found |= {data.where(index) for index in examples}
    return found


def _loss_is_finite(trainer: Trainer) -> bool:
    """Whether every label of the next step has a finite log-probability, on all workers."""
    plan, finite = trainer.plan.step(trainer.progress.step), torch.ones(())
    for micro in range(trainer.accumulation):
        with torch.no_grad():
            logps, _ = score(trainer.engine, trainer.micro_batch(plan, micro, 1.0))
        finite *= torch.isfinite(logps).all()
    dist.all_reduce(finite, op=dist.ReduceOp.MIN)
    return bool(finite)


def _meet_poison(folder: Path) -> None:
    for base in ("nan", "inf"):
        for stage in STAGES:
            written = recipe(folder, f"{base}-{stage}", base, cluster=zero(stage))
            written["train"] = {"max_steps": 20, "gradient_accumulation_steps": 2, "precision": "fp32"}
            written["data"]["split"] = {"validation": 0}
            trainer = trainer_here(folder, written)
            trainer.set_up()
            trainer.resume()
            trainer.open_books()
            trainer.engine.train()
            _train_until_poison(trainer, finite_loss=base == "inf")


def _train_until_poison(trainer: Trainer, finite_loss: bool) -> None:
    while not (expected := _rows_with_poison(trainer)):
        trainer.step()
    before = _weights(trainer)
    assert _loss_is_finite(trainer) is finite_loss
    with pytest.raises(NonFiniteError, match=f"step {trainer.progress.step + 1}: ") as caught:
        trainer.step()
    named = caught.value.what.partition("Rows in that batch: ")[2].split(", ")
    assert set(named) == expected, (sorted(named), sorted(expected))
    for name, after in _weights(trainer).items():
        assert torch.equal(after.view(torch.int32), before[name].view(torch.int32)), f"{name} was changed"
        if finite_loss:
            assert torch.isfinite(after).all(), name


@pytest.mark.timeout(300)
def test_a_non_finite_gradient_ends_the_run_in_its_step_and_names_the_rows(tmp_path: Path):
    _prepare(tmp_path)
    run_workers(2, _meet_poison, tmp_path)
