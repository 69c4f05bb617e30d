"""Small sweeps for tests: a tiny base, LoRA trials of a few seconds, and what they left behind."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import tiny_models
import trainings

from tunesmith.cluster.recipe.schema import Recipe

SPACE: dict[str, Any] = {
    "train.learning_rate": {"loguniform": [1e-5, 3e-2]},
    "adaptation.rank": {"choice": [4, 8]},
}


def with_base_and_rows(folder: Path) -> Path:
    """The folder, once `sweep_recipe` finds in it what it names."""
    tiny_models.make("llama", folder / "llama")
    trainings.write_rows(folder / "rows.jsonl")
    return folder


def sweep_recipe(folder: Path, name: str, train: dict[str, Any] | None = None, **tune: Any) -> dict[str, Any]:
    """A recipe over `folder`/llama and `folder`/rows.jsonl."""
    return {
        "name": name,
        "model": {"base": str(folder / "llama")},
        "data": {"train": str(folder / "rows.jsonl"), "max_length": 64, "split": {"validation": 0.1}},
        "objective": "sft",
        "adaptation": {"kind": "lora"},
        "train": {"max_steps": 12, "precision": "fp32", **(train or {})},
        "cluster": {"cpus_per_worker": 1},
        "output": {"dir": str(folder / "runs"), "report_to": []},
        "tune": {
            "space": SPACE,
            "searcher": "random",
            "scheduler": "none",
            "trials": 6,
            "reports": 4,
            "seed": 1,
            **tune,
        },
    }


def loaded(written: dict[str, Any]) -> Recipe:
    """The recipe as the command line gives it to a sweep."""
    made = Recipe.model_validate(written)
    made.forget_reads()
    return made


def results(folder: Path, name: str) -> dict[str, Any]:
    """What the sweep wrote."""
    return json.loads((folder / "runs" / name / "results.json").read_text())


def outcome(folder: Path, name: str) -> list[tuple[Any, ...]]:
    """What must be the same in two sweeps of one recipe: every trial's values, end and reports."""
    return [
        (
            trial["trial"],
            tuple(trial["values"].items()),
            trial["state"],
            [(one["step"], one["value"]) for one in trial["reports"]],
        )
        for trial in results(folder, name)["trials"]
    ]
