"""Ray Tune's schedulers as the `tune` section sets them up."""

from __future__ import annotations

import random
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from ray.tune.experiment import Trial
from ray.tune.schedulers import (
    ASHAScheduler,
    FIFOScheduler,
    HyperBandScheduler,
    MedianStoppingRule,
    PopulationBasedTraining,
    TrialScheduler,
)
from sweep_recipes import tune_section

from tunesmith.tuning.scheduling import REPORT, _within, scheduler

SPACE = {
    "train.learning_rate": {"loguniform": [1e-4, 1e-2]},
    "train.weight_decay": {"choice": [0.0, 0.1, 0.2]},
    "adaptation.lora_dropout": {"uniform": [0.0, 0.2]},
    "adaptation.rank": {"choice": [4, 8]},
}


def population(**tune: Any) -> PopulationBasedTraining:
    made = scheduler(tune_section(SPACE, scheduler="pbt", **tune))
    assert isinstance(made, PopulationBasedTraining)
    return made


class OneTrial:
    """As much of Ray Tune's trial as its schedulers look at."""

    run_metadata = SimpleNamespace(
        checkpoint_manager=SimpleNamespace(checkpoint_config=SimpleNamespace(num_to_keep=None))
    )
    experiment_tag = ""
    status = Trial.RUNNING

    def is_finished(self) -> bool:
        return self.status in (Trial.ERROR, Trial.TERMINATED)

    def __init__(self, number: int, config: dict[str, Any]) -> None:
        self.trial_id, self.config, self.evaluated_params = f"t{number}", {"trial": number, **config}, {}


def trial(number: int, **config: Any) -> Any:
    return OneTrial(number, config)


def values(rate: float = 1e-3) -> dict[str, Any]:
    return {
        "train.learning_rate": rate,
        "train.weight_decay": 0.1,
        "adaptation.lora_dropout": 0.1,
        "adaptation.rank": 4,
    }


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("asha", ASHAScheduler),
        ("hyperband", HyperBandScheduler),
        ("median", MedianStoppingRule),
        ("pbt", PopulationBasedTraining),
    ],
)
def test_each_counts_in_reports_and_compares_the_metric(name: str, kind: type[TrialScheduler]):
    made: Any = scheduler(tune_section(SPACE, scheduler=name, metric="loss", mode="max"))
    assert type(made) is kind or kind in type(made).__mro__
    assert made._time_attr == REPORT == "training_iteration"
    assert made._metric == "loss"
    assert (made._mode if hasattr(made, "_mode") else {1.0: "max"}[made._metric_op]) == "max"


def test_nobody_stops_trials_under_none():
    assert type(scheduler(tune_section(SPACE, scheduler="none"))) is FIFOScheduler


def test_asha_has_its_rungs_where_grace_and_reduction_say():
    made: Any = scheduler(tune_section(SPACE, reports=18, grace=2, reduction=3))
    rungs = [milestone for milestone, _ in made._brackets[0]._rungs]
    assert sorted(rungs) == [2, 6, 18]
    assert made._max_t == 18


def test_asha_lets_one_of_so_many_go_on():
    made: Any = scheduler(tune_section(SPACE, reports=9, reduction=3))
    bracket = made._brackets[0]
    decisions = [bracket.on_result(trial(n), 1, -value) for n, value in enumerate([1.0, 2.0, 3.0, 0.5, 2.5])]
    assert decisions == ["CONTINUE", "STOP", "STOP", "CONTINUE", "STOP"]


def test_a_grace_beyond_the_last_report_stops_nobody():
    made: Any = scheduler(tune_section(SPACE, reports=3, grace=50))
    assert [milestone for milestone, _ in made._brackets[0]._rungs] == [3]


def test_hyperband_knows_the_last_report_and_the_reduction():
    made: Any = scheduler(tune_section(SPACE, scheduler="hyperband", reports=27, reduction=3))
    assert (made._max_t_attr, made._eta, made._s_max_1) == (27, 3, 4)


def test_median_waits_for_the_grace():
    made: Any = scheduler(tune_section(SPACE, scheduler="median", grace=4))
    assert (made._grace_period, made._min_samples_required) == (4, 3)


def test_a_population_exchanges_together_at_every_grace_and_perturbs_what_may_change():
    made: Any = population(grace=2)
    assert (made._perturbation_interval, made._synch) == (2, True)
    assert set(made._hyperparam_mutations) == set(SPACE) - {"adaptation.rank"}
    assert made._hyperparam_mutations["train.weight_decay"] == [0.0, 0.1, 0.2]


def test_a_key_that_only_some_trials_have_is_not_perturbed():
    of = SPACE | {"train.max_grad_norm": {"uniform": [0.5, 1], "when": {"adaptation.rank": 8}}}
    made: Any = scheduler(tune_section(of, scheduler="pbt"))
    assert "train.max_grad_norm" not in made._hyperparam_mutations


def test_a_population_takes_what_a_searcher_proposed_as_it_is():
    from ray.tune.search import Searcher, SearchGenerator

    made: Any = population()
    one = trial(1, **values())
    before = dict(one.config)
    made.on_trial_add(SimpleNamespace(search_alg=SearchGenerator(Searcher(metric="loss", mode="min"))), one)
    assert one.config == before


def test_a_perturbed_number_stays_in_its_range():
    space = tune_section(SPACE).space
    config = {"trial": 3, "train.learning_rate": 0.5, "adaptation.lora_dropout": -0.1, "train.weight_decay": 7}
    assert _within(space, config) == {
        "trial": 3,
        "train.learning_rate": 1e-2,
        "adaptation.lora_dropout": 0.0,
        "train.weight_decay": 7,
    }
    assert _within(space, {"train.learning_rate": 2e-4}) == {"train.learning_rate": 2e-4}


def test_a_clone_has_the_donors_values_perturbed_within_their_ranges_and_its_own_number():
    made: Any = population()
    random.seed(0)
    np.random.seed(0)
    taken = [made._get_new_config(trial(7, **values()), trial(2, **values(9e-3)))[0] for _ in range(200)]
    assert {config["trial"] for config in taken} == {7}
    assert {config["adaptation.rank"] for config in taken} == {4}
    rates = {config["train.learning_rate"] for config in taken}
    assert all(1e-4 <= rate <= 1e-2 for rate in rates)
    assert {1e-2, 9e-3 * 0.8} <= rates, "upwards it is held at the end, downwards it is free"
    assert len(rates) > 2, "some are drawn anew"
    assert {config["train.weight_decay"] for config in taken} == {0.0, 0.1, 0.2}


def test_what_a_population_draws_follows_from_the_seed_the_trial_and_the_report():
    def drawn(seed: int, number: int = 7, report: int = 2) -> list[Any]:
        made: Any = population(seed=seed)
        donors, taker = [trial(1, **values()), trial(2, **values(2e-3))], trial(number, **values())
        for one in (*donors, taker):
            made.on_trial_add(None, one)
            made._trial_state[one].last_train_time, made._trial_state[one].last_checkpoint = report, object()
        exchanges: list[Any] = []
        made._exploit = lambda _, one, donor: exchanges.append((donor.trial_id, *made._get_new_config(one, donor)))
        for _ in range(10):
            made._checkpoint_or_exploit(taker, None, donors, [taker])
        return exchanges

    first = drawn(1)
    random.seed(3)  # whatever others draw meanwhile
    assert first == drawn(1)
    assert len({repr(one) for one in first}) == 1
    others = [drawn(seed, number, report) for seed, number, report in ((2, 7, 2), (1, 8, 2), (1, 7, 4))]
    assert all(first != other for other in others)


class FourTrials:
    """A population of four; the first is the best. What is exchanged is written down instead of made."""

    def __init__(self) -> None:
        self.made: Any = population(grace=2, metric="loss", mode="min")
        self.trials = [trial(number, **values()) for number in range(1, 5)]
        self.taken: list[tuple[str, str]] = []
        for one in self.trials:
            self.made.on_trial_add(None, one)
            one.temporary_state = SimpleNamespace(saving_to=None)
            one.checkpoint = f"checkpoint of {one.trial_id}"
        self.made._exploit = lambda _, one, donor: self.taken.append((one.trial_id, donor.trial_id))

    def report(self, number: int, report: int) -> str:
        return self.made.on_trial_result(self, self.trials[number - 1], {REPORT: report, "loss": float(number)})

    def get_trials(self) -> list[Any]:
        return self.trials

    def get_live_trials(self) -> list[Any]:
        return [one for one in self.trials if not one.is_finished()]

    def pause(self, *numbers: int) -> None:
        for number in numbers:
            self.trials[number - 1].status = Trial.PAUSED

    def go_on(self) -> str | None:
        chosen = self.made.choose_trial_to_run(self)
        return chosen and chosen.trial_id


def test_a_population_exchanges_only_when_each_has_saved():
    four = FourTrials()
    assert [four.report(number, 1) for number in (1, 2, 3, 4)] == ["CONTINUE"] * 4
    assert [four.report(number, 2) for number in (4, 1, 2, 3)] == ["PAUSE"] * 4
    four.pause(1, 2, 3)
    assert four.go_on() is None, "nobody goes on before the exchange"
    assert four.taken == [], "the fourth is still saving"
    four.pause(4)
    assert four.go_on() == "t1"
    assert four.taken == [("t4", "t1")]
    four.go_on()
    assert four.taken == [("t4", "t1")], "once"
    assert [four.report(number, 3) for number in (1, 2, 3, 4)] == ["CONTINUE"] * 4


def test_a_population_does_not_wait_for_one_that_has_ended():
    four = FourTrials()
    assert [four.report(number, 2) for number in (2, 3, 4)] == ["PAUSE"] * 3
    four.pause(2, 3, 4)
    assert four.go_on() is None
    four.trials[0].status = Trial.ERROR
    assert four.go_on() == "t2"
    assert four.taken == [("t4", "t2")]


def test_the_last_of_a_population_goes_on_alone():
    four = FourTrials()
    for one in four.trials[:3]:
        one.status = Trial.TERMINATED
    assert four.report(4, 2) == "PAUSE"
    four.pause(4)
    assert four.go_on() == "t4"
    assert four.taken == []
