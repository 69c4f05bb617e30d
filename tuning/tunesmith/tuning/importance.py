"""Which keys of a search's space its result hung on."""

from __future__ import annotations

import json
import math
import warnings
from typing import Any

FEWEST_TRIALS = 4  # below this any answer would be noise


def importance(results: dict[str, Any]) -> dict[str, float]:
    """Each key's share of what tells the better half of the trials from all of them; largest first, summing to 1.

    PED-ANOVA (https://arxiv.org/abs/2304.10255), and for conditional keys https://arxiv.org/abs/2601.20800: the
    Pearson divergence between a key's density among the better trials and among all. Half, and not Optuna's default
    of a tenth, because a sweep of 20 trials has only two in its best tenth; and because a trial that was stopped
    early has no final value, yet lies almost surely on the right side of the middle.

    Args:
        results: of a sweep, as `report.render` takes them.

    Returns:
        Nothing where fewer than four trials finished or were stopped, or all their metrics are equal.
    """
    trials = [
        trial
        for trial in results["trials"]
        if trial["state"] in ("finished", "stopped") and trial["value"] is not None and math.isfinite(trial["value"])
    ]
    if len(trials) < FEWEST_TRIALS or len({trial["value"] for trial in trials}) == 1:
        return {}
    import optuna
    from optuna.importance import PedAnovaImportanceEvaluator

    space = {key: _distribution(results["space"][key], trials, key) for key in results["space"]}
    verbosity = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    try:
        study = optuna.create_study(direction="minimize" if results["mode"] == "min" else "maximize")
    finally:
        optuna.logging.set_verbosity(verbosity)
    for trial in trials:
        known = {key: value for key, value in trial["values"].items() if key in space}
        params = {key: value if _is_numeric(results["space"][key]) else _name(value) for key, value in known.items()}
        distributions = {key: space[key] for key in params}
        study.add_trial(
            optuna.trial.create_trial(params=params, distributions=distributions, value=float(trial["value"]))
        )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that a condition held in one trial only
        found = PedAnovaImportanceEvaluator(target_quantile=0.5).evaluate(study)
    shares = {key: found.get(key, 0.0) if _differs(trials, key) else 0.0 for key in space}
    total = sum(shares.values())
    largest_first = sorted(shares.items(), key=lambda share: -share[1])
    return {key: share / total for key, share in largest_first} if total > 0 else {}


def _differs(trials: list[dict[str, Any]], key: str) -> bool:
    return len({_name(trial["values"][key]) for trial in trials if key in trial["values"]}) > 1


def _distribution(entry: dict[str, Any], trials: list[dict[str, Any]], key: str) -> Any:
    """Optuna's form of a key, wide enough for every trial: population-based training leaves the given ends."""
    from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

    values = [trial["values"][key] for trial in trials if key in trial["values"]]
    if not _is_numeric(entry):
        return CategoricalDistribution(list(dict.fromkeys(map(_name, [*entry["values"], *values]))))
    numbers = [entry["low"], entry["high"], *values]
    if entry["kind"] == "randint" and all(number == int(number) for number in numbers):
        return IntDistribution(int(min(numbers)), int(max(numbers)))
    return FloatDistribution(float(min(numbers)), float(max(numbers)), log=entry["kind"] == "loguniform")


def _is_numeric(entry: dict[str, Any]) -> bool:
    return "low" in entry


def _name(value: Any) -> str:
    return json.dumps(value, sort_keys=True, default=str)
