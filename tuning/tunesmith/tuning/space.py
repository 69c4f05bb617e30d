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

DEFAULT_TRIALS = 20

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

SHARED = (
    "name",
    "model.base",
    "cluster.address",
    "cluster.workers",
    "cluster.gpus_per_worker",
    "cluster.cpus_per_worker",
    "output.dir",
    "output.report_to",
)
"""Keys that make another sweep, not another trial."""

PERTURBED = (
    "train.learning_rate",
    "train.weight_decay",
    "train.adam_beta1",
    "train.adam_beta2",
    "train.adam_epsilon",
    "train.max_grad_norm",
    "adaptation.lora_dropout",
)
"""Keys that may change while a trial goes on: none of them changes a shape, the order of the data or what the weights mean."""

LOOKED_AT = 16
"""Configurations of a space that are looked at before it is searched."""

FREE_FORM = "adaptation.config."
"""Below it any key may stand: they are PEFT's."""


def check(recipe: Recipe) -> Tune:
    """What the recipe's `tune` section says, once it is sure that all of it can be tried.

    Raises:
        RecipeError: it has none, a searched key does not exist or cannot take one of its values, nobody reports the metric,
            or a key contradicts the sweep; the message names the line, if there is one, and the nearest valid names.
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
            f"{recipe.where('tune.metric')}tune.metric: no trial reports {tune.metric!r}; "
            f"reported are {', '.join(REPORTED)}",
            f"Did you mean {near[0]}?" if near else "",
        )
    for key in tune.space:
        _require_key(recipe, key)
    _refuse_own_keys(recipe, tune)
    for key, dimension in tune.space.items():
        for value in dimension.values:
            _require_value(recipe, key, value)
    _require_numbers_of_rows(recipe, tune)
    _require_something_to_perturb(recipe, tune)
    _require_a_configuration(recipe, tune)
    return tune


def perturbed(tune: Tune) -> dict[str, Dimension]:
    """What `pbt` changes while a trial goes on. Keys that only some trials have are not among it."""
    return {key: one for key, one in tune.space.items() if key in PERTURBED and one.when is None}


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
    made = checked(Recipe, tree, {}, _title(recipe, values), RecipeError)
    made.forget_reads()
    return made


def why_no_recipe(recipe: Recipe, values: Mapping[str, Any]) -> str | None:
    """How these values contradict each other or the rest of the recipe; None when they make a recipe."""
    try:
        recipe_of(recipe, values)
    except UsageError as refused:
        mistakes = refused.what.splitlines()[1:]
        return "; ".join(line.strip().removeprefix(f"{_title(recipe, values)}: ") for line in mistakes)
    return None


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


def trials_of(tune: Tune) -> int:
    """How many configurations are tried if no other budget ends the sweep before."""
    if tune.searcher == "grid":
        return len(combinations(tune.space))
    return tune.trials or DEFAULT_TRIALS


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
        found[key] = {"kind": dimension.kind}
        if dimension.is_list:
            found[key]["values"] = dimension.values
        else:
            found[key]["low"], found[key]["high"] = dimension.values
        if dimension.when:
            found[key]["when"] = dimension.when
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


def _title(recipe: Recipe, values: Mapping[str, Any]) -> str:
    return f"{recipe.name} with {', '.join(f'{key}={value}' for key, value in values.items())}"


def _require_key(recipe: Recipe, key: str) -> None:
    """Refuses what is no key, no plain value, or the same for all trials."""
    place, valid = f"{recipe.where(f'tune.space.{key}')}tune.space.{key}", all_keys(Recipe)
    if key in SHARED or key.partition(".")[0] == "tune":
        raise RecipeError(f"{place}: all trials of a sweep share it", "Run one sweep for each value.")
    if key.startswith(FREE_FORM):
        return
    inside = [other for other in valid if other.startswith(f"{key}.")]
    if key.startswith(("data.train", "data.validation")):
        raise RecipeError(f"{place}: sources are a list, which is not searched", "Run one sweep for each mixture.")
    if inside:
        raise RecipeError(f"{place}: a section of keys", f"Search keys of it: {', '.join(dict.fromkeys(inside))}.")
    if key not in valid:
        leaves = [one for one in valid if not any(other.startswith(f"{one}.") for other in valid)]
        leaves = [one for one in leaves if not one.startswith("tune.")]
        last = key.rpartition(".")[2]
        near = [*dict.fromkeys(_ending_in(last, leaves))] or difflib.get_close_matches(key, leaves, 3, 0.5)
        raise RecipeError(
            f"{place}: a recipe has no such key",
            f"Did you mean {' or '.join(near[:3])}?" if near else "docs/recipe.md lists all keys.",
        )


def _ending_in(last: str, leaves: Sequence[str]) -> Iterator[str]:
    names = [leaf.rpartition(".")[2] for leaf in leaves]
    close = difflib.get_close_matches(last, names, 3, 0.6)
    for wanted in close:
        yield from (leaf for leaf, name in zip(leaves, names, strict=True) if name == wanted)


def _refuse_own_keys(recipe: Recipe, tune: Tune) -> None:
    written = recipe.model_dump(exclude_unset=True)
    for own, why in OWN.items():
        section, _, name = own.partition(".")
        searched = next((key for key in tune.space if key == own or key.startswith(f"{own}.")), None)
        if searched is None and name not in written.get(section, {}):
            continue
        place = own if searched is None else f"tune.space.{searched}"
        raise RecipeError(f"{recipe.where(place)}{place}: has no effect in a sweep: {why}", "Take it out.")


def _require_value(recipe: Recipe, key: str, value: Any) -> None:
    """Tries a value with no more than the values under which it is searched, so that it is not blamed for another key's."""
    assert recipe.tune is not None
    reason = why_no_recipe(recipe, {**_condition(recipe.tune.space, key), key: value})
    if reason is not None:
        raise RecipeError(
            f"{recipe.where(f'tune.space.{key}')}tune.space.{key}: {value!r} cannot be tried: "
            f"{reason.removeprefix(f'{key}: ')}"
        )


def _condition(space: Mapping[str, Dimension], key: str) -> Values:
    """One configuration of the keys above this one under which it is searched."""
    values: Values = {}
    for other, wanted in (space[key].when or {}).items():
        allowed = wanted if isinstance(wanted, list) else [wanted]
        values |= _condition(space, other)
        values[other] = next(value for value in space[other].values if value in allowed)
    return values


def _require_numbers_of_rows(recipe: Recipe, tune: Tune) -> None:
    key = "train.per_device_train_batch_size"
    searched = tune.space.get(key)
    settled = searched.values if searched else [recipe.train.per_device_train_batch_size]
    if "auto" in settled:
        place = f"tune.space.{key}" if searched else key
        raise RecipeError(
            f"{recipe.where(place)}{place}: auto makes batches of trials incomparable", "Write numbers in a sweep."
        )


def _require_something_to_perturb(recipe: Recipe, tune: Tune) -> None:
    if tune.scheduler == "pbt" and not perturbed(tune):
        raise RecipeError(
            f"{recipe.where('tune.scheduler')}tune.scheduler: pbt changes keys of a trial that goes on, and none of "
            f"{', '.join(tune.space)} may change then",
            f"Search one of {', '.join(PERTURBED)}, without a condition, or use another scheduler.",
        )


def _require_a_configuration(recipe: Recipe, tune: Tune) -> None:
    """Refuses a space whose values contradict each other, as far as a few configurations show it."""
    if tune.searcher == "grid":
        tried = combinations(tune.space)[:LOOKED_AT]
    else:
        tried = [draw(tune.space, tune.seed, number) for number in range(1, LOOKED_AT + 1)]
    reasons = [why_no_recipe(recipe, values) for values in tried]
    if None not in reasons:
        raise RecipeError(
            f"{recipe.where('tune.space')}tune.space: none of {len(tried)} configurations is a recipe; "
            f"the first is {_title(recipe, tried[0])}: {reasons[0]}"
        )
