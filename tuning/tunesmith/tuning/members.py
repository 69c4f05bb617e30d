"""Who trains a trial, as the trial sees them: the same for shared workers and for workers of its own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from tunesmith.cluster.recipe.schema import Recipe


@dataclass(frozen=True)
class Progress:
    """What a member of a trial has done up to its next report."""

    step: int
    total_steps: int
    tokens: int
    figures: dict[str, float]


class Members(Protocol):
    """Those who train a trial, one for each of its seeds."""

    def open(self, recipes: list[Recipe], runs: list[Path], step: int, sources: list[Path] | None) -> None:
        """Brings the trial to where it is trained.

        Args:
            recipes: one for each seed.
            runs: a folder for each.
            step: it goes on from the state of this step; 0 begins.
            sources: runs of another trial, whose states of this step it takes.
        """
        ...

    def next(self) -> list[Progress]:
        """Trains to the next report."""
        ...

    def close(self) -> None:
        """Takes the trial away."""
        ...


class Training(Protocol):
    """How trials are trained; plain data that makes the members in the trial's own process."""

    def members(self, key: str) -> Members:
        """Those of the trial of this name."""
        ...


def as_long_as(steps: int | None, recipe: Recipe) -> Recipe:
    """The recipe with so many steps; None leaves it as it is. An epoch of another seed may have one pack more or less, and
    all seeds of a configuration report together."""
    if steps is None or recipe.train.max_steps == steps:
        return recipe
    tree = recipe.model_dump(mode="json", exclude_unset=True)
    tree.setdefault("train", {}).pop("epochs", None)
    tree["train"]["max_steps"] = steps
    return Recipe.model_validate(tree)


def figures_of(lines: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """What is reported of these steps: their mean loss, the newest norm of the gradients, the rate, the newest evaluation."""
    newest = {
        name: line[name] for line in lines for name in ("grad_norm", "eval_loss") if line.get(name) is not None
    }  # fp16 has steps without a norm
    return {
        "loss": sum(line["loss"] for line in lines) / len(lines),
        "tokens_per_second": sum(line["tokens"] for line in lines) / sum(line["step_seconds"] for line in lines),
        **newest,
    }
