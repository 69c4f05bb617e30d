"""Who proposes configurations, and what an interruption leaves of it."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from ray.tune.search import Searcher
from sweep_recipes import LEARNING_RATE, reported, tune_section

from tunesmith.cluster.errors import RecipeError
from tunesmith.cluster.metrics import read_metrics
from tunesmith.tuning.records import State, SweepFolder
from tunesmith.tuning.search import Journaled, Parzen, proposer
from tunesmith.tuning.space import DEFAULT_TRIALS, Values, combinations, draw, trials_of

SPACE = {
    **LEARNING_RATE,
    "adaptation.rank": {"choice": [4, 8, 16]},
    "train.warmup_steps": {"randint": [0, 20], "when": {"adaptation.rank": [8, 16]}},
}
GRID = {"adaptation.rank": {"grid": [4, 8]}, "train.epochs": {"grid": [1, 2, 3]}}


@pytest.fixture
def folder(tmp_path: Path) -> SweepFolder:
    (tmp_path / "sweep").mkdir()
    return SweepFolder(tmp_path / "sweep")


def never(values: Values) -> str | None:
    return None


def begin(
    folder: SweepFolder, refuse: Callable[[Values], str | None] = never, space: dict[str, Any] = SPACE, **tune: Any
) -> Journaled:
    return Journaled(tune_section(space, **{"searcher": "random", "trials": 6, **tune}), folder, refuse)


def ask_for_all(searcher: Journaled) -> list[dict[str, Any]]:
    """What Ray Tune is given until there is nothing more."""
    asked = []
    while (config := searcher.suggest(f"t{len(asked)}")) != Searcher.FINISHED:
        asked.append(config)
    return asked


def end(searcher: Journaled, folder: SweepFolder, index: int, number: int, value: float, state: State | None) -> None:
    """The trial has reported once, and Ray Tune says that it has ended."""
    folder.trial(number).report(reported(1, value))
    if state is not None:
        folder.trial(number).end(state)
    searcher.on_trial_complete(f"t{index}", {}, error=state == "failed")


def test_trials_are_numbered_from_one_and_are_what_random_search_draws(folder: SweepFolder):
    searcher = begin(folder, seed=3)
    dimensions = tune_section(SPACE).space
    assert ask_for_all(searcher) == [{"trial": n, **draw(dimensions, 3, n)} for n in range(1, 7)]
    assert searcher.suggest("one more") == Searcher.FINISHED
    assert [trial.number for trial in folder.trials()] == [1, 2, 3, 4, 5, 6]
    assert folder.trial(2).values() == draw(dimensions, 3, 2)


def test_a_proposal_is_written_down_before_anything_is_done_with_it(folder: SweepFolder):
    seen: list[list[dict[str, Any]]] = []

    def look(values: Values) -> str | None:
        seen.append(read_metrics(folder.journal))
        return None

    searcher = begin(folder, look)
    searcher.suggest("a")
    searcher.suggest("b")
    assert [[line["trial"] for line in lines] for lines in seen] == [[1], [1, 2]]
    assert seen[1][1]["values"] == folder.trial(2).values()


@pytest.mark.parametrize("kind", ["random", "grid", "optuna"])
def test_a_sweep_that_is_begun_again_proposes_the_same_under_the_same_numbers(kind: str, folder: SweepFolder):
    settings: dict[str, Any] = {"space": GRID, "trials": None} if kind == "grid" else {}
    first = begin(folder, searcher=kind, **settings)
    before = [first.suggest(f"t{index}") for index in range(3)]
    journal = folder.journal.read_bytes()
    again = begin(folder, searcher=kind, **settings)
    after = [again.suggest(f"t{index}") for index in range(3)]
    assert after == before
    assert folder.journal.read_bytes() == journal
    rest = ask_for_all(again)
    assert [config["trial"] for config in rest] == [4, 5, 6]
    assert [line["trial"] for line in read_metrics(folder.journal)] == [1, 2, 3, 4, 5, 6]


@pytest.mark.parametrize("kind", ["random", "grid", "optuna"])
def test_proposals_after_an_interruption_are_those_of_the_unbroken_sweep(kind: str, tmp_path: Path):
    asked = []
    for name in ("unbroken", "broken"):
        folder = SweepFolder(tmp_path / name)
        folder.root.mkdir()
        settings: dict[str, Any] = {"space": GRID, "trials": None} if kind == "grid" else {"trials": 16}
        searcher = begin(folder, searcher=kind, **settings)
        configs: list[dict[str, Any]] = []
        for number in range(1, 7 if kind == "grid" else 17):
            if name == "broken" and number in (4, 13):
                searcher = begin(folder, searcher=kind, **settings)
                for index, config in enumerate(configs):
                    assert searcher.suggest(f"t{index}") == config
                    searcher.on_trial_complete(f"t{index}", {})
            config = searcher.suggest(f"t{len(configs)}")
            configs.append(config)
            end(searcher, folder, number - 1, number, math.log10(config.get("train.learning_rate", 1)), "finished")
        asked.append(configs)
    assert asked[0] == asked[1]


def test_a_line_of_the_journal_that_a_crash_tore_is_proposed_anew(folder: SweepFolder):
    first = begin(folder)
    before = [first.suggest("a"), first.suggest("b")]
    folder.journal.write_bytes(folder.journal.read_bytes()[:-20])
    again = begin(folder)
    assert [again.suggest("a"), again.suggest("b")] == before
    assert [line["trial"] for line in read_metrics(folder.journal)] == [1, 2]


def test_what_cannot_fit_is_recorded_never_launched_and_counts(folder: SweepFolder):
    refused: list[tuple[int, str]] = []

    def large(values: Values) -> str | None:
        return "it needs 9 GiB of 8" if values["adaptation.rank"] == 8 else None

    searcher = Journaled(
        tune_section(GRID, searcher="grid"), folder, large, lambda number, _, why: refused.append((number, why))
    )
    assert [(one["trial"], one["adaptation.rank"]) for one in ask_for_all(searcher)] == [(1, 4), (2, 4), (3, 4)]
    ended = folder.trial(5).ended()
    assert ended is not None
    assert (ended.state, ended.why) == ("infeasible", "it needs 9 GiB of 8")
    assert folder.trial(5).values() == {"adaptation.rank": 8, "train.epochs": 2}
    assert refused == [(number, "it needs 9 GiB of 8") for number in (4, 5, 6)]
    assert len(read_metrics(folder.journal)) == 6


def test_infeasible_ones_count_towards_the_trials_of_random_search_too(folder: SweepFolder):
    searcher = begin(folder, lambda values: "large" if values["adaptation.rank"] == 16 else None, trials=20)
    asked = ask_for_all(searcher)
    infeasible = [trial.number for trial in folder.trials() if trial.ended() is not None]
    assert infeasible
    assert sorted([one["trial"] for one in asked] + infeasible) == list(range(1, 21))


def test_what_was_infeasible_is_not_asked_again(folder: SweepFolder):
    ask_for_all(begin(folder, lambda values: "large"))
    searcher = begin(folder, lambda values: pytest.fail("it was answered already"))
    assert ask_for_all(searcher) == []


def test_values_that_contradict_each_other_are_infeasible_and_the_sweep_goes_on(folder: SweepFolder):
    def contradiction(values: Values) -> str | None:
        if values["train.epochs"] == 2:
            raise RecipeError("a mistake in it:\n  train: both given")
        return None

    asked = ask_for_all(begin(folder, contradiction, space=GRID, searcher="grid", trials=None))
    assert [one["trial"] for one in asked] == [1, 3, 4, 6]
    ended = folder.trial(2).ended()
    assert ended is not None
    assert (ended.state, ended.why) == ("infeasible", "a mistake in it: train: both given")


def test_a_finished_trial_is_proposed_again_under_its_number(folder: SweepFolder):
    first = begin(folder)
    before = [first.suggest("t0"), first.suggest("t1")]
    end(first, folder, 0, 1, 0.5, "finished")
    again = begin(folder, lambda values: None)
    assert [again.suggest("t0"), again.suggest("t1")] == before
    ended = folder.trial(1).ended()
    assert ended is not None
    assert ended.state == "finished"
    assert len(folder.trial(1).reports()) == 1


def test_a_trial_that_was_begun_and_ended_is_not_judged_again(folder: SweepFolder):
    first = begin(folder)
    first.suggest("t0")
    end(first, folder, 0, 1, 0.5, "stopped")
    again = begin(folder, lambda values: "large")
    assert [one["trial"] for one in ask_for_all(again)] == [1]
    ended = folder.trial(1).ended()
    assert ended is not None
    assert ended.state == "stopped"


def test_a_grid_ends_after_its_combinations(folder: SweepFolder):
    asked = ask_for_all(begin(folder, space=GRID, searcher="grid", trials=None))
    found = [{key: value for key, value in one.items() if key != "trial"} for one in asked]
    assert found == combinations(tune_section(GRID).space)
    assert trials_of(tune_section(GRID, searcher="grid")) == 6
    assert proposer(tune_section(GRID, searcher="grid")).propose(7) is None


def test_so_many_trials_are_tried():
    assert trials_of(tune_section()) == DEFAULT_TRIALS == 20
    assert trials_of(tune_section(trials=3)) == 3


@pytest.mark.parametrize("kind", ["random", "optuna"])
def test_larger_budgets_go_on_after_the_earlier_proposals(kind: str, folder: SweepFolder):
    before = ask_for_all(begin(folder, searcher=kind, trials=3))
    after = ask_for_all(begin(folder, searcher=kind, trials=5))
    assert after[:3] == before
    assert [one["trial"] for one in after[3:]] == [4, 5]
    assert all(one not in [{**other, "trial": one["trial"]} for other in before] for one in after[3:])


# The tree-structured Parzen estimator

PLANTED = {
    "train.learning_rate": {"loguniform": [1e-5, 1e-1]},
    "adaptation.lora_dropout": {"uniform": [0, 0.9]},
    "adaptation.rank": {"choice": [4, 8, 16]},
}


def planted(values: Values) -> float:
    """Lowest, 0, at a learning rate of 1e-3, a dropout of 0.2 and rank 8."""
    rate = (math.log10(values["train.learning_rate"]) + 3) ** 2
    return rate + 4 * (values["adaptation.lora_dropout"] - 0.2) ** 2 + (values["adaptation.rank"] != 8)


def best_found(kind: str, seed: int, mode: str = "min", trials: int = 40) -> float:
    sign = 1 if mode == "min" else -1
    asked = proposer(tune_section(PLANTED, searcher=kind, seed=seed, mode=mode))
    found = []
    for number in range(1, trials + 1):
        values = asked.propose(number)
        assert values is not None
        found.append(planted(values))
        asked.tell(number, [sign * found[-1]], is_whole=True)
    return min(found)


@pytest.mark.parametrize("mode", ["min", "max"])
def test_parzen_finds_a_planted_optimum_better_than_random_search(mode: str):
    random = statistics.median(best_found("random", seed) for seed in range(5))
    parzen = [best_found("optuna", seed, mode) for seed in range(5)]
    assert statistics.median(parzen) < random / 2
    assert max(parzen) < random * 2


def test_parzen_finds_it_from_trials_that_were_stopped_early_too():
    asked = proposer(tune_section(PLANTED, seed=1))
    found = []
    for number in range(1, 41):
        values = asked.propose(number)
        assert values is not None
        found.append(planted(values))
        bad = number > 3 and found[-1] > statistics.median(found)
        asked.tell(number, [found[-1] + 1] if bad else [found[-1] + 1, found[-1]], is_whole=not bad)
    assert min(found) < statistics.median(best_found("random", seed) for seed in range(5))


def told(values: list[float], is_whole: bool) -> Any:
    searcher = Parzen(tune_section())
    searcher.propose(1)
    searcher.tell(1, values, is_whole)
    (trial,) = searcher._study.trials
    return trial


def test_a_whole_trial_is_told_as_complete_with_its_last_value():
    trial = told([3.0, 2.0, 2.5], is_whole=True)
    assert (trial.state.name, trial.value) == ("COMPLETE", 2.5)
    assert trial.intermediate_values == {1: 3.0, 2: 2.0, 3: 2.5}


def test_a_trial_that_was_stopped_is_told_as_pruned_with_what_it_reported():
    trial = told([3.0, 2.0], is_whole=False)
    assert (trial.state.name, trial.intermediate_values) == ("PRUNED", {1: 3.0, 2: 2.0})


@pytest.mark.parametrize("values", [[], [math.nan], [math.inf, math.nan]])
def test_a_trial_without_a_finite_value_is_told_as_failed(values: list[float]):
    assert told(values, is_whole=True).state.name == "FAIL"


def test_values_that_are_not_finite_are_left_out():
    trial = told([3.0, math.nan, 2.0], is_whole=True)
    assert (trial.state.name, trial.value, trial.intermediate_values) == ("COMPLETE", 2.0, {1: 3.0, 3: 2.0})


def test_adopted_proposals_guide_what_comes_next():
    free, adopting = Parzen(tune_section(PLANTED, seed=5)), Parzen(tune_section(PLANTED, seed=5))
    for number in range(1, 13):
        values = free.propose(number)
        free.tell(number, [planted(values)], is_whole=True)
        adopting.adopt(number, values)
        adopting.tell(number, [planted(values)], is_whole=True)
    assert [trial.params for trial in adopting._study.trials] == [trial.params for trial in free._study.trials]
    assert adopting.propose(13) == free.propose(13)


def test_what_is_adopted_is_taken_as_it_was_proposed():
    searcher = Parzen(tune_section(PLANTED))
    values = {"train.learning_rate": 1.25e-3, "adaptation.lora_dropout": 0.3, "adaptation.rank": 16}
    searcher.adopt(1, values)
    searcher.tell(1, [1.0], is_whole=True)
    (trial,) = searcher._study.trials
    assert trial.params == {**values, "adaptation.rank": 2}, "lists go by position"
    assert searcher.propose(2) != values


def test_values_of_any_kind_are_proposed_and_adopted():
    of = {
        "adaptation.target_modules": {"choice": ["all-linear", ["q_proj"], ["q_proj", "v_proj"]]},
        "train.warmup_steps": {"choice": [None, 5]},
        "train.max_steps": {"randint": [3, 3]},
    }
    asked = Parzen(tune_section(of))
    proposed = [asked.propose(number) for number in range(1, 12)]
    assert {str(one["adaptation.target_modules"]) for one in proposed} == {
        "all-linear",
        "['q_proj']",
        "['q_proj', 'v_proj']",
    }
    assert {one["train.max_steps"] for one in proposed} == {3}
    again = Parzen(tune_section(of))
    for number, values in enumerate(proposed, start=1):
        again.adopt(number, values)
    assert [trial.params for trial in again._study.trials] == [trial.params for trial in asked._study.trials]


def test_a_conditional_key_is_proposed_where_its_condition_holds():
    asked = Parzen(tune_section(SPACE))
    for number in range(1, 30):
        values = asked.propose(number)
        assert ("train.warmup_steps" in values) == (values["adaptation.rank"] in (8, 16))
        asked.tell(number, [float(values["adaptation.rank"])], is_whole=True)


def test_ray_tune_writes_nothing_of_the_searcher_down(folder: SweepFolder, tmp_path: Path):
    searcher = begin(folder, searcher="optuna")
    searcher.suggest("a")
    searcher.save(str(tmp_path / "saved"))
    assert not (tmp_path / "saved").exists()
    assert searcher.__getstate__() == {}


def test_the_end_of_a_trial_is_told_once_with_all_that_it_reported(folder: SweepFolder):
    searcher = begin(folder, searcher="optuna")
    searcher.suggest("t0")
    folder.trial(1).report(reported(1, 3.0))
    searcher.on_trial_result("t0", {"eval_loss": 3.0})
    end(searcher, folder, 0, 1, 2.0, "stopped")
    searcher.on_trial_complete("t0", {})
    assert isinstance(searcher._proposer, Parzen)
    (trial,) = searcher._proposer._study.trials
    assert trial.state.name == "PRUNED"
    assert trial.intermediate_values == {1: 2.0}


def test_a_trial_that_raised_is_told_as_failed(folder: SweepFolder):
    searcher = begin(folder, searcher="optuna")
    searcher.suggest("t0")
    end(searcher, folder, 0, 1, 2.0, "failed")
    assert isinstance(searcher._proposer, Parzen)
    assert searcher._proposer._study.trials[0].state.name == "FAIL"
