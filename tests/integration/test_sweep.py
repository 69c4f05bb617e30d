"""Whole sweeps on Ray Tune, from a recipe to a winner that can be served."""

from __future__ import annotations

import contextlib
import math
import statistics
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml
from sweeps import SPACE, loaded, outcome, results, sweep_recipe, with_base_and_rows

from tunesmith.cluster.artifacts import verify
from tunesmith.cluster.events import Event, Step
from tunesmith.cluster.recipe.load import load_recipe
from tunesmith.cluster.session import RaySession
from tunesmith.tuning import sweep
from tunesmith.tuning.records import SweepFolder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return with_base_and_rows(tmp_path_factory.mktemp("sweeps"))


@pytest.fixture(scope="module")
def searched(folder: Path, ray_session: RaySession) -> dict[str, Any]:
    """A random search without a scheduler; one trial's rate is beyond all reason."""
    space = {**SPACE, "train.learning_rate": {"choice": [1e-5, 1e-3, 1e-2, 1e30]}}
    written = sweep_recipe(folder, "searched", space=space, trials=8)
    sweep.run(loaded(written))
    return results(folder, "searched")


def test_every_trial_reports_and_the_best_one_wins(folder: Path, searched: dict[str, Any]) -> None:
    finished = [trial for trial in searched["trials"] if trial["state"] == "finished"]
    assert {len(trial["reports"]) for trial in finished} == {4}
    assert searched["execution"] == "fused"
    best = min(finished, key=lambda trial: trial["value"])
    assert searched["best"] == best["trial"]
    assert best["value"] < searched["baseline"] - 0.5
    assert (folder / "runs" / "searched" / "report.html").stat().st_size > 5000


def test_a_trial_that_goes_nan_fails_alone(searched: dict[str, Any]) -> None:
    wild = [trial for trial in searched["trials"] if trial["values"]["train.learning_rate"] == 1e30]
    assert wild, "no trial drew the wild rate"
    for trial in wild:
        assert trial["state"] == "failed"
        assert "NaN or infinite" in trial["why"]
    assert sum(trial["state"] == "finished" for trial in searched["trials"]) == len(searched["trials"]) - len(wild)


def test_the_winner_is_a_recipe_and_a_model_that_plain_peft_loads(folder: Path, searched: dict[str, Any]) -> None:
    from peft import AutoPeftModelForCausalLM

    winner = load_recipe(searched["winner"])
    best = next(trial for trial in searched["trials"] if trial["trial"] == searched["best"])
    assert winner.train.learning_rate == best["values"]["train.learning_rate"]
    assert winner.adaptation.rank == best["values"]["adaptation.rank"]  # type: ignore[union-attr]
    artifact = Path(searched["artifact"])
    assert verify(artifact).about["parity_passed"]
    model = AutoPeftModelForCausalLM.from_pretrained(artifact)
    assert model.peft_config["default"].r == best["values"]["adaptation.rank"]
    receipts = {path.stem for path in (artifact / "receipts").glob("*.json")}
    assert {"parity", "mask", "fingerprint"} <= receipts


def test_the_same_command_again_trains_nothing(folder: Path, searched: dict[str, Any]) -> None:
    before = outcome(folder, "searched")
    lines = (folder / "runs" / "searched" / "trials" / "0001" / "reports.jsonl").read_bytes()
    space = {**SPACE, "train.learning_rate": {"choice": [1e-5, 1e-3, 1e-2, 1e30]}}
    sweep.run(loaded(sweep_recipe(folder, "searched", space=space, trials=8)))
    assert outcome(folder, "searched") == before
    assert (folder / "runs" / "searched" / "trials" / "0001" / "reports.jsonl").read_bytes() == lines


def test_a_dry_run_says_what_the_trials_would_take_and_leaves_nothing(folder: Path, ray_session: RaySession) -> None:
    planned = sweep.plan(loaded(sweep_recipe(folder, "dry", execution="isolated", concurrent=1)))
    assert (planned["execution"], planned["trials"], planned["trials_on_record"]) == ("isolated", 6, 0)
    assert (planned["concurrent"], planned["need"]["workers"], planned["need"]["cpus"]) == (1, 1, 1)
    assert not (folder / "runs" / "dry").exists()


def test_a_population_exchanges_weights_and_says_so(folder: Path, ray_session: RaySession) -> None:
    space = {"train.learning_rate": {"loguniform": [1e-5, 3e-2]}, "adaptation.rank": {"choice": [4, 8]}}
    sweep.run(loaded(sweep_recipe(folder, "population", space=space, scheduler="pbt", trials=4, grace=2)))
    found = results(folder, "population")
    taken = [trial for trial in found["trials"] if trial["lineage"]]
    assert taken, "nobody took another trial's weights"
    for trial in taken:
        exchange = trial["lineage"][-1]
        donor = next(other for other in found["trials"] if other["trial"] == exchange["from"])
        assert trial["values"]["adaptation.rank"] == donor["values"]["adaptation.rank"]
        old, new = exchange["changed"]["train.learning_rate"]
        assert new != old
        assert 1e-5 <= new <= 3e-2
        after = next(one["value"] for one in trial["reports"] if one["report"] == exchange["report"] + 1)
        before = next(one["value"] for one in trial["reports"] if one["report"] == exchange["report"])
        given = next(one["value"] for one in donor["reports"] if one["report"] == exchange["report"])
        assert abs(after - given) < abs(after - before), "it goes on from the donor's weights, not from its own"
    records = folder / "runs" / "population" / "trials"
    before_again = {path: path.read_bytes() for path in records.glob("*/*.json*")}
    (folder / "runs" / "population" / "result.json").unlink()
    sweep.run(loaded(sweep_recipe(folder, "population", space=space, scheduler="pbt", trials=4, grace=2)))
    assert {path: path.read_bytes() for path in records.glob("*/*.json*")} == before_again, "the same exchanges again"


def test_what_cannot_fit_is_never_launched(folder: Path, ray_session: RaySession) -> None:
    space = {"adaptation.rank": {"choice": [4, 2**27]}, "train.learning_rate": {"loguniform": [1e-4, 1e-2]}}
    sweep.run(loaded(sweep_recipe(folder, "large", space=space, trials=5)))
    found = results(folder, "large")["trials"]
    large = [trial for trial in found if trial["values"]["adaptation.rank"] == 2**27]
    assert large, "no trial drew the large rank"
    for trial in large:
        assert (trial["state"], trial["reports"]) == ("infeasible", [])
        assert "GiB" in trial["why"]
        assert not list(SweepFolder(folder / "runs" / "large").trial(trial["trial"]).root.glob("run-*"))
    assert sum(trial["state"] == "finished" for trial in found) == 5 - len(large)


def test_seeds_of_a_configuration_are_averaged(folder: Path, ray_session: RaySession) -> None:
    space = {"train.learning_rate": {"grid": [1e-3, 1e-2]}}
    sweep.run(loaded(sweep_recipe(folder, "seeds", space=space, searcher="grid", trials=None, seeds=3, reports=2)))
    for trial in results(folder, "seeds")["trials"]:
        runs = SweepFolder(folder / "runs" / "seeds").trial(trial["trial"]).root
        losses = []
        for index in range(3):
            text = (runs / f"run-0-{index}" / "metrics.jsonl").read_text().splitlines()
            losses.append(yaml.safe_load(text[-1])["eval_loss"])
        assert len(set(losses)) == 3
        assert trial["value"] == pytest.approx(statistics.fmean(losses))
        assert trial["std"] == pytest.approx(statistics.stdev(losses))


def test_trials_with_workers_of_their_own_say_what_fused_ones_say(folder: Path, ray_session: RaySession) -> None:
    tune = {"searcher": "grid", "trials": None, "reports": 3, "space": {"train.learning_rate": {"grid": [1e-3, 1e-2]}}}
    for execution in ("fused", "isolated"):
        recipe = sweep_recipe(folder, execution, execution=execution, **tune)
        if execution == "isolated":
            del recipe["cluster"]  # so that a trial's worker wants all the CPUs there are
        sweep.run(loaded(recipe))
    fused, isolated = (results(folder, name)["trials"] for name in ("fused", "isolated"))
    for ours, theirs in zip(fused, isolated, strict=True):
        assert theirs["state"] == "finished"
        for one, other in zip(ours["reports"], theirs["reports"], strict=True):
            assert one["step"] == other["step"]
            assert one["value"] == pytest.approx(other["value"], abs=1e-4)
    assert verify(Path(results(folder, "isolated")["artifact"])).about["parity_passed"]


@pytest.mark.matrix
def test_the_winner_is_trained_anew_with_several_seeds(folder: Path, ray_session: RaySession) -> None:
    tune = {"trials": 2, "final": "retrain", "final_seeds": 2, "reports": 2}
    sharing: list[list[str]] = []

    def listen(event: Event) -> None:
        if isinstance(event, Step):
            sharing.append([one for one in titles_below() if "Shell" in one])

    made = sweep.run(loaded(sweep_recipe(folder, "anew", **tune)), listen)
    assert len(sharing) == 2 * 13, "12 steps of both seeds, and the base's loss before them"
    assert not any(sharing), "the workers that trials shared still hold what the winner is trained on"
    again = results(folder, "anew")["retrained"]
    assert again["seeds"] == [42, 43]
    assert again["mean"] == pytest.approx(statistics.fmean(again["values"]))
    assert again["values"][0] == pytest.approx(made.value, abs=1e-4), "the same seed comes to what the trial came to"
    assert verify(Path(made.artifact)).about["parity_passed"]


def titles_below() -> list[str]:
    """Command lines of the processes that this one has started."""
    found = []
    for one in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):
            found.append(" ".join(one.cmdline()))
    return found


SEARCHED = {"train.learning_rate": {"loguniform": [1e-6, 0.3]}, "adaptation.rank": {"choice": [4, 8]}}
LISTED = {"train.learning_rate": {"grid": [1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 0.3]}, "adaptation.rank": {"grid": [4, 8]}}


@pytest.mark.matrix
@pytest.mark.parametrize("scheduler", ["asha", "hyperband", "pbt", "median"])
@pytest.mark.parametrize("searcher", ["optuna", "random", "grid"])
def test_the_planted_optimum_is_found(folder: Path, ray_session: RaySession, searcher: str, scheduler: str) -> None:
    """Rates at both ends learn nothing or diverge; the best lie between."""
    median = _median_of_random(folder)
    space: dict[str, Any] = LISTED if searcher == "grid" else SEARCHED
    trials = None if searcher == "grid" else 12
    name = f"{searcher}-{scheduler}"
    sweep.run(
        loaded(
            sweep_recipe(folder, name, space=space, searcher=searcher, scheduler=scheduler, trials=trials, reports=6)
        )
    )
    found = results(folder, name)
    best = next(trial for trial in found["trials"] if trial["trial"] == found["best"])
    assert best["value"] < median
    assert 1e-3 <= best["values"]["train.learning_rate"] < 0.3


def _median_of_random(folder: Path) -> float:
    if not (folder / "runs" / "median-of-random").exists():
        sweep.run(loaded(sweep_recipe(folder, "median-of-random", space=SEARCHED, trials=12, reports=6)))
    values = [trial["value"] for trial in results(folder, "median-of-random")["trials"]]
    return statistics.median([math.inf if value is None else value for value in values])
