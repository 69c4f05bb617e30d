"""Trials side by side on one tiny base, without Ray, for tests that compare them with each trial alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from tunesmith.cluster.recipe.schema import Recipe
from tunesmith.trainers.adaptations.lora import matches
from tunesmith.trainers.data.prepare import Prepared, prepare
from tunesmith.trainers.models import resolve_base, skeleton
from tunesmith.tuning.fused.begin import begin
from tunesmith.tuning.fused.group import Group
from tunesmith.tuning.fused.trial import Trial

CPU = torch.device("cpu")


def prepared(folder: Path, recipe: Recipe) -> Prepared:
    """The recipe's data set."""
    base = resolve_base(recipe.model.base, None, folder / "runs")
    return prepare(recipe, base, folder / "runs" / ".cache")


def group_for(folder: Path, recipes: list[Recipe], lanes: int, **settings: Any) -> Group:
    """A group that can train all of these recipes."""
    base = resolve_base(recipes[0].model.base, None, folder / "runs")
    model = skeleton(base)
    targets = sorted({name for recipe in recipes for name in matches(model, recipe.adaptation.target_modules)})  # type: ignore[union-attr]
    data = prepared(folder, recipes[0])
    return Group(recipes[0], base, data, targets, data.max_length, lanes, CPU, torch.float32, **settings)


def trial_in(group: Group, folder: Path, recipe: Recipe) -> Trial:
    """A new trial of the group."""
    base = resolve_base(recipe.model.base, None, folder / "runs")
    adapter = begin(group, recipe, base)
    return Trial(recipe.name, recipe, group.data, adapter, group.length)


def train_all(group: Group, trials: list[Trial], steps: int) -> None:
    """Trains every trial for so many steps of its own."""
    while unfinished := [trial for trial in trials if trial.step < steps]:
        assert group.tick(unfinished) == []


def losses_of(trial: Trial) -> list[float]:
    """The training loss of every step so far."""
    return [line["loss"] for line in trial.lines]
