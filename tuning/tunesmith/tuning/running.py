"""The trials on Ray Tune: who trains them, what is told of them, and when the whole of it stops."""

from __future__ import annotations

import contextlib
import os
import shutil
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from ray import cloudpickle
from ray import tune as ray_tune
from ray.tune import Callback, PlacementGroupFactory, RunConfig, Stopper, TuneConfig, Tuner

from tunesmith.cluster.background import Background
from tunesmith.cluster.errors import TunesmithError, WorkerError
from tunesmith.cluster.recipe.tune import Tune
from tunesmith.cluster.runs import RunFolder
from tunesmith.trainers.stopping import StopSignals
from tunesmith.tuning.board import Board
from tunesmith.tuning.fused.seats import seated
from tunesmith.tuning.logical import LogicalTrial, Sweep
from tunesmith.tuning.records import Report, SweepFolder
from tunesmith.tuning.scheduling import scheduler
from tunesmith.tuning.search import Journaled
from tunesmith.tuning.space import Values, trials_of
from tunesmith.tuning.sweep import Ground
from tunesmith.tuning.trainers import Trainers

TRIAL = {"memory": 1.0}
"""What a trial's own actor, which only waits, takes of a machine: something it must be, and a share of a CPU could be the one
that is missing when the trial's workers want all of them. In bytes."""
PAUSING = ("pbt", "hyperband")
"""Schedulers that need all their trials begun, so that they can pause some."""
POLL_S = 0.2


def search(ground: Ground, who: Trainers, began: float, board: Board, signals: StopSignals) -> None:
    """Runs the trials to their ends, or until the budget is spent or a signal comes.

    Raises:
        TunesmithError: Ray Tune itself failed.
    """
    folder, tune = ground.folder, ground.tune
    shutil.rmtree(folder.scratch, ignore_errors=True)
    watch = _Watch(folder, board, tune.scheduler)
    budget = Budget(ground, began, watch)
    signals.stop_with(budget.stop)
    sweep = Sweep(folder.root, ground.recipe.model_dump(mode="json", exclude_unset=True), who.training, began)
    journaled = Journaled(tune, folder, who.why_not, board.refuse)
    limit = None if tune.scheduler in PAUSING else tune.concurrent or who.concurrent
    tuner = Tuner(
        ray_tune.with_resources(ray_tune.with_parameters(LogicalTrial, sweep=sweep), PlacementGroupFactory([TRIAL])),
        tune_config=TuneConfig(
            search_alg=journaled,
            scheduler=scheduler(tune),
            num_samples=-1,
            max_concurrent_trials=limit,
            reuse_actors=True,
        ),
        run_config=RunConfig(name="tune", storage_path=str(folder.scratch), stop=budget, callbacks=[watch], verbose=0),
    )
    work = Background("ray-tune", tuner.fit)  # off the main thread, where Ray Tune would take SIGINT for itself
    seats = contextlib.nullcontext() if who.host is None else seated(who.host)
    with _settings(tune), seats:
        work.start()
        who.wait()
        while work.is_alive():
            work.join(POLL_S)
    shutil.rmtree(folder.scratch, ignore_errors=True)
    if watch.lost:
        raise WorkerError(watch.lost, "When the cause is gone, the same command goes on.")
    if work.failure is not None:
        raise (
            work.failure
            if isinstance(work.failure, TunesmithError)
            else WorkerError(f"Ray Tune failed: {work.failure}")
        )


class _Unwritten:
    """Ray Tune writes down what it is given, to restore it from there; a sweep never is, so there is nothing to write."""

    def __getstate__(self) -> dict[str, Any]:
        return {}


class Budget(_Unwritten, Stopper):
    """Ends the sweep when one of its limits is reached, or when it is asked to."""

    def __init__(self, ground: Ground, began: float, watch: _Watch) -> None:
        self._tune, self._gpus, self._began, self._watch = ground.tune, ground.gpus, began, watch
        self._folder = ground.folder
        self._stop = False

    def stop(self) -> None:
        """Asks the sweep to end; runs of trials of their own save first."""
        self._stop = self._watch.is_ending = True
        for trial in self._folder.trials():
            if trial.ended() is None:
                for run in trial.root.glob("run-*/checkpoints"):
                    RunFolder(run.parent).request_stop()

    def __call__(self, trial_id: str, result: Mapping[str, Any]) -> bool:
        """No trial by itself."""
        return False

    def stop_all(self) -> bool:
        """Whether nothing goes on."""
        if not self._stop and (self._watch.lost or self.spent_out()):
            self.stop()
        return self._stop

    def spent_out(self) -> str:
        """Which limit is reached; empty while none is."""
        tune, hours = self._tune, (time.time() - self._began) / 3600
        limits = (
            ("max_hours", tune.max_hours, hours),
            ("max_gpu_hours", tune.max_gpu_hours, hours * self._gpus),
            ("max_tokens", tune.max_tokens, self._watch.tokens()),
        )
        return next((name for name, most, spent in limits if most is not None and spent >= most), "")


class _Watch(_Unwritten, Callback):
    """Tells the board what happens, and writes down which trials the scheduler has stopped."""

    def __init__(self, folder: SweepFolder, board: Board, scheduler: str) -> None:
        self._folder, self._board, self._scheduler = folder, board, scheduler
        self._tokens: dict[int, int] = {}
        self.is_ending = False
        self.lost = ""
        """Why nothing can be trained any more."""

    def tokens(self) -> int:
        """Trained by all trials."""
        return sum(self._tokens.values())

    def on_trial_start(self, iteration: int, trials: list[Any], trial: Any, **_: Any) -> None:
        self._board.begin(trial.config["trial"], _values(trial))

    def on_trial_result(self, iteration: int, trials: list[Any], trial: Any, result: dict[str, Any], **_: Any) -> None:
        number = trial.config["trial"]
        self._tokens[number] = result["tokens"]
        self._board.begin(number, _values(trial))
        self._board.report(number, Report(**result["report"]))

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **_: Any) -> None:
        record = self._folder.trial(trial.config["trial"])
        if record.ended() is None and not self.is_ending:
            record.end("stopped", f"by {self._scheduler} after report {trial.last_result['report']['report']}")
        self._say(record.number)

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **_: Any) -> None:
        number = trial.config["trial"]
        if self._folder.trial(number).ended() is None and not self.is_ending:  # not its own fault: nothing is recorded
            self.lost = f"trial {number} could not be trained: {_why(trial)}"
            self.is_ending = True
        self._say(number)

    def _say(self, number: int) -> None:
        ended = self._folder.trial(number).ended()
        if ended is not None:
            self._board.end(number, ended.state, ended.why)


def _why(trial: Any) -> str:
    """The last error of a trial, from the files that Ray Tune writes at once; its accessors read copies that are made later."""
    if trial.pickled_error_file is None:  # it was none that a task or an actor raised
        return Path(trial.error_file).read_text().strip().rpartition("\n")[2]
    error = cloudpickle.loads(Path(trial.pickled_error_file).read_bytes())
    cause = getattr(error, "cause", error)
    if isinstance(cause, TunesmithError):
        return cause.what
    return f"{type(cause).__name__}: {str(cause).strip().partition(chr(10))[0]}"


def _values(trial: Any) -> Values:
    return {key: value for key, value in trial.config.items() if key != "trial"}


@contextlib.contextmanager
def _settings(tune: Tune) -> Iterator[None]:
    """How Ray Tune behaves in a sweep: it writes nothing that our records have, and prints nothing."""
    wanted = {
        "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
        "TUNE_DISABLE_SIGINT_HANDLER": "1",
        "TUNE_GLOBAL_CHECKPOINT_S": "3600",
        "RAY_AIR_NEW_OUTPUT": "0",
        "TUNE_WARN_EXCESSIVE_EXPERIMENT_CHECKPOINT_SYNC_THRESHOLD_S": "0",
        "RAY_IGNORE_UNHANDLED_ERRORS": "1",  # of reports that nobody waits for any more, when the budget is spent
    }
    if tune.scheduler in PAUSING:  # all of them exist before the first report is judged
        wanted["TUNE_MAX_PENDING_TRIALS_PG"] = str(trials_of(tune))
    before = {name: os.environ.get(name) for name in wanted}
    os.environ.update(wanted)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
