"""A trial as Ray Tune sees it: a light actor that asks those who train for its next report.

What was reported before an interruption is reported again from the trial's record, at once and without training, so that
searcher and scheduler see the same history; what comes after it is trained from the state of the last report.
"""

from __future__ import annotations

import json
import statistics
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ray.tune import Trainable

from tunesmith.cluster.errors import CheckpointError, NonFiniteError, TunesmithError, UsageError, WorkerError
from tunesmith.cluster.recipe.schema import Recipe
from tunesmith.tuning.members import Members, Progress, Training
from tunesmith.tuning.records import Lineage, Report, SweepFolder, TrialFolder
from tunesmith.tuning.space import recipe_of

POINTER = "pointer.json"


@dataclass(frozen=True)
class Place:
    """Where a trial stands: its checkpoint, as Ray Tune passes it around.

    Attributes:
        trial: number of the trial.
        segment: exchanges of weights that it has behind it.
        report: its last report.
        step: optimizer steps done then.
    """

    trial: int
    segment: int = 0
    report: int = 0
    step: int = 0


@dataclass(frozen=True)
class Sweep:
    """What every trial of a sweep is given.

    Attributes:
        root: the sweep's folder.
        recipe: the keys that the user wrote.
        training: how trials are trained.
        began: `time.time()` at the sweep's start, less what earlier starts of it have taken.
    """

    root: Path
    recipe: dict[str, Any]
    training: Training
    began: float


class LogicalTrial(Trainable):
    """One trial: `step` brings its next report."""

    def setup(self, config: dict[str, Any], sweep: Sweep) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Finds out what the trial has done already."""
        self.sweep = sweep
        self.recipe = Recipe.model_validate(sweep.recipe)
        assert self.recipe.tune is not None
        self.tune = self.recipe.tune
        self.members: Members | None = None
        self._begin(config)

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        """Becomes another trial."""
        self.cleanup()
        self._begin(new_config)
        return True

    def step(self) -> dict[str, Any]:
        """The next report, from the record or from training.

        Raises:
            TunesmithError: the trial cannot go on; its record says so.
        """
        self._forget_another_course()
        at = self.place.report
        if at < len(self.reports):
            report = self.reports[at]
        elif self.ended is not None:
            raise TunesmithError(self.ended.why or f"trial {self.place.trial} ended")
        else:
            report = self._train()
        self.place = Place(self.place.trial, self.place.segment, report.report, report.step)
        ended = self.record.ended()
        is_last = ended is not None and ended.state in ("finished", "stopped") and report.report >= len(self.reports)
        return {
            self.tune.metric: report.value,
            "tokens": report.tokens,
            "report": asdict(report),
            "done": is_last,
        }

    def save_checkpoint(self, checkpoint_dir: str) -> None:
        """Writes where the trial stands; its state was committed with its last report."""
        (Path(checkpoint_dir) / POINTER).write_text(json.dumps(asdict(self.place)))

    def load_checkpoint(self, checkpoint: Any) -> None:
        """Goes on from a place: its own, or another trial's, whose weights it takes."""
        place = Place(**json.loads((Path(checkpoint) / POINTER).read_text()))
        if place.trial == self.place.trial:
            self.place = place
            return
        donor = SweepFolder(self.sweep.root).trial(place.trial).values_after(place.segment)
        changed = {key: [donor.get(key), new] for key, new in self.values.items() if donor.get(key) != new}
        exchange = Lineage(place.trial, place.segment, place.report, place.step, self.values, changed)
        behind = sum(one.report < place.report for one in self.record.lineage())
        if self.record.lineage()[behind : behind + 1] != [exchange]:  # else it was made before an interruption
            self.record.forget_after(place.report, behind)
            self.record.descend(exchange)
            self.reports, self.ended = self.record.reports(), None
        self.place = Place(self.place.trial, behind + 1, place.report, place.step)

    def cleanup(self) -> None:
        """Leaves the place where it is trained."""
        if self.members is not None:
            self.members.close()
            self.members = None

    def _forget_another_course(self) -> None:
        """Drops reports that were made after an exchange of weights which this time was not made."""
        ahead = self.record.lineage()[self.place.segment :]
        if ahead and ahead[0].report <= self.place.report:
            self.record.forget_after(self.place.report, self.place.segment)
            self.reports, self.ended = self.record.reports(), self.record.ended()

    def _begin(self, config: dict[str, Any]) -> None:
        self.values = {key: value for key, value in config.items() if key != "trial"}
        self.record: TrialFolder = SweepFolder(self.sweep.root).trial(config["trial"])
        self.reports, self.ended = self.record.reports(), self.record.ended()
        self.place = Place(config["trial"])

    def _train(self) -> Report:
        began = time.monotonic()
        try:
            progress = self._progress()
        except (NonFiniteError, UsageError, CheckpointError) as error:  # others may be mended: the same command goes on
            self.record.end("failed", error.what)
            raise
        before = self.reports[-1] if self.reports else None
        values = [one.figures[self.tune.metric] for one in progress]
        report = Report(
            report=self.place.report + 1,
            step=progress[0].step,
            tokens=(before.tokens if before else 0) + sum(one.tokens for one in progress),
            seconds=(before.seconds if before else 0.0) + time.monotonic() - began,
            value=statistics.fmean(values),
            std=statistics.stdev(values) if len(values) > 1 else None,
            figures={
                name: statistics.fmean(one.figures[name] for one in progress)
                for name in progress[0].figures
                if all(name in one.figures for one in progress)
            },
            at=time.time() - self.sweep.began,
        )
        self.record.report(report)
        self.reports.append(report)
        if progress[0].step >= progress[0].total_steps:
            self.record.end("finished")
        return report

    def _progress(self) -> list[Progress]:
        """The members' next report, begun anew from the last one when they are lost."""
        for left in reversed(range(self.recipe.train.max_failures + 1)):
            try:
                if self.members is None:
                    self.members = self._open()
                return self.members.next()
            except WorkerError:
                self.cleanup()
                if not left:
                    raise
        raise AssertionError("the last try returns or raises")

    def _open(self) -> Members:
        first = self.values.get("train.seed", self.recipe.train.seed)
        offsets = range(self.tune.seeds)
        recipes = [recipe_of(self.recipe, self.values, seed=first + offset) for offset in offsets]
        runs = [self.record.run(self.place.segment, offset) for offset in offsets]
        sources = None
        if self.place.segment:
            exchange = self.record.lineage()[self.place.segment - 1]
            donor = SweepFolder(self.sweep.root).trial(exchange.source)
            sources = [donor.run(exchange.segment, offset) for offset in offsets]
        members = self.sweep.training.members(f"{self.place.trial}-{self.place.segment}")
        self.members = members  # before it is open: what was begun of it is closed in any case
        members.open(recipes, runs, self.place.step, sources)
        return members
