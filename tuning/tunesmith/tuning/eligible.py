"""Whether the trials of a sweep can be trained side by side, and with how many lanes; pure decisions."""

from __future__ import annotations

import json
import math
import re
from dataclasses import dataclass
from pathlib import Path

from tunesmith.cluster.recipe.schema import Lora, Recipe
from tunesmith.cluster.recipe.tune import Tune
from tunesmith.trainers.data.prepare import Prepared

PER_TRIAL = (
    "adaptation.rank",
    "adaptation.lora_alpha",
    "adaptation.lora_dropout",
    "adaptation.target_modules",
    "train.learning_rate",
    "train.epochs",
    "train.max_steps",
    "train.per_device_train_batch_size",
    "train.gradient_accumulation_steps",
    "train.weight_decay",
    "train.adam_beta1",
    "train.adam_beta2",
    "train.adam_epsilon",
    "train.max_grad_norm",
    "train.lr_scheduler_type",
    "train.warmup_ratio",
    "train.warmup_steps",
    "train.seed",
)
"""Keys that neighbours on one base may have each for itself."""

ROW_TOKENS = 1024
"""Tokens of a row beyond which the frozen layers' matrix products gain nothing from more."""

LEAST_TRIALS = 4

ALIGNED = 8
"""Lanes are a multiple of this many tokens."""


@dataclass(frozen=True)
class BaseFacts:
    """What is asked of a base.

    Attributes:
        drops: whether its own layers drop activations while they train.
        routes: whether it is a mixture of experts.
        odd_targets: adapted layers that are not linear.
    """

    drops: bool = False
    routes: bool = False
    odd_targets: tuple[str, ...] = ()


def why_isolated(recipe: Recipe, tune: Tune, facts: BaseFacts) -> str | None:
    """Why the trials need workers of their own; None when they can share a base."""
    train, cluster = recipe.train, recipe.cluster
    if not isinstance(recipe.adaptation, Lora):
        return f"adaptation: {recipe.adaptation.kind} is not LoRA"
    beyond = [key for key in tune.space if key not in PER_TRIAL]
    if beyond:
        return f"the trials differ in {', '.join(beyond)}, which is shared by all that train side by side"
    if train.optimizer != "adamw":
        return f"train.optimizer: {train.optimizer} has no side-by-side form"
    if train.precision == "fp16":
        return "train.precision: fp16 scales the loss of a whole batch"
    if cluster.zero not in ("auto", 0):
        return f"cluster.zero: {cluster.zero} shards the base"
    if cluster.offload not in ("none", "auto"):
        return f"cluster.offload: {cluster.offload} moves weights between uses"
    if facts.routes:
        return "the base is a mixture of experts, whose router balances a whole batch"
    if facts.drops:
        return "the base drops activations while it trains, from one stream for all"
    if facts.odd_targets:
        return f"{facts.odd_targets[0]} is adapted, and only linear layers are trained side by side"
    drops = recipe.adaptation.lora_dropout > 0 or "adaptation.lora_dropout" in tune.space
    if train.gradient_checkpointing is True and drops:
        return "train.gradient_checkpointing computes activations twice, and lora_dropout would drop others the second time"
    return None


def lane_length(recipe: Recipe, data: Prepared) -> int:
    """Tokens of a lane: those of the longest pack or example that a trial can meet."""
    longest = max((int(store.lengths.max()) for store in (data.train, data.validation) if len(store)), default=1)
    if recipe.data.packing:
        most = max(int(store.lengths.sum()) for store in (data.train, data.validation))
        longest = max(longest, min(data.max_length, most))
    return math.ceil(longest / ALIGNED) * ALIGNED


def lanes_for(length: int, trials: int, seeds: int, wanted: int | None) -> int:
    """Lanes of a row: enough for efficient matrix products, no more than there is work for.

    Args:
        length: tokens of a lane.
        trials: trials that will be tried in all.
        seeds: lanes that one trial takes.
        wanted: `tune.concurrent`.
    """
    if wanted is not None:
        return max(1, min(wanted, trials)) * seeds
    enough = max(1, ROW_TOKENS // length)
    return max(seeds, min(trials * seeds, enough))


def trials_at_once(lanes: int, trials: int, seeds: int) -> int:
    """Trials that are begun at once: a few more than there are lanes where these are long, so that a row is filled while
    some wait for what follows from their reports. Those that are furthest behind go first."""
    return max(lanes // seeds, min(trials, LEAST_TRIALS))


def ranks_of(recipe: Recipe, tune: Tune) -> tuple[int, ...]:
    """Every rank that a trial may have; of a range its ends and the powers of two between them."""
    assert isinstance(recipe.adaptation, Lora), "only LoRA has ranks"
    searched = tune.space.get("adaptation.rank")
    ranks = {recipe.adaptation.rank} if searched is None or searched.when else set()
    if searched is not None and not searched.is_list:
        low, high = (int(end) for end in searched.values)
        ranks |= {low, high, *(1 << power for power in range(low.bit_length(), high.bit_length()))}
    elif searched is not None:
        ranks |= {int(rank) for rank in searched.values}
    return tuple(sorted(rank for rank in ranks if rank))


def targets_of(recipe: Recipe, tune: Tune) -> tuple[str | list[str], ...]:
    """Every `target_modules` that a trial may have."""
    assert isinstance(recipe.adaptation, Lora), "only LoRA has targets"
    searched = tune.space.get("adaptation.target_modules")
    own = [recipe.adaptation.target_modules] if searched is None or searched.when else []
    return tuple([*own, *(searched.values if searched else ())])


def base_facts(folder: Path, recipe: Recipe, tune: Tune) -> BaseFacts:
    """What the base's config says, without building the model.

    Args:
        folder: the base's files.
    """
    text = (folder / "config.json").read_text(encoding="utf-8")
    config = json.loads(text)
    drops = any(
        "drop" in key and isinstance(value, int | float) and value > 0
        for key, value in config.items()
        if not key.startswith(("classifier", "summary"))
    )
    targets = targets_of(recipe, tune) if isinstance(recipe.adaptation, Lora) else ()
    names = [name for target in targets for name in ([target] if isinstance(target, str) else target)]
    odd = [name for name in names if re.search(r"embed|wte|wpe|lm_head", name)]
    return BaseFacts(drops, "expert" in text, tuple(odd))
