"""A few layers say what all layers take: the straight line through two depths is the full-depth simulation."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny_models import config

from tunesmith.cluster.recipe.schema import Recipe
from tunesmith.trainers.memory import blank
from tunesmith.trainers.memory.simulate import Keeping, Shape, Simulation, extrapolate, simulate_policy
from tunesmith.trainers.objectives import OBJECTIVES

LAYERS = 12
SHAPE = Shape((40, 17, 7), 50)


def _simulate(recipe: Recipe, model: dict[str, Any], depth: int, keeping: Keeping, passes: int) -> Simulation:
    build = blank.our_policy(recipe, blank.at_depth(model, depth), torch.bfloat16, on_gpu=False)
    return simulate_policy(build, OBJECTIVES["sft"], SHAPE, keeping, passes)


def _recipe(adaptation: Any, checkpointing: bool = False) -> Recipe:
    return Recipe.model_validate(
        {
            "name": "planned",
            "model": {"base": "somewhere"},
            "data": {"train": "rows.jsonl"},
            "objective": "sft",
            "adaptation": adaptation,
            "train": {"gradient_checkpointing": checkpointing},
        }
    )


@pytest.mark.parametrize(
    ("kind", "adaptation", "checkpointing"),
    [
        ("llama", "full", False),
        ("llama", "full", True),
        ("tied", "full", False),
        ("qwen3_moe", "full", False),
        ("llama", "lora", False),
        ("qwen3_moe", "lora", True),
    ],
)
@pytest.mark.parametrize(("keeping", "passes"), [("kept", 2), ("freed", 1)])
def test_the_line_through_two_depths_is_the_full_depth(
    kind: str, adaptation: str, checkpointing: bool, keeping: Keeping, passes: int
) -> None:
    recipe, model = _recipe(adaptation, checkpointing), config(kind, num_hidden_layers=LAYERS).to_dict()
    depths = blank.sample_depths(model, recipe.adaptation)
    assert depths is not None
    shallow, deep = (_simulate(recipe, model, depth, keeping, passes) for depth in depths)
    full = _simulate(recipe, model, LAYERS, keeping, passes)
    line = extrapolate(shallow, deep, depths, LAYERS)
    assert {name: _nonzero(parts) for name, parts in line.windows.items()} == {
        name: _nonzero(parts) for name, parts in full.windows.items()
    }
    assert line.parameters == full.parameters
    assert line.fixed_bytes == full.fixed_bytes


def test_layers_that_a_pattern_picks_are_all_simulated() -> None:
    recipe = _recipe("lora")
    model = config("llama", num_hidden_layers=LAYERS).to_dict()
    assert blank.sample_depths(model, recipe.adaptation) is not None
    top = {"kind": "lora", "target_modules": rf"model\.layers\.{LAYERS - 1}\..*_proj"}
    picked = Recipe.model_validate({**recipe.model_dump(mode="json", exclude_unset=True), "adaptation": top})
    assert blank.sample_depths(model, picked.adaptation) is None


def test_kinds_count_every_parameter_once() -> None:
    """A tied head is its embedding."""
    from transformers import AutoModelForCausalLM

    for kind in ("llama", "tied", "qwen3_moe"):
        found = _simulate(_recipe("full"), config(kind).to_dict(), 2, "kept", 1)
        with torch.device("meta"):
            wanted = sum(p.numel() for p in AutoModelForCausalLM.from_config(config(kind)).parameters())
        assert found.trainable == found.elements() == wanted, kind


def test_a_gradient_that_is_freed_at_once_is_not_held() -> None:
    model = config("llama").to_dict()
    kept, freed = (_simulate(_recipe("full"), model, 2, keeping, 1) for keeping in ("kept", "freed"))
    last = "backward first layer"
    assert kept.windows[last]["gradients"] > 0
    assert freed.windows[last]["gradients"] == 0
    assert freed.windows[last].total() < kept.windows[last].total()


def test_a_base_can_be_simulated_in_four_bits_after_a_real_one_was_quantised() -> None:
    from bitsandbytes import functional

    functional.quantize_4bit(torch.ones(64, 64), compress_statistics=True, quant_type="nf4")  # it keeps its tables
    recipe = _recipe("lora")
    written = recipe.model_dump(mode="json", exclude_unset=True)
    four_bits = Recipe.model_validate(written | {"model": written["model"] | {"quantization": "nf4"}})
    model = config("llama").to_dict()
    packed = _simulate(four_bits, model, 2, "kept", 2).fixed_bytes
    assert packed > _simulate(recipe, model, 2, "kept", 2).fixed_bytes, (
        "packed weights are no numbers that a stage shards"
    )


def _nonzero(parts: dict[str, int]) -> dict[str, int]:
    return {cause: size for cause, size in parts.items() if size}
