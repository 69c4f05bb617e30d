"""A shared worker: who waits for a report is always answered, whatever happens to the trial or to the worker."""

from __future__ import annotations

import threading
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from sweeps import loaded, sweep_recipe
from tiny_models import make
from trainings import write_rows
from workers import run_workers

from tunesmith.cluster.errors import StoppedError
from tunesmith.cluster.recipe.schema import Recipe
from tunesmith.cluster.resources import this_machine
from tunesmith.trainers.data.prepare import prepare
from tunesmith.trainers.models import resolve_base
from tunesmith.tuning.fused.worker import Settings, Worker
from tunesmith.tuning.members import as_long_as
from tunesmith.tuning.space import recipe_of


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    make("llama", tmp_path / "llama")
    write_rows(tmp_path / "rows.jsonl")
    return tmp_path


def begun(folder: Path, lost: threading.Event) -> tuple[Worker, dict[str, Any]]:
    """A worker with its base, and the recipe of a trial."""
    torch.set_num_threads(1)
    recipe = recipe_of(loaded(sweep_recipe(folder, "one", train={"max_steps": 400})), {})
    base = resolve_base(recipe.model.base, None, folder / "runs")
    data = prepare(recipe, base, folder / "cache")
    written = recipe.model_dump(mode="json", exclude_unset=True)
    settings = Settings(
        written, asdict(base), folder / "cache", data.fingerprint, ("all-linear",), (8,), 64, 4, 1, (this_machine(),), 1
    )
    worker = Worker(settings, lost.set)
    assert worker.start().baseline is not None
    return worker, written


def asked(worker: Worker, key: str) -> tuple[threading.Thread, list[BaseException]]:
    """A thread that waits for the trial's next report, and what it met instead."""
    met: list[BaseException] = []

    def ask() -> None:
        try:
            worker.next(key)
        except BaseException as error:  # noqa: BLE001 - looked at by the test
            met.append(error)

    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    time.sleep(0.3)
    return thread, met


def _taken_away(folder: Path) -> None:
    worker, written = begun(folder, threading.Event())
    assert worker.open("a", written, str(folder / "a"), 1) == 400
    waiting, met = asked(worker, "a")
    worker.close("a")
    waiting.join(10)
    assert not waiting.is_alive()
    assert [type(error) for error in met] == [StoppedError]
    worker.open("a", written, str(folder / "a"), 200)
    assert worker.next("a")["step"] == 2, "the worker goes on with others"


def test_who_waits_for_a_trial_that_is_taken_away_is_told(folder: Path) -> None:
    run_workers(1, _taken_away, folder)


def _none_left(folder: Path) -> None:
    worker, written = begun(folder, threading.Event())
    for key in "ab":
        worker.open(key, written, str(folder / key), 1)
    worker.patience_s = 2.0  # it waits so long for b before it computes a alone
    waiting, _ = asked(worker, "a")
    worker.close("a")
    waiting.join(10)
    time.sleep(worker.patience_s + 0.5)
    worker.open("c", written, str(folder / "c"), 200)
    assert worker.next("c")["step"] == 2, "a row for nobody is not computed"


def test_when_the_last_trial_at_work_is_taken_away_the_worker_goes_on_with_others(folder: Path) -> None:
    run_workers(1, _none_left, folder)


def _out_of_memory(folder: Path) -> None:
    lost = threading.Event()
    worker, written = begun(folder, lost)
    worker.open("a", written, str(folder / "a"), 1)

    def fail(_: Any) -> Any:
        time.sleep(0.5)
        raise MemoryError("no more")

    worker.group.tick = fail  # type: ignore[method-assign]
    waiting, met = asked(worker, "a")
    with pytest.raises((RuntimeError, MemoryError)):
        worker.open("b", written, str(folder / "b"), 1)
    waiting.join(10)
    assert not waiting.is_alive()
    assert "no more" in str(met[0])
    assert lost.wait(10), "nobody was told that the worker is lost"


def test_a_worker_that_can_compute_no_more_answers_everybody(folder: Path) -> None:
    run_workers(1, _out_of_memory, folder)


def test_all_seeds_of_a_configuration_have_the_steps_of_the_first(tmp_path: Path) -> None:
    made = sweep_recipe(tmp_path, "seeds")
    made["train"] = {"epochs": 2, "precision": "fp32"}
    recipe = Recipe.model_validate(made)
    assert as_long_as(None, recipe) is recipe
    longer = as_long_as(17, recipe)
    assert (longer.train.epochs, longer.train.max_steps) == (None, 17)
    assert longer.train.precision == "fp32"
