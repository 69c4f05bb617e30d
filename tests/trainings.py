"""Whole trainings without Ray, for tests that compare runs: the loop under a gloo process group."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from tunesmith.cluster.metrics import read_metrics
from tunesmith.cluster.recipe.schema import Recipe
from tunesmith.cluster.runs import RunFolder
from tunesmith.trainers import elastic, models
from tunesmith.trainers.data.prepare import prepare
from tunesmith.trainers.export import whole_weights
from tunesmith.trainers.loop import Trainer, TrainJob
from tunesmith.trainers.models import resolve_base

READ_BY_DRIVER = ["name", "model.base", "output.dir"]


def write_rows(path: Path, count: int = 120, seed: int = 0) -> None:
    """Completions that count on from their prompt's letter: quickly learnt, different lengths."""
    rng = random.Random(seed)
    letters = "abcdefghijklmnopqrstuvwxyz" * 3
    with path.open("w") as file:
        for _ in range(count):
            at, length = rng.randrange(26), rng.randrange(3, 40)
            row = {"prompt": f"{letters[at]}>", "completion": letters[at + 1 : at + 1 + length]}
            file.write(json.dumps(row) + "\n")


def recipe(folder: Path, name: str, base: str, **sections: Any) -> dict[str, Any]:
    """A recipe as a worker is given it; `sections` are merged into its own."""
    made: dict[str, Any] = {
        "name": name,
        "model": {"base": str(folder / base)},
        "data": {"train": str(folder / "rows.jsonl"), "max_length": 64},
        "objective": "sft",
        "adaptation": "full",
        "train": {"max_steps": 20, "learning_rate": 2e-3, "warmup_steps": 2, "eval_steps": 10, "precision": "fp32"},
        "cluster": {"workers": dist.get_world_size() if dist.is_initialized() else 1},
        "output": {"dir": str(folder / "runs"), "report_to": []},
    }
    for section, values in sections.items():
        made[section] = {**made[section], **values} if isinstance(made.get(section), dict) else values
    return made


def zero(stage: int) -> dict[str, Any]:
    """The `cluster` section of a ZeRO stage that shards every parameter, however small."""
    return {"zero": stage, **({"zero3_persistence_threshold": 0} if stage == 3 else {})}


def train_here(folder: Path, written: dict[str, Any], attempt: int = 1) -> Trainer:
    """Trains in this worker of a process group; collective. The trainer is returned as the run left it."""
    trainer = trainer_here(folder, written, attempt)
    trainer.run()
    return trainer


def trainer_here(folder: Path, written: dict[str, Any], attempt: int = 1) -> Trainer:
    """A trainer in this worker of a process group, not yet set up; collective."""
    torch.set_num_threads(1)
    run = RunFolder(folder / "runs" / written["name"])
    if not dist.is_initialized() or dist.get_rank() == 0:
        run.create()
        while run.current_attempt() < attempt:
            run.begin_attempt()
    dist.barrier()
    base, cache = resolve_base(written["model"]["base"], None, folder / "runs"), folder / "runs" / ".cache"
    whole = Recipe.model_validate(written)
    whole.forget_reads()
    data = prepare(whole, base, cache).fingerprint
    elastic.worlds(whole)  # as the driver does
    job = TrainJob(written, [*READ_BY_DRIVER, *whole.read_keys()], run.root, cache, data, base, attempt)
    return Trainer(job, lambda: None)


def losses(folder: Path, name: str) -> list[float]:
    """The training loss of every step."""
    return [line["loss"] for line in read_metrics(folder / "runs" / name / "metrics.jsonl") if "loss" in line]


def gradient_norms(folder: Path, name: str) -> list[float]:
    """The norm of every step's gradient, before clipping."""
    return [line["grad_norm"] for line in read_metrics(folder / "runs" / name / "metrics.jsonl") if "loss" in line]


def assert_frozen_weights_unchanged(folder: Path, trainer: Trainer) -> None:
    """Collective. Bit for bit, gathered from all shards and compared with the base loaded anew."""
    after = whole_weights(trainer.engine.module.model, lambda _name, p: not p.requires_grad)
    if dist.get_rank() > 0:
        return
    base = resolve_base(trainer.recipe.model.base, None, folder / "runs")
    fresh = models.build(trainer.recipe, base, device="cpu", dtype=torch.float32, zero3=False)
    before = {name: p.detach() for name, p in fresh.named_parameters() if not p.requires_grad}
    assert before.keys() == after.keys() - {name for name, _ in fresh.named_buffers(remove_duplicate=False)}
    assert before, "nothing is frozen"
    for name, weight in before.items():
        assert torch.equal(_codes(weight), _codes(after[name])), name


def _codes(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().contiguous().view(torch.uint8).flatten()
