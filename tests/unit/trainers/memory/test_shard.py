"""ZeRO's arithmetic against the closed forms: bytes a parameter, over the workers that share it."""

from __future__ import annotations

import pytest

from tunesmith.cluster.recipe.schema import Recipe
from tunesmith.trainers.memory.catalog import find
from tunesmith.trainers.memory.expect import expected_windows
from tunesmith.trainers.memory.shard import ADAPTER, Engine, shard
from tunesmith.trainers.memory.simulate import GRADIENTS, OPTIMIZER, WEIGHTS, ParameterKind, Shape, Simulation
from tunesmith.trainers.memory.tracker import Bytes

ELEMENTS = 1_000_000


def _recipe(**sections: object) -> Recipe:
    whole = {
        "name": "planned",
        "model": {"base": "somewhere"},
        "data": {"train": "rows.jsonl"},
        "objective": "sft",
        "adaptation": "full",
        "train": {"precision": "bf16", "gradient_checkpointing": True},
        **sections,
    }
    return Recipe.model_validate(whole)


@pytest.mark.parametrize("workers", [8, 16, 32])
def test_70b_under_zero_3_is_the_closed_form(workers: int) -> None:
    """16 bytes a parameter: 16-bit weights and gradients, and an fp32 copy with two moments."""
    entry = find("meta-llama/Llama-3.1-70B")
    assert entry is not None
    recipe = _recipe(cluster={"workers": workers, "zero": 3})
    windows = expected_windows(recipe, dict(entry.config), Shape.full(1, 4096), workers, on_gpu=True)
    worst = max(windows.values(), key=Bytes.total)
    by_cause = {cause: worst[cause] * workers / entry.parameters for cause in (WEIGHTS, GRADIENTS, OPTIMIZER)}
    assert by_cause == pytest.approx({WEIGHTS: 2, GRADIENTS: 2, OPTIMIZER: 12}, rel=0.01)


@pytest.mark.parametrize(
    ("stage", "accumulation", "expected"),
    [
        (1, 1, {WEIGHTS: 2, GRADIENTS: 4, OPTIMIZER: 12 / 4}),  # fp32 sums of the whole model
        (2, 1, {WEIGHTS: 2, OPTIMIZER: 12 / 4}),
        (2, 2, {WEIGHTS: 2, GRADIENTS: 4 / 4, OPTIMIZER: 12 / 4}),
        (3, 1, {WEIGHTS: 2 / 4, GRADIENTS: 2 / 4, OPTIMIZER: 12 / 4}),  # nothing to sum
        (3, 2, {WEIGHTS: 2 / 4, GRADIENTS: 4 / 4, OPTIMIZER: 12 / 4}),
    ],
)
def test_what_rests_between_steps_in_bf16(stage: int, accumulation: int, expected: dict[str, float]) -> None:
    engine = Engine(stage=stage, workers=4, item=2, overlaps=False, accumulation=accumulation)
    parts = shard(_simulation(), engine)["forward"]
    assert {cause: parts[cause] / ELEMENTS for cause in expected} == pytest.approx(expected)


def test_without_zero_fp32_keeps_two_moments_and_no_copy() -> None:
    parts = shard(_simulation(item=4), Engine(stage=0, workers=1, item=4))["forward"]
    assert parts == {WEIGHTS: 4 * ELEMENTS, OPTIMIZER: 8 * ELEMENTS}


def test_small_weights_stay_whole_under_zero_3() -> None:
    engine = Engine(stage=3, workers=4, item=2, overlaps=False, persistence_threshold=2 * ELEMENTS)
    assert shard(_simulation(), engine)["forward"][WEIGHTS] == 2 * ELEMENTS


def test_offloaded_state_takes_nothing_of_the_device() -> None:
    held = shard(_simulation(), Engine(stage=3, workers=4, item=2, offload="cpu", overlaps=False))["forward"]
    assert held[OPTIMIZER] == held[GRADIENTS] == held[WEIGHTS] == 0


def test_only_an_adapter_has_gradients_and_state() -> None:
    frozen = _kind(item=2, trainable=False)
    added = _kind(elements=1000, item=2, trainable=True, added=True)
    simulation = Simulation({"forward": Bytes()}, {frozen: 1, added: 1})
    parts = shard(simulation, Engine(stage=2, workers=4, item=2, overlaps=False))["forward"]
    assert parts == {WEIGHTS: 2 * ELEMENTS, ADAPTER: 2000, OPTIMIZER: 3000}


def _simulation(item: int = 2) -> Simulation:
    return Simulation({"forward": Bytes()}, {_kind(item=item, trainable=True): 1})


def _kind(elements: int = ELEMENTS, *, item: int, trainable: bool, added: bool = False) -> ParameterKind:
    return ParameterKind(elements, elements, item, trainable, added, is_matrix=True, role="body")
