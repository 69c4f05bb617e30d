"""Configurations that cannot fit are told from those that can, by the planner."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from small_runs import write_rows
from sweep_recipes import sweep_recipe

from tunesmith.cluster.base import BaseRef
from tunesmith.cluster.recipe.mistakes import all_keys
from tunesmith.cluster.recipe.schema import Recipe
from tunesmith.cluster.resources import Need, Node
from tunesmith.trainers.models import resolve_base
from tunesmith.tuning import feasible
from tunesmith.tuning.feasible import HARMLESS, Feasibility, side_by_side, why_not
from tunesmith.tuning.space import recipe_of

NEED = Need(workers=1, cpus=1)


@pytest.fixture
def base(tiny_base: Path) -> BaseRef:
    return resolve_base(str(tiny_base), None, tiny_base.parent)


@pytest.fixture
def recipe(tmp_path: Path, tiny_base: Path) -> Recipe:
    rows = write_rows(tmp_path / "rows.jsonl", 20)
    return sweep_recipe(
        sections={
            "model": {"base": str(tiny_base)},
            "data": {"train": str(rows), "max_length": 64},
            "cluster": {"workers": 1, "cpus_per_worker": 1},
        }
    )


def test_a_configuration_that_cannot_fit_is_refused_with_the_numbers(recipe: Recipe, base: BaseRef):
    plain = recipe_of(recipe, {"train.per_device_train_batch_size": 4})
    assert why_not(plain, base, [Node(cpus=1, memory_gib=64)], NEED, 64) is None
    reason = why_not(plain, base, [Node(cpus=1, memory_gib=0.05)], NEED, 64)
    assert reason is not None
    assert re.search(r"\d\.\d+ GiB", reason), reason


def test_configurations_that_differ_in_harmless_keys_are_simulated_once(
    recipe: Recipe, base: BaseRef, monkeypatch: pytest.MonkeyPatch
):
    asked: list[dict[str, Any]] = []

    def answer(made: Recipe, *_: Any) -> str | None:
        asked.append(made.model_dump(exclude_unset=True))
        return "large" if made.train.per_device_train_batch_size == 8 else None

    monkeypatch.setattr(feasible, "why_not", answer)
    asking = Feasibility(base, [Node(cpus=1, memory_gib=1)], NEED, 64, lambda values: recipe_of(recipe, values))
    rows, rate = "train.per_device_train_batch_size", "train.learning_rate"
    answers = [asking.why_not({rate: value, rows: count}) for value in (0.1, 0.2, 0.3) for count in (4, 8)]
    assert answers == [None, "large"] * 3
    assert [made["train"]["per_device_train_batch_size"] for made in asked] == [4, 8]
    assert asking.why_not({"adaptation.rank": 64, rows: 4}) is None
    assert len(asked) == 3


def test_harmless_keys_are_keys_of_a_recipe():
    assert set(HARMLESS) <= set(all_keys(Recipe))
    assert not {"adaptation.rank", "train.per_device_train_batch_size", "data.max_length"} & set(HARMLESS)


def test_so_many_lanes_are_one_run_with_all_their_rows_and_adapters(recipe: Recipe):
    plain = recipe_of(recipe, {"train.gradient_accumulation_steps": 4, "cluster.workers": 2})
    made = side_by_side(plain, lanes=6, rank=16, targets=["a", "b"])
    assert made.adaptation.model_dump()["target_modules"] == ["a", "b"]
    assert made.adaptation.model_dump()["rank"] == 96
    assert (made.train.per_device_train_batch_size, made.train.gradient_accumulation_steps) == (6, 1)
    assert (made.cluster.workers, made.cluster.zero) == (1, 0)
