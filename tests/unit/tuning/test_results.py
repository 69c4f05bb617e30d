"""Which trial is best, and what is said of a sweep when it ends."""

from __future__ import annotations

import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from sweep_recipes import LEARNING_RATE, reported, sweep_recipe

from tunesmith.tuning.closing import summary
from tunesmith.tuning.records import Lineage, State, SweepFolder
from tunesmith.tuning.results import Result, best_trial, write_results


@pytest.fixture
def folder(tmp_path: Path) -> SweepFolder:
    return SweepFolder(tmp_path)


def tried(folder: SweepFolder, *trials: tuple[list[float], State | None]) -> None:
    """Trials with these values at their reports, and how they ended."""
    for number, (values, state) in enumerate(trials, start=1):
        record = folder.trial(number)
        record.begin({"train.learning_rate": number / 100})
        for report, value in enumerate(values, start=1):
            record.report(reported(report, value))
        if state is not None:
            record.end(state, "out of memory" if state in ("failed", "infeasible") else "")


def best(folder: SweepFolder, mode: str = "min") -> int | None:
    found = best_trial(folder.trials(), mode)
    return None if found is None else found.number


def test_the_best_is_by_the_last_report(folder: SweepFolder):
    tried(folder, ([3.0, 2.0], "finished"), ([1.0, 2.5], "finished"), ([4.0, 1.5], "finished"))
    assert best(folder, "min") == 3
    assert best(folder, "max") == 2


def test_of_equals_the_first_is_best(folder: SweepFolder):
    tried(folder, ([2.0], "stopped"), ([1.0], "stopped"), ([2.0, 1.0], "finished"), ([2.0], "finished"))
    assert best(folder, "min") == 2
    assert best(folder, "max") == 1


def test_stopped_and_unfinished_trials_count_and_failed_ones_do_not(folder: SweepFolder):
    tried(folder, ([0.1], "failed"), ([3.0], "finished"), ([2.0], "stopped"), ([1.0], None), ([], "infeasible"))
    assert best(folder) == 4
    folder.trial(4).end("failed", "non-finite loss")
    assert best(folder) == 3


def test_a_value_that_is_not_finite_is_never_best(folder: SweepFolder):
    tried(folder, ([math.nan], "finished"), ([5.0], "finished"), ([math.inf], "finished"))
    assert best(folder, "min") == best(folder, "max") == 2


def test_without_a_report_there_is_no_best(folder: SweepFolder):
    tried(folder, ([], "infeasible"), ([1.0], "failed"), ([], None))
    assert best(folder) is None
    assert best_trial([], "min") is None


def ground(folder: SweepFolder, why_isolated: str | None = None, **tune: Any) -> Any:
    recipe = sweep_recipe(LEARNING_RATE, trials=5, **tune)
    return SimpleNamespace(recipe=recipe, tune=recipe.tune, folder=folder, why_isolated=why_isolated, gpus=2.0)


def test_results_say_what_came_of_every_trial(folder: SweepFolder):
    tried(folder, ([3.0, 2.0], "finished"), ([4.0], "stopped"), ([], "infeasible"), ([5.0], None), ([math.nan], None))
    changed = {"train.learning_rate": [0.02, 0.03]}
    folder.trial(2).descend(Lineage(1, 0, 1, 10, {"train.learning_rate": 0.03}, changed))
    write_results(ground(folder), 6.0, began=0.0, complete=True, artifact="model")
    results = json.loads(folder.results.read_text(), parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
    assert (results["best"], results["complete"], results["baseline"], results["artifact"]) == (1, True, 6.0, "model")
    assert results["execution"] == "fused"
    trials = {trial["trial"]: trial for trial in results["trials"]}
    assert [trial["state"] for trial in trials.values()] == [
        "finished",
        "stopped",
        "infeasible",
        "stopped",
        "stopped",
    ]
    assert trials[4]["why"] == "the budget was spent"
    assert [trial["value"] for trial in trials.values()] == [2.0, 4.0, None, 5.0, None]
    assert trials[1]["tokens"] == 200
    assert trials[2]["values"] == {"train.learning_rate": 0.03}
    assert trials[2]["lineage"] == [{"from": 1, "step": 10, "report": 1, "changed": changed}]
    assert trials[3]["why"] == "out of memory"
    assert results["budget"]["spent"]["tokens"] == 200 + 100 + 100 + 100
    assert results["budget"]["spent"]["gpu_hours"] == 2 * results["budget"]["spent"]["hours"]
    assert folder.report.exists()


def test_results_of_isolated_trials_say_why_and_know_no_baseline_of_another_metric(folder: SweepFolder):
    tried(folder, ([3.0], "finished"))
    results = write_results(ground(folder, "it is not LoRA", metric="loss"), 6.0, began=0.0, complete=False)
    assert (results["execution"], results["why"], results["baseline"]) == ("isolated", "it is not LoRA", None)
    assert results["complete"] is False


def test_the_last_words_are_the_winner_and_what_can_be_done_with_it():
    values = {"train.learning_rate": 0.0012345, "adaptation.rank": 8}
    counted = {"finished": 3, "stopped": 5}
    said = summary(Result("bot", 4, 1.23456, values, "w.yaml", "my runs/winner", "r.html", counted))
    assert said.splitlines() == [
        "trial 4 is best: 1.2346 with learning_rate=0.00123 rank=8 (3 finished, 5 stopped)",
        "model   my runs/winner",
        "recipe  w.yaml",
        "report  r.html",
        "next    tunesmith adapters add NAME 'my runs/winner'",
    ]
