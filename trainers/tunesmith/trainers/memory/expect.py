"""What a worker of a run should hold at its worst moment, for one micro-batch of a known shape."""

from __future__ import annotations

from typing import Any

import torch

from tunesmith.cluster.recipe.schema import Peft, Recipe
from tunesmith.trainers import zero
from tunesmith.trainers.memory import blank
from tunesmith.trainers.memory.shard import Engine, shard
from tunesmith.trainers.memory.simulate import Shape, Simulation, extrapolate, simulate_policy
from tunesmith.trainers.memory.tracker import Bytes
from tunesmith.trainers.objectives import OBJECTIVES

_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


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
    adapter = recipe.adaptation.config if isinstance(recipe.adaptation, Peft) else None
    depth, depths = blank.layers_of(config), blank.sample_depths(config, adapter)

    def at(layers: int) -> Simulation:
        build = blank.our_policy(recipe, blank.at_depth(config, layers), _DTYPES[number_format], on_gpu)
        return simulate_policy(build, OBJECTIVES[recipe.objective.kind], shape, engine.keeping, engine.passes)

    return shard(at(depth) if depths is None else extrapolate(at(depths[0]), at(depths[1]), depths, depth), engine)


def expected_peak(recipe: Recipe, config: dict[str, Any], shape: Shape, workers: int, on_gpu: bool) -> Bytes:
    """Bytes by cause at the worst moment of a step; as `expected_windows`."""
    windows = expected_windows(recipe, config, shape, workers, on_gpu)
    return max(windows.values(), key=lambda parts: parts.total())


def engine_of(recipe: Recipe, workers: int, on_gpu: bool) -> Engine:
    """How the recipe's engine holds weights, gradients and optimizer state."""
    number_format, cluster = zero.precision(recipe, on_gpu), recipe.cluster
    return Engine(
        stage=zero.engine_stage(cluster, number_format),
        workers=workers,
        item=4 if number_format == "fp32" else 2,
        optimizer=recipe.train.optimizer,
        # offloaded to host memory, which on a CPU is the device's own
        offload=cluster.offload if on_gpu else "none",
        persistence_threshold=cluster.zero3_persistence_threshold,
        overlaps=on_gpu,
        accumulation=recipe.train.gradient_accumulation_steps,
    )
