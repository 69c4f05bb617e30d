"""Who proposes configurations, and the journal that makes a proposal be made once.

Proposals are numbered. Each is written down before its trial exists, so that a sweep that is started again proposes the
same trials under the same numbers, and only then new ones.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import numpy as np
from ray.tune.search import Searcher

from tunesmith.cluster.errors import RecipeError
from tunesmith.cluster.metrics import MetricsLog, read_metrics
from tunesmith.cluster.recipe.tune import Dimension, Tune
from tunesmith.tuning.records import SweepFolder
from tunesmith.tuning.space import Values, applies, combinations, draw, trials_of


class Proposer(Protocol):
    """Proposes configurations, and is told what became of them."""

    def propose(self, number: int) -> Values | None:
        """The configuration of trial `number`, counted from 1; None when there is no further one."""
        ...

    def adopt(self, number: int, values: Values) -> None:
        """Takes a configuration that was proposed before the sweep was interrupted as its own proposal."""
        ...

    def tell(self, number: int, values: Sequence[float], is_whole: bool) -> None:
        """Takes in the metric at each report of a trial that has ended; `is_whole` unless it was stopped early."""
        ...


class Listed:
    """Proposals that depend on their number alone: seeded random search, or a grid."""

    def __init__(self, of_number: Callable[[int], Values | None]) -> None:
        self._of_number = of_number

    def propose(self, number: int) -> Values | None:
        """The one of this number."""
        return self._of_number(number)

    def adopt(self, number: int, values: Values) -> None:
        """Nothing: what comes next does not depend on what came before."""

    def tell(self, number: int, values: Sequence[float], is_whole: bool) -> None:
        """Nothing: results do not guide it."""


class Parzen:
    """Optuna's tree-structured Parzen estimator (Bergstra et al. 2011), with trials that were stopped early as pruned."""

    def __init__(self, tune: Tune) -> None:
        import optuna

        optuna.logging.set_verbosity(logging.WARNING)
        self._optuna, self._space = optuna, tune.space
        self._study = optuna.create_study(direction="minimize" if tune.mode == "min" else "maximize")
        self._seed = tune.seed
        self._asked: dict[int, Any] = {}

    def propose(self, number: int) -> Values:
        """Asks the study, with a seed of the number's own: after an interruption the same history proposes the same."""
        seed = int(np.random.SeedSequence([self._seed, number]).generate_state(1)[0])
        self._study.sampler = self._optuna.samplers.TPESampler(seed=seed, multivariate=False, n_startup_trials=10)
        trial = self._study.ask()
        self._asked[number] = trial
        return self._suggest(trial)

    def adopt(self, number: int, values: Values) -> None:
        """Asks the study for these very values."""
        self._study.enqueue_trial(self._parameters(values))
        self.propose(number)

    def tell(self, number: int, values: Sequence[float], is_whole: bool) -> None:
        """Reports the trial as complete, pruned, or, without any finite value, as failed."""
        state = self._optuna.trial.TrialState
        trial = self._asked.pop(number)
        finite = [(step, value) for step, value in enumerate(values, start=1) if math.isfinite(value)]
        for step, value in finite:
            trial.report(value, step)
        if not finite:
            self._study.tell(trial, state=state.FAIL)
        elif is_whole:
            self._study.tell(trial, finite[-1][1])
        else:
            self._study.tell(trial, state=state.PRUNED)

    def _suggest(self, trial: Any) -> Values:
        values: Values = {}
        for key, dimension in self._space.items():
            if not applies(dimension, values):
                continue
            if dimension.is_list:  # by position: Optuna takes plain scalars only
                values[key] = dimension.values[trial.suggest_categorical(key, range(len(dimension.values)))]
            elif dimension.kind == "randint":
                values[key] = trial.suggest_int(key, *dimension.values)
            else:
                values[key] = trial.suggest_float(key, *dimension.values, log=dimension.kind == "loguniform")
        return values

    def _parameters(self, values: Values) -> Values:
        return {key: _position(self._space[key], value) for key, value in values.items()}


def proposer(tune: Tune) -> Proposer:
    """The proposer that the `tune` section names."""
    if tune.searcher == "optuna":
        return Parzen(tune)
    if tune.searcher == "grid":
        listed = combinations(tune.space)
        return Listed(lambda number: listed[number - 1] if number <= len(listed) else None)
    return Listed(lambda number: draw(tune.space, tune.seed, number))


class Journaled(Searcher):
    """What Ray Tune asks for trials: earlier proposals first, each under its number, then new ones.

    Args:
        tune: the sweep's section.
        folder: where the journal lies.
        refuse: why a configuration cannot be tried, found before it is launched; None when it can. What it raises as a
            `UsageError` is such a reason too: values may contradict each other.
        on_refused: told the number, the configuration and the reason of each that cannot be tried.
    """

    def __init__(
        self,
        tune: Tune,
        folder: SweepFolder,
        refuse: Callable[[Values], str | None],
        on_refused: Callable[[int, Values, str], None] = lambda number, values, why: None,
    ) -> None:
        super().__init__(metric=tune.metric, mode=tune.mode)
        self._on_refused = on_refused
        self._proposer, self._folder, self._refuse = proposer(tune), folder, refuse
        self._journal = MetricsLog(folder.journal)
        self._earlier = {line["trial"]: line["values"] for line in read_metrics(folder.journal)}
        self._most = trials_of(tune)
        self._number = 0
        self._numbers: dict[str, int] = {}

    def suggest(self, trial_id: str) -> Any:
        """The next trial's configuration; `Searcher.FINISHED` when there is none."""
        while self._number < self._most:
            number = self._number + 1
            values = self._next(number)
            if values is None:
                return Searcher.FINISHED
            self._number = number
            record = self._folder.trial(number)
            ended = record.ended()
            if ended is None and (why := self._why_not(values)) is not None:
                record.begin(values)
                record.end("infeasible", why)
                ended = record.ended()
            if ended is not None and ended.state == "infeasible":
                self._on_refused(number, values, ended.why)
                self._proposer.tell(number, [], is_whole=False)
                continue
            self._numbers[trial_id] = number
            record.begin(values)
            return {"trial": number, **values}
        return Searcher.FINISHED

    def on_trial_result(self, trial_id: str, result: Mapping[str, Any]) -> None:
        """Nothing: the proposer is told when a trial has ended."""

    def on_trial_complete(self, trial_id: str, result: Mapping[str, Any] | None = None, error: bool = False) -> None:
        """Tells the proposer all that the trial has reported."""
        number = self._numbers.pop(trial_id, None)
        if number is None:
            return
        record = self._folder.trial(number)
        ended = record.ended()
        values = [report.value for report in record.reports()]
        self._proposer.tell(number, [] if error else values, ended is not None and ended.state == "finished")

    def __getstate__(self) -> dict[str, Any]:
        return {}  # Ray Tune writes it down, and nobody reads that

    def save(self, checkpoint_path: str) -> None:
        """Nothing: the journal is on disk already."""

    def restore(self, checkpoint_path: str) -> None:
        """Nothing: a sweep is started again from its journal."""

    def _why_not(self, values: Values) -> str | None:
        try:
            return self._refuse(values)
        except RecipeError as refused:  # the values contradict each other
            return " ".join(refused.what.split())

    def _next(self, number: int) -> Values | None:
        if (values := self._earlier.get(number)) is not None:
            self._proposer.adopt(number, values)
            return values
        values = self._proposer.propose(number)
        if values is not None:
            self._journal.append({"trial": number, "values": values})
        return values


def _position(dimension: Dimension, value: Any) -> Any:
    return dimension.values.index(value) if dimension.is_list else value
