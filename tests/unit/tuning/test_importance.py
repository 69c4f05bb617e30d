"""The key that decided a search gets the largest share; without evidence there are no shares."""

from __future__ import annotations

import math
import random
from typing import Any

import pytest
from sweep_results import sweep, trial

from tunesmith.tuning.importance import importance


def planted(count: int, seed: int, mode: str = "min") -> dict[str, Any]:
    """A sweep whose metric depends on the learning rate, a little on the rank, and on nothing else but noise."""
    draw = random.Random(seed)
    sign = 1 if mode == "min" else -1
    trials = []
    for number in range(1, count + 1):
        values = {
            "train.learning_rate": 10 ** draw.uniform(-5, -3),
            "train.weight_decay": draw.uniform(0, 0.1),
            "train.max_steps": draw.randint(10, 100),
            "adaptation.rank": draw.choice([4, 8, 16]),
        }
        if values["adaptation.rank"] != 4:
            values["adaptation.lora_alpha"] = draw.choice([8, 16])
        loss = 5 + 4 * (math.log10(values["train.learning_rate"]) + 3.6) ** 2 + 0.1 * (values["adaptation.rank"] == 4)
        trials.append(trial(number, values, [sign * (loss + draw.gauss(0, 0.02))]))
    space = {
        "train.learning_rate": {"kind": "loguniform", "low": 1e-5, "high": 1e-3},
        "train.weight_decay": {"kind": "uniform", "low": 0, "high": 0.1},
        "train.max_steps": {"kind": "randint", "low": 10, "high": 100},
        "adaptation.rank": {"kind": "choice", "values": [4, 8, 16]},
        "adaptation.lora_alpha": {"kind": "grid", "values": [8, 16], "when": {"adaptation.rank": [8, 16]}},
    }
    return sweep(trials, space=space, mode=mode)


@pytest.mark.parametrize("mode", ["min", "max"])
@pytest.mark.parametrize("seed", range(3))
def test_the_planted_key_comes_first_and_the_shares_sum_to_one(mode: str, seed: int):
    results = planted(40, seed, mode)
    shares = importance(results)
    assert next(iter(shares)) == "train.learning_rate"
    assert shares["train.learning_rate"] > 0.5
    assert set(shares) == set(results["space"])
    assert sum(shares.values()) == pytest.approx(1)
    assert list(shares.values()) == sorted(shares.values(), reverse=True)


def test_too_few_trials_or_one_result_tell_nothing():
    results = planted(4, 0)
    assert importance(results) != {}
    results["trials"][0]["state"] = "failed"
    assert importance(results) == {}
    constant = planted(10, 0)
    for each in constant["trials"]:
        each["value"] = 5.0
    assert importance(constant) == {}


def test_only_finite_results_of_ended_trials_count():
    results = planted(40, 1)
    expected = importance(results)
    worse = [
        trial(100 + n, results["trials"][n]["values"], [0.0], state=state)
        for n, state in enumerate(("failed", "running"))
    ]
    worse += [trial(110, {}, [], state="stopped"), trial(111, {}, [math.nan], state="stopped")]
    assert importance(results | {"trials": results["trials"] + worse}) == expected


def test_values_outside_the_space_and_lists_as_values_are_taken_as_they_are():
    results = planted(12, 2)
    results["space"]["adaptation.targets"] = {"kind": "choice", "values": [["q_proj"], ["q_proj", "v_proj"], None]}
    for n, each in enumerate(results["trials"]):
        each["values"]["adaptation.targets"] = [["q_proj"], None][n % 2]
        each["values"]["train.learning_rate"] *= 10
        each["values"]["adaptation.rank"] = 10
        each["values"]["train.max_steps"] *= 1.2
    shares = importance(results)
    assert sum(shares.values()) == pytest.approx(1)
    assert shares["adaptation.rank"] == 0.0
