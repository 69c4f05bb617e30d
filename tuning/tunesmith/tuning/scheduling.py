"""Ray Tune's schedulers, set up from the `tune` section; all of them count in reports."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np
from ray import tune as ray_tune
from ray.tune.experiment import Trial
from ray.tune.schedulers import (
    ASHAScheduler,
    FIFOScheduler,
    HyperBandScheduler,
    MedianStoppingRule,
    PopulationBasedTraining,
    TrialScheduler,
)

from tunesmith.cluster.recipe.tune import Dimension, Tune
from tunesmith.tuning.space import perturbed

REPORT = "training_iteration"
"""What Ray Tune calls the number of a trial's report."""


def scheduler(tune: Tune) -> TrialScheduler:
    """The scheduler that the `tune` section names."""
    common: dict[str, Any] = {"time_attr": REPORT, "metric": tune.metric, "mode": tune.mode}
    if tune.scheduler == "asha":
        grace = min(tune.grace, tune.reports)
        return ASHAScheduler(**common, max_t=tune.reports, grace_period=grace, reduction_factor=tune.reduction)
    if tune.scheduler == "hyperband":
        return HyperBandScheduler(**common, max_t=tune.reports, reduction_factor=tune.reduction)
    if tune.scheduler == "median":
        return MedianStoppingRule(**common, grace_period=tune.grace, min_samples_required=3)
    if tune.scheduler == "pbt":
        return _population(tune, common)
    return FIFOScheduler()


def _population(tune: Tune, common: dict[str, Any]) -> PopulationBasedTraining:
    space = perturbed(tune)
    assert space, "space.check refuses pbt without a key that may change"
    return _Population(
        tune.seed,
        **common,
        perturbation_interval=tune.grace,
        hyperparam_mutations={key: _domain(dimension) for key, dimension in space.items()},
        custom_explore_fn=lambda config: _within(space, config),
        synch=True,
        log_config=False,
    )


class _Population(PopulationBasedTraining):
    """Begins with what the searcher proposes, and gives a trial another one's configuration, but not its number.

    What it draws for a trial after a report follows from the sweep's seed, the trial and the report alone, so that a sweep
    which goes on makes the same exchanges again.

    Ray Tune exchanges when the last trial reports, while others may still be saving: their own state then takes the place of
    the one that they were given. Here an exchange waits until every trial is paused, which it is only once it has saved.
    """

    def __init__(self, seed: int, **settings: Any) -> None:
        super().__init__(**settings)
        self._seed = seed

    def on_trial_add(self, tune_controller: Any, trial: Any) -> None:
        # it looks for a searcher, to refuse any: one that expects its proposals to stay as they were would be misled
        super().on_trial_add(SimpleNamespace(search_alg=None), trial)  # pyright: ignore[reportArgumentType]

    def on_trial_result(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> str:
        state, report = self._trial_state[trial], result[REPORT]
        if report - state.last_perturbation_time < self._perturbation_interval:
            return TrialScheduler.CONTINUE
        self._save_trial_state(state, report, result, trial)
        return TrialScheduler.PAUSE

    def choose_trial_to_run(self, tune_controller: Any) -> Any:
        live = [trial for trial in tune_controller.get_live_trials() if not trial.is_finished()]
        if live and all(trial.status == Trial.PAUSED and self._waits(trial) for trial in live):
            self._exchange(live, tune_controller)
        return super().choose_trial_to_run(tune_controller)

    def _waits(self, trial: Any) -> bool:
        return self._trial_state[trial].last_train_time >= self._next_perturbation_sync

    def _exchange(self, trials: list[Any], tune_controller: Any) -> None:
        """Gives the worst trials the states of the best; all of them then go on to the next exchange."""
        lower, upper = self._quantiles()
        for trial in sorted(trials, key=lambda trial: trial not in upper):  # a state is there before it is taken
            state = self._trial_state[trial]
            state.last_perturbation_time = state.last_train_time
            self._checkpoint_or_exploit(trial, tune_controller, upper, lower)
        self._next_perturbation_sync += self._perturbation_interval

    def _checkpoint_or_exploit(
        self, trial: Any, tune_controller: Any, upper_quantile: list[Any], lower_quantile: list[Any]
    ) -> None:
        key = (self._seed, trial.config["trial"], self._trial_state[trial].last_train_time)
        with _drawing_from(key):
            super()._checkpoint_or_exploit(trial, tune_controller, upper_quantile, lower_quantile)

    def _get_new_config(self, trial: Any, trial_to_clone: Any) -> tuple[dict[str, Any], dict[str, Any]]:
        config, operations = super()._get_new_config(trial, trial_to_clone)
        return {**config, "trial": trial.config["trial"]}, operations


@contextlib.contextmanager
def _drawing_from(key: tuple[int, ...]) -> Iterator[None]:
    """Sets the global generators, from which Ray Tune draws, to a state that follows from the key alone."""
    before = random.getstate(), np.random.get_state()
    random.seed(repr(key))
    np.random.seed(key)
    try:
        yield
    finally:
        random.setstate(before[0])
        np.random.set_state(before[1])


def _domain(dimension: Dimension) -> Any:
    if dimension.is_list:
        return dimension.values
    low, high = dimension.values
    return {"uniform": ray_tune.uniform, "loguniform": ray_tune.loguniform}.get(dimension.kind, _whole)(low, high)


def _whole(low: int, high: int) -> Any:
    return ray_tune.randint(low, high + 1)


def _within(space: dict[str, Dimension], config: dict[str, Any]) -> dict[str, Any]:
    """A perturbed number goes no further than the range that is searched."""
    for key, dimension in space.items():
        if not dimension.is_list and key in config:
            low, high = dimension.values
            config[key] = min(max(config[key], low), high)
    return config
