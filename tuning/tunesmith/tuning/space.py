"""The searched keys: which recipes they make, and whether each of these would be a recipe at all."""

from __future__ import annotations

import difflib
import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from tunesmith.cluster.errors import RecipeError, UsageError
from tunesmith.cluster.recipe.mistakes import all_keys, checked
from tunesmith.cluster.recipe.schema import Recipe
from tunesmith.cluster.recipe.tune import Dimension, Tune

Values = dict[str, Any]
"""One configuration: the value of every searched key that applies."""

REPORTED = ("eval_loss", "loss", "grad_norm", "tokens_per_second")
"""What every trial reports and may be compared by."""

OWN = {
    "train.eval_steps": "tune.reports says how often a trial is evaluated",
    "train.early_stopping": "tune.scheduler says which trials stop early",
    "train.load_best_model_at_end": "a trial is judged by its last report",
}
"""Keys that a sweep decides itself."""

SEARCHED_ELSEWHERE = ("name", "output.", "tune.", "cluster.address", "model.base")
"""Keys that make another sweep, not another trial."""


def check(recipe: Recipe) -> Tune:
    """What the recipe's `tune` section says, once it is sure that all of it can be tried.

    Raises:
        RecipeError: it has none, a searched key does not exist or cannot take one of its values, nobody reports the metric,
            or a key contradicts the sweep; the message names the nearest valid names.
    """
    tune = recipe.tune
    if tune is None:
        raise RecipeError(
            f"the recipe of {recipe.name} has no tune section, so there is nothing to search",
            "Write one (docs/sweep.md), or run tunesmith train.",
        )
    if tune.metric not in REPORTED:
        near = difflib.get_close_matches(tune.metric, REPORTED, 1, 0.4)
        raise RecipeError(
            f"tune.metric: no trial reports {tune.metric!r}; reported are {', '.join(REPORTED)}",
            f"Did you mean {near[0]}?" if near else "",
        )
    valid = all_keys(Recipe)
    for key, dimension in tune.space.items():
        _require_key(key, valid)
        for value in dimension.values:
            _require_value(recipe, key, value)
    written = recipe.model_dump(exclude_unset=True)
    for key, why in OWN.items():
        section, _, name = key.partition(".")
        if name in written.get(section, {}) or key in tune.space:
            raise RecipeError(f"{key} has no effect in a sweep: {why}", "Take it out.")
    return tune


def recipe_of(recipe: Recipe, values: Mapping[str, Any], **train: Any) -> Recipe:
    """The recipe of a trial: the sweep's, without its `tune` section, with these values.

    Args:
        train: further keys of the `train` section.

    Raises:
        RecipeError: the values contradict each other or the rest of the recipe.
    """
    tree = recipe.model_dump(mode="json", exclude_unset=True)
    tree.pop("tune", None)
    for key, value in [*values.items(), *((f"train.{name}", value) for name, value in train.items())]:
        *sections, last = key.split(".")
        node = tree
        for section in sections:
            node = node.setdefault(section, {})
        node[last] = value
    described = ", ".join(f"{key}={value}" for key, value in values.items())
    made = checked(Recipe, tree, {}, f"{recipe.name} with {described}", RecipeError)
    made.forget_reads()
    return made


def draw(space: Mapping[str, Dimension], seed: int, number: int) -> Values:
    """The configuration that random search tries as its `number`-th, whatever was tried before."""
    generator = np.random.default_rng([seed, number])
    values: Values = {}
    for key, dimension in space.items():
        drawn = _draw_one(dimension, generator)  # also where it does not apply: later keys draw the same either way
        if applies(dimension, values):
            values[key] = drawn
    return values


def combinations(space: Mapping[str, Dimension]) -> list[Values]:
    """Every configuration of a space of lists, in the order that its keys are written; the last key changes fastest."""
    found: list[Values] = []
    for choice in itertools.product(*(dimension.values for dimension in space.values())):
        values: Values = {}
        for (key, dimension), value in zip(space.items(), choice, strict=True):
            if applies(dimension, values):
                values[key] = value
        if values not in found:
            found.append(values)
    return found


def applies(dimension: Dimension, values: Mapping[str, Any]) -> bool:
    """Whether a key is searched, given the values of those above it."""
    for other, wanted in (dimension.when or {}).items():
        allowed = wanted if isinstance(wanted, list) else [wanted]
        if other not in values or values[other] not in allowed:
            return False
    return True


def described(space: Mapping[str, Dimension]) -> dict[str, dict[str, Any]]:
    """The space as plain JSON, for reports."""
    found: dict[str, dict[str, Any]] = {}
    for key, dimension in space.items():
        ends = (
            {"values": dimension.values}
            if dimension.is_list
            else dict(zip(("low", "high"), dimension.values, strict=True))
        )
        found[key] = {"kind": dimension.kind, **ends} | ({"when": dimension.when} if dimension.when else {})
    return found


def _draw_one(dimension: Dimension, generator: np.random.Generator) -> Any:
    if dimension.is_list:
        return dimension.values[int(generator.integers(len(dimension.values)))]
    low, high = dimension.values
    if dimension.kind == "randint":
        return int(generator.integers(low, high + 1))
    if dimension.kind == "loguniform":
        return float(np.exp(generator.uniform(np.log(low), np.log(high))))
    return float(generator.uniform(low, high))


def _require_key(key: str, valid: Sequence[str]) -> None:
    if key.startswith(SEARCHED_ELSEWHERE):
        raise RecipeError(f"tune.space.{key}: all trials of a sweep share it", "Run one sweep for each value.")
    if key in valid and not any(other.startswith(f"{key}.") for other in valid):
        return
    leaves = [one for one in valid if not any(other.startswith(f"{one}.") for other in valid)]
    last = key.rpartition(".")[2]
    near = [*dict.fromkeys([*_ending_in(last, leaves), *difflib.get_close_matches(key, leaves, 3, 0.5)])]
    raise RecipeError(
        f"tune.space.{key}: a recipe has no such key",
        f"Did you mean {' or '.join(near[:3])}?" if near else "docs/recipe.md lists all keys.",
    )


def _ending_in(last: str, leaves: Sequence[str]) -> Iterator[str]:
    names = [leaf.rpartition(".")[2] for leaf in leaves]
    close = difflib.get_close_matches(last, names, 3, 0.6)
    for wanted in close:
        yield from (leaf for leaf, name in zip(leaves, names, strict=True) if name == wanted)


def _require_value(recipe: Recipe, key: str, value: Any) -> None:
    """Tries a value alone, so that what is wrong with it is not blamed on another key."""
    try:
        recipe_of(recipe, {key: value})
    except UsageError as refused:
        reason = refused.what.partition("\n")[2].strip().removeprefix("<sweep>: ") or refused.what
        raise RecipeError(f"tune.space.{key}: {value!r} cannot be tried: {reason}", refused.fix) from None
