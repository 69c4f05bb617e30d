"""Recipes with a `tune` section, for tests of what comes before any training."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tunesmith.cluster.recipe.schema import Recipe
from tunesmith.cluster.recipe.tune import Tune
from tunesmith.tuning.records import Report

LEARNING_RATE = {"train.learning_rate": {"loguniform": [1e-5, 1e-2]}}


def sweep_recipe(
    space: Mapping[str, Any] = LEARNING_RATE,
    adaptation: Any = "lora",
    sections: Mapping[str, Any] | None = None,
    **tune: Any,
) -> Recipe:
    """A recipe that searches `space`.

    Args:
        sections: further sections of the recipe.
        tune: further keys of the `tune` section.
    """
    return Recipe.model_validate(
        {
            "name": "bot",
            "model": {"base": "base"},
            "data": {"train": "rows.jsonl"},
            "objective": "sft",
            "adaptation": adaptation,
            "tune": {"space": dict(space), **tune},
            **(sections or {}),
        }
    )


def tune_section(space: Mapping[str, Any] = LEARNING_RATE, **tune: Any) -> Tune:
    """A `tune` section alone."""
    return Tune.model_validate({"space": dict(space), **tune})


def reported(number: int, value: float, **more: Any) -> Report:
    """A trial's report: ten steps and a hundred tokens after the one before."""
    return Report(number, 10 * number, 100 * number, 2.0 * number, value, **more)
