"""Real tiny trainings whose memory is followed, beside what the planner says for the same batches."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch.distributed as dist
from tiny_models import make
from trainings import recipe, trainer_here, zero

from tunesmith.trainers.memory.expect import expected_peak

WORKERS = 2


@dataclass(frozen=True)
class Run:
    """What is trained."""

    stage: int
    adaptation: Any = "full"
    precision: str = "fp32"
    accumulation: int = 1
    model: str = "llama"
    checkpointing: bool = False

    @property
    def name(self) -> str:
        kind = self.adaptation if isinstance(self.adaptation, str) else self.adaptation["kind"]
        checkpointing = "-checkpointing" if self.checkpointing else ""
        return f"{self.model}-{kind}-{self.precision}-stage{self.stage}-accumulation{self.accumulation}{checkpointing}"


def prepare(folder: Path) -> None:
    """Models of five layers, so that the planner extrapolates, and rows of one length, so that all batches are alike."""
    for kind in ("llama", "qwen3_moe"):
        make(kind, folder / kind, num_hidden_layers=5, hidden_size=64)
    rows = [{"text": (f"{number:03d}" + "abcdefghijklmnopqrstuvwxyz" * 3)[:63]} for number in range(60)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def recipe_of(folder: Path, run: Run) -> dict[str, Any]:
    written = recipe(
        folder,
        run.name,
        run.model,
        cluster=zero(run.stage),
        adaptation=run.adaptation,
        objective="cpt",
        train={
            "gradient_accumulation_steps": run.accumulation,
            "precision": run.precision,
            "max_steps": 2,
            **({"gradient_checkpointing": True} if run.checkpointing else {}),
        },
    )
    written["data"]["split"] = {"validation": 0.0}
    written["train"].pop("eval_steps")
    return written


def train_and_compare(folder: Path, run: Run) -> None:
    """Trains two steps and leaves measured and predicted bytes, by cause, in `figures/`. Collective.

    A process of its own for each: what DeepSpeed leaves of an earlier engine would be measured too.
    """
    trainer = trainer_here(folder, recipe_of(folder, run))
    trainer.set_up()
    trainer.engine.train()
    for _ in range(2):
        with trainer.meter.step():
            trainer.step()
    shape = trainer.meter.shape
    assert shape is not None
    if dist.get_rank() == 0:
        config = json.loads((folder / run.model / "config.json").read_text())
        predicted = expected_peak(trainer.recipe, config, shape, WORKERS, on_gpu=False)
        figures = {"measured": dict(trainer.meter.causes), "predicted": dict(predicted)}
        (folder / "figures").mkdir(exist_ok=True)
        (folder / "figures" / f"{run.name}.json").write_text(json.dumps(figures, indent=1))
    dist.barrier()
