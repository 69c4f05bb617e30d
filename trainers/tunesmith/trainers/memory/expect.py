"""What a worker of a run should hold at its worst moment, for one micro-batch of a known shape."""

from __future__ import annotations

from typing import Any

from tunesmith.cluster.recipe.schema import Recipe
from tunesmith.trainers import zero
from tunesmith.trainers.memory import blank
from tunesmith.trainers.memory.predict import DTYPES, engine_of
from tunesmith.trainers.memory.shard import shard
from tunesmith.trainers.memory.simulate import Shape, Simulation, extrapolate, simulate_policy
from tunesmith.trainers.memory.tracker import Bytes
from tunesmith.trainers.objectives import OBJECTIVES


def expected_windows(
    recipe: Recipe, config: dict[str, Any], shape: Shape, workers: int, on_gpu: bool
) -> dict[str, Bytes]:
    """Bytes by cause at the worst moment of each part of a step, on one worker.

    Args:
        config: the base model's config.json.
        shape: of every micro-batch.

    Raises:
        ModelError: no such model can be built, or the adaptation does not fit it.
    """
    number_format = zero.precision(recipe, on_gpu)
    engine = engine_of(recipe, workers, on_gpu)
    depth, depths = blank.layers_of(config), blank.sample_depths(config, recipe.adaptation)

    def at(layers: int) -> Simulation:
        build = blank.our_policy(recipe, blank.at_depth(config, layers), DTYPES[number_format], on_gpu)
        return simulate_policy(build, OBJECTIVES[recipe.objective.kind], shape, engine.keeping, engine.passes)

    return shard(at(depth) if depths is None else extrapolate(at(depths[0]), at(depths[1]), depths, depth), engine)


def expected_peak(recipe: Recipe, config: dict[str, Any], shape: Shape, workers: int, on_gpu: bool) -> Bytes:
    """Bytes by cause at the worst moment of a step; as `expected_windows`."""
    windows = expected_windows(recipe, config, shape, workers, on_gpu)
    return max(windows.values(), key=lambda parts: parts.total())
