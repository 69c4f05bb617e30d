"""What `auto` becomes, and what to change when a recipe does not fit: variants of it, each simulated."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
from typing import Any

from pydantic import ValidationError

from tunesmith.cluster.recipe.schema import Full, Recipe
from tunesmith.trainers.memory.predict import Planner, Prediction
from tunesmith.trainers.memory.tracker import ACTIVATIONS

BATCHES = (1, 2, 4, 8, 16)
MOST_TIMES_MORE = 64
"""How many times as many GPUs are tried."""
CHECKPOINTING: dict[str, Any] = {"train.gradient_checkpointing": True}
SHARDED: dict[str, Any] = {"cluster.zero": 3}
WHOLE: dict[str, Any] = {"cluster.zero": 0}
LORA: dict[str, Any] = {"adaptation": {"kind": "lora"}}
QLORA: dict[str, Any] = {**LORA, "model.quantization": "nf4"}


@dataclass(frozen=True)
class Choice:
    """A recipe without any `auto`.

    Attributes:
        recipe: it.
        chosen: dotted key -> what was taken for its `auto`.
        prediction: what it will hold.
    """

    recipe: Recipe
    chosen: dict[str, Any]
    prediction: Prediction


@dataclass(frozen=True)
class Alternative:
    """A change after which the recipe fits.

    Attributes:
        changes: dotted key -> value.
        prediction: of the changed recipe.
        gpus: of the fleet that it needs.
        gpu_seconds: for a million tokens.
        costs: times what the recipe itself would cost if it fitted.
        host_gib: host memory that each GPU needs, in GiB: for what is offloaded, and for saving in the background.
    """

    changes: dict[str, Any]
    prediction: Prediction
    gpus: int
    gpu_seconds: float
    costs: float
    host_gib: float = 0.0


def changed(recipe: Recipe, changes: dict[str, Any]) -> Recipe:
    """A copy with some keys set; nothing of the recipe itself counts as read by it.

    Args:
        changes: dotted key -> value.
    """
    tree = recipe.model_dump(mode="json", exclude_unset=True)
    for key, value in changes.items():
        *sections, last = key.split(".")
        node = tree
        for section in sections:
            node = node.setdefault(section, {})
        node[last] = value
    return Recipe.model_validate(tree)


def choose(planner: Planner, recipe: Recipe, settled: dict[str, Any] | None = None) -> Choice:
    """The fastest of what `auto` leaves open that fits; the smallest when nothing does.

    Args:
        settled: choices of an earlier start of the same run, which stay.
    """
    quiet = changed(recipe, settled or {})
    options = _options(planner, quiet)
    best: Choice | None = None
    for values in product(*options.values()):
        chosen = dict(zip(options, values, strict=True))
        variant = _sound(quiet, chosen)
        if variant is None:
            continue
        found = Choice(variant, chosen, planner.predict(variant))
        best = found if best is None or _rank(found) < _rank(best) else best
    assert best is not None, "no combination of what auto may become is sound"
    return Choice(best.recipe, {**(settled or {}), **best.chosen}, best.prediction)


def begin_ahead(planner: Planner, recipe: Recipe) -> None:
    """Begins to simulate adapters while the recipe itself is simulated, when it will hardly fit.

    Only a recipe that leaves nothing open: what is chosen would change the adapters' simulations.
    """
    if isinstance(recipe.adaptation, Full) and not _options(planner, recipe) and planner.is_tight(recipe):
        planner.begin([changed(recipe, LORA), changed(recipe, QLORA)])


def _options(planner: Planner, recipe: Recipe) -> dict[str, tuple[Any, ...]]:
    """What each `auto` may become, the usual first."""
    cluster, train = recipe.cluster, recipe.train
    options: dict[str, tuple[Any, ...]] = {}
    may_offload = cluster.offload == "auto" and not planner.fleet.gpu.is_cpu and train.optimizer != "adamw_8bit"
    if cluster.zero == "auto":
        several = planner.workers(recipe) > 1
        options["cluster.zero"] = (2, 3) if several else (0, 2) if may_offload else (0,)
    if cluster.offload == "auto":
        options["cluster.offload"] = ("none", "cpu") if may_offload else ("none",)
    if train.gradient_checkpointing == "auto":
        options["train.gradient_checkpointing"] = (False, True)
    if train.per_device_train_batch_size == "auto":
        options["train.per_device_train_batch_size"] = BATCHES
    return options


def _sound(recipe: Recipe, changes: dict[str, Any]) -> Recipe | None:
    """The changed recipe; None when the schema refuses the combination, as offloading without a ZeRO stage."""
    try:
        return changed(recipe, changes)
    except ValidationError:
        return None


def _rank(choice: Choice) -> tuple[bool, float]:
    """Lower is better: what fits by its time for a token, what does not by its memory."""
    prediction = choice.prediction
    if prediction.fits:
        return False, prediction.time.seconds / prediction.work.tokens
    return True, prediction.total


def alternatives(planner: Planner, choice: Choice) -> list[Alternative]:
    """Changes after which the recipe fits, the cheapest first. Each is as small as it may be."""
    asked = _gpu_seconds(choice.prediction)
    found: list[Alternative] = []

    def hopeless(variant: Recipe) -> bool:
        """Whether its activations alone, which only checkpointing or fewer rows reduce, are more than there is."""
        return (
            not variant.train.gradient_checkpointing
            and variant.train.per_device_train_batch_size == choice.recipe.train.per_device_train_batch_size
            and choice.prediction.parts[ACTIVATIONS] > 1.2 * choice.prediction.capacity
        )

    def sound(attempts: list[dict[str, Any]]) -> list[tuple[dict[str, Any], Recipe]]:
        variants = [(changes, _sound(choice.recipe, changes)) for changes in attempts]
        return [(changes, variant) for changes, variant in variants if variant is not None and not hopeless(variant)]

    ladders = [steps for attempts in _ladders(planner, choice.recipe) if (steps := sound(attempts))]
    planner.finish()
    planner.begin([steps[0][1] for steps in ladders])
    planner.finish()
    for steps in ladders:
        for changes, variant in steps:
            prediction = planner.predict(variant)
            if prediction.fits:
                found.append(_alternative(changes, prediction, asked))
                break
    if not planner.fleet.gpu.is_cpu and (larger := _larger_fleet(planner, choice, asked)) is not None:
        found.append(larger)
    unique = {tuple(sorted(map(str, one.changes.items()))): one for one in found}
    return sorted(unique.values(), key=lambda one: one.gpu_seconds)


def _ladders(planner: Planner, recipe: Recipe) -> Iterator[list[dict[str, Any]]]:
    """Kinds of change; of each the smallest that fits counts."""
    cluster, train = recipe.cluster, recipe.train
    workers = planner.workers(recipe)
    several = workers > 1 and cluster.zero != 3
    # on one worker sharding shares with nobody, and its buffers are for nothing
    idle = workers == 1 and cluster.zero in (2, 3) and cluster.offload == "none"
    sharded = SHARDED if several else WHOLE if idle else {}
    checkpointing = CHECKPOINTING if not train.gradient_checkpointing else {}
    rows = train.per_device_train_batch_size
    if sharded:
        yield [sharded]
    if train.async_save and planner.fleet.gpu.is_cpu:  # where the copy takes the workers' own memory
        yield [{"train.async_save": False}]
    if checkpointing:
        yield [checkpointing, *([{**checkpointing, **sharded}] if sharded else [])]
    if isinstance(rows, int) and rows > 1:
        halves = [{"train.per_device_train_batch_size": rows >> power} for power in range(1, rows.bit_length())]
        yield [*halves, {**halves[-1], **checkpointing, **sharded}]
    if not planner.fleet.gpu.is_cpu and cluster.offload == "none" and train.optimizer == "adamw":
        stage = {"cluster.zero": 3 if workers > 1 else 2}
        yield [{**stage, "cluster.offload": "cpu"}, {**stage, "cluster.offload": "cpu", **checkpointing}]
    if isinstance(recipe.adaptation, Full):
        yield [LORA, {**LORA, **checkpointing}, {**LORA, **checkpointing, **sharded}]
    if recipe.model.quantization is None:
        change = QLORA if isinstance(recipe.adaptation, Full) else {"model.quantization": "nf4"}
        yield [change, {**change, **checkpointing}, {**change, **checkpointing, **sharded}]


def _larger_fleet(planner: Planner, choice: Choice, asked: float) -> Alternative | None:
    """The smallest multiple of the fleet that the recipe fits under ZeRO-3, with gradient checkpointing if it must."""
    for checkpointing in ({}, CHECKPOINTING):
        if checkpointing and choice.recipe.train.gradient_checkpointing:
            continue
        variant = _sound(choice.recipe, {**SHARDED, **checkpointing})
        times = 2
        while variant is not None and times <= MOST_TIMES_MORE:
            gpus = planner.fleet.gpus * times
            prediction = planner.predict(variant, gpus)
            if prediction.fits:
                return _alternative({"gpus": gpus, **SHARDED, **checkpointing}, prediction, asked)
            times *= 2
    return None


def _alternative(changes: dict[str, Any], prediction: Prediction, asked: float) -> Alternative:
    seconds = _gpu_seconds(prediction)
    host = host_bytes(prediction) / 2**30
    return Alternative(changes, prediction, prediction.workers, seconds, seconds / asked, host)


def host_bytes(prediction: Prediction) -> float:
    """Host memory that each worker on a GPU needs for what is offloaded to it and for saving in the background."""
    engine = prediction.engine
    if engine is None or engine.offload != "cpu":
        return prediction.host_copy
    sharded_weights = prediction.parameters * engine.item if engine.stage == 3 else 0
    return prediction.host_copy + (16 * prediction.trainable + sharded_weights) / prediction.workers


def _gpu_seconds(prediction: Prediction) -> float:
    """Device seconds for a million tokens."""
    return prediction.time.seconds / prediction.work.tokens * 1e6
