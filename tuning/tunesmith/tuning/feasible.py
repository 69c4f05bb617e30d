"""Whether a configuration can fit, by the planner's own answer, before anything of it is launched."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tunesmith.cluster.base import BaseRef
from tunesmith.cluster.errors import FleetError, ModelError, PlanError, ResourceError
from tunesmith.cluster.recipe.schema import Recipe
from tunesmith.cluster.resources import Need, Node
from tunesmith.tuning.eligible import PER_TRIAL

if TYPE_CHECKING:
    from tunesmith.trainers.memory.predict import Prediction

WEIGHTY = (
    "adaptation.rank",
    "adaptation.lora_dropout",
    "adaptation.target_modules",
    "train.per_device_train_batch_size",
)
HARMLESS = tuple(key for key in PER_TRIAL if key not in WEIGHTY)
"""Searched keys that change no byte of what a trial holds."""


class Feasibility:
    """Answers for configurations; those that differ only in harmless keys are simulated once.

    Args:
        base, nodes, need: what a trial is given.
        max_length: tokens of a full row.
        recipe_of: makes a trial's recipe.
    """

    def __init__(
        self,
        base: BaseRef,
        nodes: Sequence[Node],
        need: Need,
        max_length: int,
        recipe_of: Callable[[Mapping[str, Any]], Recipe],
    ) -> None:
        self._base, self._nodes, self._need, self._max_length = base, nodes, need, max_length
        self._recipe_of = recipe_of
        self._answers: dict[str, str | None] = {}

    def why_not(self, values: Mapping[str, Any]) -> str | None:
        """Why this configuration cannot fit, with the numbers; None when it can, or when nobody can tell."""
        telling = {key: value for key, value in values.items() if key not in HARMLESS}
        known = repr(sorted(telling.items()))
        if known not in self._answers:
            self._answers[known] = why_not(
                self._recipe_of(values), self._base, self._nodes, self._need, self._max_length
            )
        return self._answers[known]


def why_not(recipe: Recipe, base: BaseRef, nodes: Sequence[Node], need: Need, max_length: int) -> str | None:
    """Why this recipe cannot fit, with the numbers; None when it can, or when it cannot be simulated."""
    try:
        prediction = predicted(recipe, base, nodes, need, max_length)
    except (ModelError, ResourceError) as refused:
        return refused.what
    return None if prediction is None else shortage(prediction)


def predicted(recipe: Recipe, base: BaseRef, nodes: Sequence[Node], need: Need, max_length: int) -> Prediction | None:
    """What a worker would hold; None when it cannot be simulated.

    Raises:
        ModelError, ResourceError: there is no such model, or no machine for it.
    """
    from tunesmith.trainers.admission import fleet_of
    from tunesmith.trainers.memory.choose import choose
    from tunesmith.trainers.memory.geometry import of_folder
    from tunesmith.trainers.memory.plan import simulated
    from tunesmith.trainers.memory.predict import Planner
    from tunesmith.trainers.models import quiet_libraries

    try:
        fleet = fleet_of(nodes, need)
        model = of_folder(Path(base.path), base.reference)
        with quiet_libraries(), simulated(model):
            return choose(Planner(model, fleet, max_length=max_length), recipe).prediction
    except (FleetError, PlanError):
        return None


def shortage(prediction: Prediction) -> str | None:
    """What a worker would need and has, when it has too little."""
    from tunesmith.trainers.memory.plan import gib

    if prediction.fits:
        return None
    largest = ", ".join(f"{cause} {gib(size):.2f}" for cause, size in prediction.parts.most_common(3))
    return f"it needs {gib(prediction.total):.2f} GiB of {gib(prediction.capacity):.2f} ({largest} GiB)"


def side_by_side(recipe: Recipe, lanes: int, rank: int, targets: str | list[str]) -> Recipe:
    """A recipe of one run that holds what so many lanes hold: their rows, and all their adapters as one.

    Args:
        targets: `target_modules` of all of them together.
    """
    from tunesmith.trainers.memory.choose import changed

    return changed(
        recipe,
        {
            "adaptation.rank": lanes * rank,
            "adaptation.target_modules": targets,
            "train.per_device_train_batch_size": lanes,
            "train.gradient_accumulation_steps": 1,
            "cluster.workers": 1,
            "cluster.zero": 0,
        },
    )
