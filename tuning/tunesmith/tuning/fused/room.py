"""What a base's device has room for: the lanes of a row, the largest rank, the frozen activations that are kept."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from tunesmith.cluster.base import BaseRef
from tunesmith.cluster.errors import ModelError, ResourceError
from tunesmith.cluster.recipe.schema import Recipe
from tunesmith.cluster.resources import Need, Node
from tunesmith.trainers.adaptations import lora
from tunesmith.trainers.memory.choose import changed
from tunesmith.tuning.feasible import predicted, shortage, side_by_side
from tunesmith.tuning.fused.lanes import bucket_of


@dataclass(frozen=True)
class Asked:
    """What the trials would have.

    Attributes:
        targets: `target_modules` of all of them together.
        ranks: every rank that one may have; the two ends, where it is a range.
        length: tokens of a lane.
        lanes: most lanes that are wanted.
        seeds: lanes that one trial takes.
    """

    targets: str | list[str]
    ranks: Sequence[int]
    length: int
    lanes: int
    seeds: int


@dataclass(frozen=True)
class Room:
    """What they get.

    Attributes:
        recipe: the sweep's, with `gradient_checkpointing` settled.
        lanes: of a row.
        largest: rank that fits.
        too_large: why ranks above it do not; empty when all fit.
        spare: bytes that nothing needs; None where nobody can tell.
    """

    recipe: Recipe
    lanes: int
    largest: int
    too_large: str
    spare: int | None


def find_room(recipe: Recipe, base: BaseRef, nodes: Sequence[Node], need: Need, asked: Asked) -> Room:
    """The largest rank with as many lanes as fit beside it, by the planner; activations are dropped only where they must.

    Raises:
        ResourceError: not even the smallest trial fits, with the numbers.
    """
    if recipe.train.gradient_checkpointing != "auto":
        return _room(recipe, base, nodes, need, asked)
    try:
        return _room(changed(recipe, {"train.gradient_checkpointing": False}), base, nodes, need, asked)
    except ResourceError:
        return _room(changed(recipe, {"train.gradient_checkpointing": True}), base, nodes, need, asked)


def _room(recipe: Recipe, base: BaseRef, nodes: Sequence[Node], need: Need, asked: Asked) -> Room:
    too_large = ""
    for rank in sorted(asked.ranks, reverse=True):
        lanes = asked.lanes
        while True:
            stand_in = side_by_side(recipe, lanes, bucket_of(rank), asked.targets)
            prediction = predicted(stand_in, base, nodes, need, asked.length)
            reason = None if prediction is None else shortage(prediction)
            if reason is None:
                spare = None if prediction is None else prediction.capacity - prediction.total
                return Room(recipe, lanes, rank, too_large, spare)
            if lanes == asked.seeds:
                break
            lanes = max(asked.seeds, lanes // 2)
        too_large = f"rank {rank}: {reason}"
    raise ResourceError(f"no trial fits: {too_large}", "Search smaller ranks, or lower data.max_length.")


def together(model: nn.Module, specs: Sequence[str | list[str]]) -> str | list[str]:
    """One `target_modules` that picks what all of these pick; endings where it can, since those hold in every layer."""
    if len(specs) == 1:
        return specs[0]
    given = [lora.peft_targets(model, spec) for spec in specs]
    if any(isinstance(one, str) for one in given):
        return adapted_layers(model, specs)
    return sorted({ending for one in given for ending in one})


def adapted_layers(model: nn.Module, specs: Sequence[str | list[str]]) -> list[str]:
    """Every layer that any trial may adapt.

    Raises:
        ModelError: one matches nothing, or a layer that is not linear.
    """
    names = sorted({name for spec in specs for name in lora.matches(model, spec)})
    head: Any = model.get_output_embeddings()  # type: ignore[operator]
    for name in names:
        layer = model.get_submodule(name)
        if not isinstance(layer, nn.Linear) or layer is head:
            raise ModelError(
                f"{name} is adapted, a {'head' if layer is head else type(layer).__name__}, and only inner linear layers are "
                "trained side by side",
                "Set tune.execution: isolated.",
            )
    return names
