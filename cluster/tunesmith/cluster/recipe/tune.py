"""The `tune` section: what a sweep searches, how, and how much it may spend.

Neither torch nor ray is imported here.
"""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt, field_validator, model_validator

from tunesmith.cluster.recipe.section import Section

KINDS = ("choice", "uniform", "loguniform", "randint", "grid")
SCIENTIFIC = re.compile(r"[-+]?\d+(\.\d*)?[eE][-+]?\d+")
"""Numbers that YAML takes for text because they lack a dot or a sign: 1e-4."""


class Dimension(Section):
    """One searched key: exactly one of `choice`, `uniform`, `loguniform`, `randint` and `grid`."""

    choice: list[Any] | None = None
    """Values, each as likely as the others."""
    uniform: tuple[float, float] | None = None
    """The lowest and the highest number; every one between them is as likely."""
    loguniform: tuple[PositiveFloat, PositiveFloat] | None = None
    """The same of positive numbers, every order of magnitude as likely."""
    randint: tuple[int, int] | None = None
    """The lowest and the highest whole number, both included."""
    grid: list[Any] | None = None
    """Values that `searcher: grid` tries with every combination of the others; to other searchers the same as `choice`."""
    when: dict[str, Any] | None = None
    """The key is searched only where other searched keys have these values: `{adaptation.rank: [8, 16]}`. Elsewhere it is
    what the recipe says."""

    @field_validator("choice", "grid", "when", mode="before")
    @classmethod
    def _numbers_are_numbers(cls, written: Any) -> Any:
        return _with_numbers(written)

    @field_validator("uniform", "loguniform", "randint", mode="before")
    @classmethod
    def _two_ends(cls, written: Any) -> Any:
        if written is not None and (not isinstance(written, list | tuple) or len(written) != 2):
            raise ValueError(f"a range is [lowest, highest], not {written!r}")
        return written

    @model_validator(mode="after")
    def _one_range_that_holds_something(self) -> Dimension:
        given = [kind for kind in KINDS if self.__dict__[kind] is not None]
        if len(given) != 1:
            found = " and ".join(given) if given else "none"
            raise ValueError(f"one of {', '.join(KINDS)} is needed, and here is {found}")
        values = self.__dict__[given[0]]
        if given[0] in ("choice", "grid"):
            if not values:
                raise ValueError(f"{given[0]}: an empty list leaves nothing to try")
        elif values[0] > values[1] or (values[0] == values[1] and given[0] != "randint"):
            raise ValueError(
                f"{given[0]}: the range from {values[0]} to {values[1]} is empty; the lower end comes first"
            )
        return self

    @property
    def kind(self) -> str:
        """Which of the five it is."""
        return next(kind for kind in KINDS if self.__dict__[kind] is not None)

    @property
    def values(self) -> list[Any]:
        """The values of a `choice` or `grid`; the two ends of a range."""
        return list(self.__dict__[self.kind])

    @property
    def is_list(self) -> bool:
        """Whether it names its values."""
        return self.kind in ("choice", "grid")


class Tune(Section):
    """What `tunesmith sweep` searches. [Sweeps](sweep.md) has examples."""

    space: dict[str, Dimension]
    """Searched keys of this recipe and where their values come from: `train.learning_rate: {loguniform: [1.0e-5, 1.0e-3]}`."""
    searcher: Literal["optuna", "random", "grid"] = "optuna"
    """Who proposes values: `optuna` (the tree-structured Parzen estimator), `random`, or `grid` (every combination)."""
    scheduler: Literal["asha", "hyperband", "pbt", "median", "none"] = "asha"
    """Who stops or changes trials before their end: `asha` (arXiv:1810.05934), `hyperband` (arXiv:1603.06560), `pbt`
    (population based training, arXiv:1711.09846), `median` (worse than the median so far), or nobody."""
    metric: str = "eval_loss"
    """What trials are compared by: a figure that they report."""
    mode: Literal["min", "max"] = "min"
    """Whether a smaller or a larger metric is better."""
    trials: PositiveInt | None = None
    """Most configurations that are tried. None tries 20, or the whole grid."""
    max_hours: PositiveFloat | None = None
    """Wall-clock hours after which no trial goes on."""
    max_gpu_hours: PositiveFloat | None = None
    """GPU-hours, over all trials, after which none goes on."""
    max_tokens: PositiveInt | None = None
    """Trained tokens, over all trials, after which none goes on."""
    seeds: PositiveInt = 1
    """Runs of each configuration, with `train.seed` and the seeds that follow it; the metric is their mean."""
    seed: NonNegativeInt = 0
    """Seeds the searcher and the scheduler."""
    reports: PositiveInt = 8
    """Most times that a trial is evaluated, each after as many steps and at its end: what schedulers count in. Where its steps
    do not divide, there are fewer."""
    grace: PositiveInt = 1
    """Reports before `asha` or `median` may stop a trial, and between the exchanges of `pbt`."""
    reduction: Annotated[int, Field(ge=2)] = 3
    """`asha` and `hyperband` let one trial in this many go on from rung to rung."""
    execution: Literal["auto", "fused", "isolated"] = "auto"
    """`fused` trains LoRA trials side by side on one frozen base; `isolated` gives each trial workers of its own; `auto`
    is `fused` where that is possible, and says why it is not elsewhere."""
    concurrent: PositiveInt | None = None
    """Most trials at once. None takes as many as fit."""
    final: Literal["trial", "retrain"] = "trial"
    """How the winner's artifact is made: from the trial's own weights, or by training its recipe anew, once for each of
    `final_seeds`."""
    final_seeds: PositiveInt = 1
    """Seeds of the winner that `final: retrain` trains; the best of them makes the artifact."""

    @field_validator("space")
    @classmethod
    def _search_something(cls, space: dict[str, Dimension]) -> dict[str, Dimension]:
        if not space:
            raise ValueError("empty: name at least one key to search")
        return space

    @model_validator(mode="after")
    def _the_searcher_can_walk_it(self) -> Tune:
        for key, dimension in self.space.items():
            if self.searcher == "grid" and not dimension.is_list:
                raise ValueError(
                    f"searcher: grid tries every value, and {key} has a {dimension.kind} range; name its values with grid"
                )
            for other, values in (dimension.when or {}).items():
                _check_condition(self.space, key, other, values)
        if self.searcher == "grid" and self.trials is not None:
            raise ValueError("trials: searcher grid tries every combination; take trials out, or use searcher: random")
        if self.final_seeds > 1 and self.final != "retrain":
            raise ValueError("final_seeds: only final: retrain trains the winner anew")
        return self


def _with_numbers(written: Any) -> Any:
    """Lists and mappings with numbers in place of the texts that YAML made of them."""
    if isinstance(written, list):
        return [_with_numbers(one) for one in written]
    if isinstance(written, dict):
        return {key: _with_numbers(one) for key, one in written.items()}
    return float(written) if isinstance(written, str) and SCIENTIFIC.fullmatch(written) else written


def _check_condition(space: dict[str, Dimension], key: str, other: str, values: Any) -> None:
    """Refuses a condition that can never hold, or one that looks at a key which is chosen later."""
    if other not in space:
        raise ValueError(f"space.{key}: when names {other}, which is not searched; searched are {', '.join(space)}")
    if list(space).index(other) >= list(space).index(key):
        raise ValueError(f"space.{key}: when names {other}, which must stand above it")
    wanted = values if isinstance(values, list) else [values]
    allowed = space[other]
    possible = allowed.is_list and any(value in allowed.values for value in wanted)
    if not possible:
        raise ValueError(
            f"space.{key}: when {other} is {values} never holds; {other} is one of {allowed.values}"
            if allowed.is_list
            else f"space.{key}: when names {other}, whose {allowed.kind} range has no values to name; use choice or grid"
        )
