"""Mistakes in a `tune` section, each with its line, its key and what to do."""

from __future__ import annotations

from pathlib import Path

import pytest

from tunesmith.cluster.errors import RecipeError
from tunesmith.cluster.recipe.load import load_recipe
from tunesmith.cluster.recipe.mistakes import all_keys
from tunesmith.cluster.recipe.schema import Recipe
from tunesmith.cluster.recipe.tune import Dimension, Tune

PLAIN = """\
name: bot
model: {base: base}
data: {train: rows.jsonl}
objective: sft
adaptation: lora
"""
RANK = "    adaptation.rank: {choice: [4, 8]}\n"
RATE = "train.learning_rate"


def load(tmp_path: Path, tune: str) -> Recipe:
    path = tmp_path / "bad.yaml"
    path.write_text(f"{PLAIN}tune:\n{tune}")
    return load_recipe(path)


def searched(dimension: str, key: str = RATE, before: str = "") -> str:
    return f"  space:\n{before}    {key}: {dimension}\n"


# The first line of the section is line 7.
MISTAKES = {
    "no kind": (searched("{when: {a: 1}}"), 8, RATE, "one of choice, uniform, loguniform, randint, grid is needed"),
    "two kinds": (searched("{choice: [1], grid: [1]}"), 8, RATE, "here is choice and grid"),
    "misspelt kind": (searched("{logunifrom: [1, 2]}"), 8, f"{RATE}.logunifrom", "did you mean loguniform?"),
    "plain value": (searched("0.1"), 8, RATE, "its keys are choice, uniform, loguniform, randint, grid, when"),
    "empty choice": (searched("{choice: []}"), 8, f"{RATE}.choice", "an empty list leaves nothing to try"),
    "empty grid": (searched("{grid: []}"), 8, f"{RATE}.grid", "an empty list leaves nothing to try"),
    "ends the wrong way round": (searched("{uniform: [2, 1]}"), 8, f"{RATE}.uniform", "from 2.0 to 1.0 is empty"),
    "no width": (searched("{loguniform: [1, 1]}"), 8, f"{RATE}.loguniform", "from 1.0 to 1.0 is empty"),
    "empty whole range": (searched("{randint: [3, 2]}"), 8, f"{RATE}.randint", "from 3 to 2 is empty"),
    "one end": (searched("{uniform: [1]}"), 8, f"{RATE}.uniform", "a range is [lowest, highest], not [1]"),
    "three ends": (searched("{randint: [1, 2, 3]}"), 8, f"{RATE}.randint", "[lowest, highest], not [1, 2, 3]"),
    "a number for a range": (searched("{uniform: 1}"), 8, f"{RATE}.uniform", "[lowest, highest], not 1"),
    "a logarithm of 0": (searched("{loguniform: [0, 1]}"), 8, f"{RATE}.loguniform.0", "greater than 0, not 0"),
    "text for a number": (searched("{uniform: [low, 1]}"), 8, f"{RATE}.uniform.0", "not 'low'"),
    "half a whole number": (searched("{randint: [1, 2.5]}"), 8, f"{RATE}.randint.1", "not 2.5"),
    "a condition on what is not searched": (
        searched("{choice: [1], when: {train.epochs: 4}}"),
        8,
        RATE,
        "when names train.epochs, which is not searched; searched are train.learning_rate",
    ),
    "a condition on what comes later": (
        searched("{choice: [1], when: {adaptation.rank: 4}}") + RANK,
        8,
        RATE,
        "when names adaptation.rank, which must stand above it",
    ),
    "a condition that never holds": (
        searched("{choice: [1], when: {adaptation.rank: [5, 6]}}", before=RANK),
        9,
        RATE,
        "when adaptation.rank is [5, 6] never holds; adaptation.rank is one of [4, 8]",
    ),
    "a condition on a range": (
        searched("{choice: [1], when: {adaptation.rank: 5}}", before="    adaptation.rank: {randint: [4, 8]}\n"),
        9,
        RATE,
        "adaptation.rank, whose randint range has no values to name; use choice or grid",
    ),
}
OF_THE_SECTION = {
    "no space": ("  trials: 4\n", 6, "tune.space", "missing"),
    "space of nothing": ("  space:\n", 7, "tune.space", "nothing stands under it"),
    "empty space": ("  space: {}\n", 7, "tune.space", "name at least one key to search"),
    "a list for a space": (f"  space: [{RATE}]\n", 7, "tune.space", "a mapping of keys to values"),
    "a key twice": (
        f"  space:\n{RANK}{RANK}",
        9,
        "tune.space.adaptation.rank",
        "is written twice, first on line 8",
    ),
    "misspelt key": (f"  sercher: random\n  space:\n{RANK}", 7, "tune.sercher", "did you mean searcher?"),
    "misspelt searcher": (f"  searcher: optunna\n  space:\n{RANK}", 7, "tune.searcher", "did you mean optuna?"),
    "misspelt scheduler": (f"  scheduler: ahsa\n  space:\n{RANK}", 7, "tune.scheduler", "did you mean asha?"),
    "truth for a number": (f"  trials: yes\n  space:\n{RANK}", 7, "tune.trials", "true is not a number"),
    "no trials": (f"  trials: 0\n  space:\n{RANK}", 7, "tune.trials", "greater than 0"),
    "a seed below 0": (f"  seed: -1\n  space:\n{RANK}", 7, "tune.seed", "greater than or equal to 0"),
    "a reduction to all": (f"  reduction: 1\n  space:\n{RANK}", 7, "tune.reduction", "greater than or equal to 2"),
    "a grid of a range": (
        "  searcher: grid\n" + searched("{uniform: [1, 2]}"),
        7,
        "tune.searcher",
        "train.learning_rate has a uniform range; name its values with grid",
    ),
    "so many trials of a grid": (
        f"  searcher: grid\n  trials: 3\n  space:\n{RANK}",
        8,
        "tune.trials",
        "tries every combination; take trials out",
    ),
    "seeds of no retraining": (
        f"  final_seeds: 3\n  space:\n{RANK}",
        7,
        "tune.final_seeds",
        "only final: retrain trains the winner anew",
    ),
}


def refused(tmp_path: Path, tune: str) -> str:
    with pytest.raises(RecipeError) as mistake:
        load(tmp_path, tune)
    return mistake.value.what


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_in_a_searched_key_is_named_with_its_line(name: str, tmp_path: Path):
    tune, line, key, says = MISTAKES[name]
    said = refused(tmp_path, tune)
    assert f"{tmp_path / 'bad.yaml'}:{line}: tune.space.{key}: " in said
    assert says in said


@pytest.mark.parametrize("name", OF_THE_SECTION)
def test_a_mistake_in_the_section_is_named_with_its_line(name: str, tmp_path: Path):
    tune, line, key, says = OF_THE_SECTION[name]
    said = refused(tmp_path, tune)
    assert f"{tmp_path / 'bad.yaml'}:{line}: {key}" in said
    assert says in said


def test_every_mistake_is_named_at_once(tmp_path: Path):
    said = refused(tmp_path, f"  trials: 0\n  space:\n    {RATE}: {{uniform: [2, 1]}}\n    adaptation.rank: 4\n")
    assert said.startswith("3 mistakes in ")
    assert [line.strip().split(": ")[1] for line in said.splitlines()[1:]] == [
        f"tune.space.{RATE}.uniform",
        "tune.space.adaptation.rank",
        "tune.trials",
    ]


def test_a_recipe_knows_where_its_keys_were_written(tmp_path: Path):
    recipe = load(tmp_path, searched("{choice: [1]}"))
    path = tmp_path / "bad.yaml"
    assert recipe.where(f"tune.space.{RATE}") == f"{path}:8: "
    assert recipe.where("tune") == f"{path}:6: "
    assert recipe.where("train.epochs") == ""
    assert load_recipe(path, ["tune.trials=5"]).where("tune.trials") == "--set tune.trials=5: "
    assert Recipe.model_validate(recipe.model_dump()).where("tune") == ""


@pytest.mark.parametrize(
    ("override", "values"),
    [
        (f"tune.space.{RATE}={{choice: [1, 2]}}", [1, 2]),
        (f"tune.space.{RATE}.uniform=[3, 4]", [3.0, 4.0]),
    ],
)
def test_a_searched_key_is_overridden_on_the_command_line(override: str, values: list, tmp_path: Path):
    load(tmp_path, searched("{uniform: [1, 2]}"))
    recipe = load_recipe(tmp_path / "bad.yaml", [override])
    assert recipe.tune is not None
    assert recipe.tune.space[RATE].values == values


def test_a_mistake_in_an_overridden_searched_key_is_named_as_such(tmp_path: Path):
    load(tmp_path, searched("{uniform: [1, 2]}"))
    with pytest.raises(RecipeError) as mistake:
        load_recipe(tmp_path / "bad.yaml", [f"tune.space.{RATE}.uniform=[2, 1]"])
    said = mistake.value.what
    assert f"--set tune.space.{RATE}.uniform=[2, 1]: tune.space.{RATE}.uniform: the range from 2.0" in said


def test_numbers_without_a_dot_are_numbers(tmp_path: Path):
    tune = load(tmp_path, searched("{choice: [1e-4, 2E+3, auto, 1.5]}") + "  metric: loss\n").tune
    assert tune is not None
    assert tune.space[RATE].values == [1e-4, 2e3, "auto", 1.5]
    conditional = {"choice": [1], "when": {RATE: ["1e-4", "x"]}}
    assert Dimension.model_validate(conditional).when == {RATE: [1e-4, "x"]}


@pytest.mark.parametrize(
    ("written", "kind", "values", "is_list"),
    [
        ({"choice": ["a", 1, None]}, "choice", ["a", 1, None], True),
        ({"grid": [[1], [2]]}, "grid", [[1], [2]], True),
        ({"uniform": [0, 1]}, "uniform", [0.0, 1.0], False),
        ({"loguniform": ["1e-5", 1]}, "loguniform", [1e-5, 1.0], False),
        ({"randint": [3, 3]}, "randint", [3, 3], False),
    ],
)
def test_a_dimension_has_one_kind_and_its_values(written: dict, kind: str, values: list, is_list: bool):
    dimension = Dimension.model_validate(written)
    assert (dimension.kind, dimension.values, dimension.is_list) == (kind, values, is_list)


def test_a_section_survives_being_written_and_read(tmp_path: Path):
    recipe = load(tmp_path, searched("{choice: [1, 2], when: {adaptation.rank: 8}}", before=RANK))
    assert recipe.tune is not None
    assert Tune.model_validate(recipe.model_dump(mode="json", exclude_unset=True)["tune"]) == recipe.tune


def test_what_may_be_searched_is_not_taken_for_keys_of_the_search():
    keys = all_keys(Recipe)
    assert "tune.space" in keys
    assert "tune.trials" in keys
    assert not any(key.startswith("tune.space.") for key in keys)


def test_trials_do_not_save_in_the_background(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"train\.async_save: true is for `tunesmith train`"):
        load(tmp_path, searched("{choice: [1.0e-4, 2.0e-4]}") + "train: {async_save: true}\n")
