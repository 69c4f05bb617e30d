"""The best trial as a recipe, and as a model that can be served."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from tunesmith.cluster.errors import TunesmithError
from tunesmith.cluster.events import Listener, Note
from tunesmith.cluster.recipe.schema import Recipe
from tunesmith.cluster.storage import write_atomic
from tunesmith.tuning.fused.training import answers
from tunesmith.tuning.isolated import Isolated, as_run
from tunesmith.tuning.records import SweepFolder, TrialFolder
from tunesmith.tuning.results import Result, best_trial, write_results
from tunesmith.tuning.space import recipe_of

if TYPE_CHECKING:
    from tunesmith.tuning.sweep import Ground
    from tunesmith.tuning.trainers import Trainers

NAME = "winner"


def crown(ground: Ground, who: Trainers, began: float, on_event: Listener) -> Result:
    """Writes the winner's recipe and makes its model.

    Raises:
        TunesmithError: no trial has reported anything, or the model could not be made.
    """
    folder, tune = ground.folder, ground.tune
    states = _states(folder)
    best = best_trial(folder.trials(), tune.mode)
    if best is None:
        raise TunesmithError(*_nothing(ground, states))
    values = best.values_after()
    winner = recipe_of(ground.recipe, values).model_copy(update={"name": f"{ground.recipe.name[:56]}-winner"})
    text = yaml.safe_dump(winner.model_dump(mode="json", exclude_unset=True), sort_keys=False, allow_unicode=True)
    write_atomic(folder.winner_recipe, text)
    on_event(Note(f"trial {best.number} wins; its model is being made"))
    retrained = None
    if tune.final == "retrain":
        who.release()  # their GPUs are what the winner is trained on
        artifact, retrained = _retrain(ground, values, on_event)
    elif who.workers:
        artifact = _export(who.workers, ground, best, values)
    else:
        assert isinstance(who.training, Isolated), "trials without shared workers are isolated"
        artifact = _finish(who.training, best, recipe_of(ground.recipe, values), on_event)
    last = best.reports()[-1]
    shown = {"artifact": str(artifact), "winner": str(folder.winner_recipe), "retrained": retrained}
    write_results(ground, who.baseline, began, complete=True, **shown)
    return Result(
        ground.recipe.name, best.number, last.value, values, str(folder.winner_recipe), str(artifact),
        str(folder.report), states,
    )  # fmt: skip


def _export(workers: Sequence[Any], ground: Ground, best: TrialFolder, values: dict[str, Any]) -> Path:
    """The model of a trial that was trained beside others, as it was at its last report."""
    folder, step = ground.folder.root / NAME, best.reports()[-1].step
    recipe = recipe_of(ground.recipe, values).model_copy(update={"name": NAME})
    written = recipe.model_dump(mode="json", exclude_unset=True)
    (artifact,) = answers([workers[0].export.remote(written, str(_run_of(best)), step, str(folder))])
    return Path(artifact)


def _finish(training: Isolated, best: TrialFolder, recipe: Recipe, on_event: Listener) -> Path:
    """The model of a trial that had workers of its own; one that was stopped early is trained to its end first."""
    from tunesmith.trainers import launch

    return Path(launch.run(as_run(training, recipe, _run_of(best)).recipe, on_event=on_event).artifact)


def _retrain(ground: Ground, values: dict[str, Any], on_event: Listener) -> tuple[Path, dict[str, Any]]:
    """The winner's recipe trained anew, once for each seed; the best of them, and what all came to."""
    from tunesmith.trainers import launch

    first = values.get("train.seed", ground.recipe.train.seed)
    seeds = [first + offset for offset in range(ground.tune.final_seeds)]
    runs = []
    for seed in seeds:
        recipe = recipe_of(ground.recipe, values, seed=seed)
        named = recipe.model_copy(update={"name": f"{NAME}-{seed}"})
        runs.append(launch.run(recipe_of(named, {"output.dir": str(ground.folder.root)}), on_event=on_event))
    name = {"loss": "train_loss", "tokens_per_second": "tokens_per_second"}.get(ground.tune.metric, "eval_loss")
    losses = [run.metrics[name] if run.metrics[name] is not None else run.metrics["train_loss"] for run in runs]
    mean = sum(losses) / len(losses)  # type: ignore[arg-type]
    spread = (sum((loss - mean) ** 2 for loss in losses) / (len(losses) - 1)) ** 0.5 if len(losses) > 1 else None  # type: ignore[operator]
    sign = 1 if ground.tune.mode == "min" else -1
    best = min(zip(losses, runs, strict=True), key=lambda pair: sign * pair[0])[1]  # type: ignore[arg-type,return-value]
    return Path(best.artifact), {"seeds": seeds, "values": losses, "mean": mean, "std": spread}


def _run_of(trial: TrialFolder) -> Path:
    return trial.run(len(trial.lineage()), 0)


def _states(folder: SweepFolder) -> dict[str, int]:
    counted: dict[str, int] = {}
    for trial in folder.trials():
        ended = trial.ended()
        state = ended.state if ended else "unfinished"
        counted[state] = counted.get(state, 0) + 1
    return counted


def _nothing(ground: Ground, states: dict[str, int]) -> tuple[str, str]:
    counted = ", ".join(f"{count} {state}" for state, count in states.items()) or "none was launched"
    reasons = [ended.why for trial in ground.folder.trials() if (ended := trial.ended()) and ended.why]
    first = f"; the first: {reasons[0]}" if reasons else ""
    return (
        f"no trial of {ground.recipe.name} has reported anything: {counted}{first}",
        "Change tune.space and use another name.",
    )
