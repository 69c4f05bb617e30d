"""Searched keys: what is drawn of them, which recipes that makes, and which searches are refused."""

from __future__ import annotations

import math
from typing import Any

import pytest
from sweep_recipes import LEARNING_RATE, sweep_recipe, tune_section

from tunesmith.cluster.errors import RecipeError
from tunesmith.tuning import space
from tunesmith.tuning.space import applies, check, combinations, draw, perturbed, recipe_of

DRAWS = 2000
OF_EVERY_KIND = {
    "adaptation.rank": {"choice": [4, 8, 16]},
    "adaptation.lora_dropout": {"uniform": [0.1, 0.3]},
    "train.learning_rate": {"loguniform": [1e-5, 1e-2]},
    "train.per_device_train_batch_size": {"randint": [1, 4]},
    "train.lr_scheduler_type": {"grid": ["cosine", "linear"]},
}
CONDITIONAL = {
    "adaptation.rank": {"choice": [4, 8, 16]},
    "adaptation.lora_alpha": {"choice": [1, 2], "when": {"adaptation.rank": [8, 16]}},
    "train.weight_decay": {"choice": [0.5], "when": {"adaptation.lora_alpha": 2}},
}


def drawn(of: dict[str, Any], key: str, seed: int = 0) -> list[Any]:
    """What random search draws for a key, where it applies."""
    dimensions = tune_section(of).space
    values = (draw(dimensions, seed, number) for number in range(1, DRAWS + 1))
    return [one[key] for one in values if key in one]


def within(found: float, expected: float, deviation: float, draws: int = DRAWS) -> bool:
    """Whether a mean of so many draws lies within five of its own standard deviations, which chance leaves once in two millions."""
    return abs(found - expected) < 5 * deviation / math.sqrt(draws)


@pytest.mark.parametrize(
    ("key", "values"),
    [
        ("adaptation.rank", [4, 8, 16]),
        ("train.lr_scheduler_type", ["cosine", "linear"]),
        ("train.per_device_train_batch_size", [1, 2, 3, 4]),
    ],
)
def test_each_of_several_values_is_as_likely_as_the_others(key: str, values: list[Any]):
    found = drawn(OF_EVERY_KIND, key)
    assert set(found) == set(values)
    share = 1 / len(values)
    for value in values:
        assert within(found.count(value) / DRAWS, share, math.sqrt(share * (1 - share))), value


def test_a_uniform_range_is_covered_evenly():
    found = drawn(OF_EVERY_KIND, "adaptation.lora_dropout")
    assert all(0.1 <= value <= 0.3 for value in found)
    assert within(sum(found) / DRAWS, 0.2, 0.2 / math.sqrt(12))
    for edge in (0.15, 0.2, 0.25):
        share = (edge - 0.1) / 0.2
        assert within(sum(value < edge for value in found) / DRAWS, share, math.sqrt(share * (1 - share)))


def test_every_order_of_magnitude_of_a_loguniform_range_is_as_likely():
    found = drawn(OF_EVERY_KIND, "train.learning_rate")
    assert all(1e-5 <= value <= 1e-2 for value in found)
    for low in (1e-5, 1e-4, 1e-3):
        share = sum(low <= value < 10 * low for value in found) / DRAWS
        assert within(share, 1 / 3, math.sqrt(2 / 9)), (low, share)


def test_a_draw_depends_on_the_seed_and_the_number_alone():
    dimensions = tune_section(OF_EVERY_KIND).space
    backwards = {number: draw(dimensions, 7, number) for number in range(20, 0, -1)}
    assert backwards == {number: draw(dimensions, 7, number) for number in range(1, 21)}
    assert len({repr(values) for values in backwards.values()}) == 20
    assert all(draw(dimensions, 8, number) != values for number, values in backwards.items())


def test_keys_are_drawn_independently():
    rates = drawn(OF_EVERY_KIND, "train.learning_rate")
    drops = drawn(OF_EVERY_KIND, "adaptation.lora_dropout")
    both = sum(rate > 10**-3.5 and drop > 0.2 for rate, drop in zip(rates, drops, strict=True)) / DRAWS
    assert within(both, 1 / 4, math.sqrt(3 / 16))


def test_a_conditional_key_is_drawn_where_its_condition_holds_and_leaves_later_keys_as_they_were():
    free = {**CONDITIONAL, "adaptation.lora_alpha": {"choice": [1, 2]}, "train.weight_decay": {"choice": [0.5]}}
    conditional, unconditional = (tune_section(of | LEARNING_RATE).space for of in (CONDITIONAL, free))
    seen = set()
    for number in range(1, 60):
        values, all_values = draw(conditional, 0, number), draw(unconditional, 0, number)
        assert values == {key: all_values[key] for key in values}, "a condition must not change what is drawn"
        assert ("adaptation.lora_alpha" in values) == (values["adaptation.rank"] in (8, 16))
        assert ("train.weight_decay" in values) == (values.get("adaptation.lora_alpha") == 2)
        seen.add(tuple(values))
    assert len(seen) == 3


def test_combinations_are_in_the_written_order_with_the_last_key_fastest():
    of = {"adaptation.rank": {"grid": [4, 8]}, "train.epochs": {"choice": [1, 2, 3]}}
    found = [tuple(values.values()) for values in combinations(tune_section(of).space)]
    assert found == [(4, 1), (4, 2), (4, 3), (8, 1), (8, 2), (8, 3)]


def test_combinations_that_a_condition_makes_equal_are_one():
    found = [tuple(values.values()) for values in combinations(tune_section(CONDITIONAL).space)]
    assert found == [(4,), (8, 1), (8, 2, 0.5), (16, 1), (16, 2, 0.5)]


def test_a_condition_of_several_keys_holds_where_all_of_them_do():
    of = {
        "adaptation.rank": {"choice": [4, 8]},
        "train.epochs": {"choice": [1, 2]},
        "train.weight_decay": {"choice": [0.1], "when": {"adaptation.rank": 8, "train.epochs": [2]}},
    }
    dimension = tune_section(of).space["train.weight_decay"]
    assert applies(dimension, {"adaptation.rank": 8, "train.epochs": 2})
    assert not applies(dimension, {"adaptation.rank": 8, "train.epochs": 1})
    assert not applies(dimension, {"train.epochs": 2})


def test_the_recipe_of_a_trial_is_the_sweeps_with_its_values_and_nothing_else():
    recipe = sweep_recipe(sections={"train": {"epochs": 3}})
    made = recipe_of(recipe, {"adaptation.rank": 4, "train.learning_rate": 0.5, "cluster.zero": 2}, seed=9)
    assert made.model_dump(exclude_unset=True) == {
        "name": "bot",
        "model": {"base": "base"},
        "data": {"train": [{"path": "rows.jsonl"}]},
        "objective": {"kind": "sft"},
        "adaptation": {"kind": "lora", "rank": 4},
        "train": {"epochs": 3, "learning_rate": 0.5, "seed": 9},
        "cluster": {"zero": 2},
    }
    assert recipe.adaptation.model_dump(exclude_unset=True) == {"kind": "lora"}, "the sweep's own is untouched"
    assert "adaptation.rank" in made.unread_keys(), "making a recipe does not count as reading it"


def test_values_that_contradict_each_other_are_no_recipe():
    with pytest.raises(RecipeError, match=r"bot with train.epochs=1, train.max_steps=2:\n.*both given"):
        recipe_of(sweep_recipe(), {"train.epochs": 1, "train.max_steps": 2})
    assert "both given" in str(space.why_no_recipe(sweep_recipe(), {"train.epochs": 1, "train.max_steps": 2}))
    assert space.why_no_recipe(sweep_recipe(), {"train.epochs": 1}) is None


def test_a_space_of_every_kind_is_accepted_and_described():
    tune = check(sweep_recipe(OF_EVERY_KIND))
    described = space.described(tune.space)
    assert described["adaptation.rank"] == {"kind": "choice", "values": [4, 8, 16]}
    assert described["train.learning_rate"] == {"kind": "loguniform", "low": 1e-5, "high": 1e-2}
    assert space.described(tune_section(CONDITIONAL).space)["train.weight_decay"]["when"] == {
        "adaptation.lora_alpha": 2
    }


def test_a_value_is_judged_under_the_condition_under_which_it_is_searched():
    of = {
        "adaptation.kind": {"choice": ["full", "lora"]},
        "adaptation.rank": {"choice": [4, 8], "when": {"adaptation.kind": "lora"}},
    }
    check(sweep_recipe(of, adaptation="full"))
    with pytest.raises(RecipeError, match=r"tune\.space\.adaptation\.rank: 4 cannot be tried"):
        check(sweep_recipe({"adaptation.rank": {"choice": [4]}}, adaptation="full"))


def test_any_key_of_a_peft_adapter_is_searched():
    adapter = {"kind": "peft", "config": {"peft_type": "LOHA", "r": 4}}
    recipe = sweep_recipe({"adaptation.config.alpha": {"choice": [1, 2]}}, adaptation=adapter)
    check(recipe)
    made = recipe_of(recipe, {"adaptation.config.alpha": 2}).adaptation.model_dump()
    assert made["config"] == {"peft_type": "LOHA", "r": 4, "alpha": 2}


REFUSED: list[tuple[str, dict[str, Any], list[str]]] = [
    ("misspelt key", {"train.lerning_rate": {"choice": [1]}}, ["no such key", "Did you mean train.learning_rate?"]),
    ("key without its section", {"rank": {"choice": [1]}}, ["no such key", "Did you mean adaptation.rank?"]),
    ("key of another section", {"data.rank": {"choice": [1]}}, ["Did you mean adaptation.rank?"]),
    ("nothing like a key", {"zebra.crossing": {"choice": [1]}}, ["no such key", "docs/recipe.md"]),
    ("section", {"train.early_stopping": {"choice": [1]}}, ["a section of keys", "train.early_stopping.patience"]),
    ("sources", {"data.train.path": {"choice": ["a"]}}, ["a list"]),
    ("whole sources", {"data.train": {"choice": ["a"]}}, ["a list"]),
    ("base", {"model.base": {"choice": ["a", "b"]}}, ["all trials of a sweep share it", "one sweep for each"]),
    ("name", {"name": {"choice": ["a", "b"]}}, ["all trials of a sweep share it"]),
    ("the search itself", {"tune.trials": {"choice": [1]}}, ["all trials of a sweep share it"]),
    ("value of another type", {"train.learning_rate": {"choice": [1, "fast"]}}, ["'fast' cannot be tried", "number"]),
    ("value out of range", {"adaptation.rank": {"randint": [0, 8]}}, ["0 cannot be tried", "greater than 0"]),
    ("upper end out of range", {"train.adam_beta1": {"uniform": [0.5, 1]}}, ["1.0 cannot be tried", "less than 1"]),
    ("misspelt value", {"train.lr_scheduler_type": {"choice": ["lineer"]}}, ["'lineer'", "did you mean linear?"]),
    ("batch of auto", {"train.per_device_train_batch_size": {"choice": ["auto", 1]}}, ["auto", "numbers"]),
    ("evaluations", {"train.eval_steps": {"choice": [1]}}, ["no effect in a sweep", "tune.reports"]),
    ("patience", {"train.early_stopping.patience": {"choice": [1]}}, ["no effect in a sweep", "tune.scheduler"]),
    (
        "contradiction",
        {"train.epochs": {"choice": [1, 2]}, "train.max_steps": {"choice": [5]}},
        ["none of 16 configurations is a recipe", "epochs and max_steps are both given"],
    ),
]


@pytest.mark.parametrize(("of", "says"), [case[1:] for case in REFUSED], ids=[case[0] for case in REFUSED])
def test_what_cannot_be_searched_is_refused_with_its_key_and_the_nearest_names(of: dict[str, Any], says: list[str]):
    with pytest.raises(RecipeError) as refused:
        check(sweep_recipe(of))
    said = str(refused.value)
    assert "tune.space" in said
    for part in says:
        assert part in said, said


def test_a_grid_of_contradictions_is_refused():
    of = {"train.epochs": {"grid": [1, 2]}, "train.max_steps": {"grid": [5]}}
    with pytest.raises(RecipeError, match="none of 2 configurations is a recipe"):
        check(sweep_recipe(of, searcher="grid"))


def test_a_recipe_without_a_search_is_refused():
    recipe = sweep_recipe().model_copy(update={"tune": None})
    with pytest.raises(RecipeError, match="no tune section"):
        check(recipe)


@pytest.mark.parametrize(("metric", "near"), [("evalloss", "eval_loss"), ("grad_nrm", "grad_norm")])
def test_a_metric_that_nobody_reports_is_refused_with_the_nearest(metric: str, near: str):
    with pytest.raises(RecipeError) as refused:
        check(sweep_recipe(metric=metric))
    assert refused.value.fix == f"Did you mean {near}?"
    assert all(name in refused.value.what for name in space.REPORTED)


@pytest.mark.parametrize("metric", space.REPORTED)
def test_a_metric_that_is_reported_is_taken(metric: str):
    assert check(sweep_recipe(metric=metric)).metric == metric


@pytest.mark.parametrize("key", space.OWN)
def test_a_key_that_the_sweep_decides_itself_is_refused(key: str):
    section, _, name = key.partition(".")
    value = {"patience": 2} if name == "early_stopping" else True if name.startswith("load") else 5
    with pytest.raises(RecipeError, match="no effect in a sweep"):
        check(sweep_recipe(sections={section: {name: value}}))


def test_rows_of_auto_are_refused():
    with pytest.raises(RecipeError, match=r"^train\.per_device_train_batch_size: auto"):
        check(sweep_recipe(sections={"train": {"per_device_train_batch_size": "auto"}}))


def test_a_population_needs_a_key_that_may_be_perturbed():
    rank = {"adaptation.rank": {"choice": [4, 8]}}
    conditional = rank | {"train.weight_decay": {"uniform": [0, 1], "when": {"adaptation.rank": 8}}}
    for of in (rank, conditional):
        with pytest.raises(RecipeError) as refused:
            check(sweep_recipe(of, scheduler="pbt"))
        assert "tune.scheduler: pbt" in refused.value.what
        assert "adaptation.rank" in refused.value.what
        assert all(key in refused.value.fix for key in space.PERTURBED)
        check(sweep_recipe(of))
    tune = check(sweep_recipe(conditional | LEARNING_RATE, scheduler="pbt"))
    assert list(perturbed(tune)) == ["train.learning_rate"]
