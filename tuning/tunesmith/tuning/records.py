"""What a sweep leaves on disk, so that nothing is run twice: proposals, each trial's reports, and how it ended.

<output.dir>/<name>/
    sweep.json          what the sweep began with
    journal.jsonl       the configurations, by number
    trials/0007/        trial 7: values.json, reports.jsonl, ended.json, lineage.jsonl and, below it, its runs
    results.json, report.html, winner.yaml, winner/
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from tunesmith.cluster.errors import StorageError
from tunesmith.cluster.metrics import MetricsLog, read_metrics
from tunesmith.cluster.storage import write_atomic

State = Literal["finished", "stopped", "failed", "infeasible"]


@dataclass(frozen=True)
class Report:
    """What a trial says of itself at a rung.

    Attributes:
        report: its number, from 1.
        step: optimizer steps done.
        tokens: trained so far, all seeds together.
        seconds: of work on this trial so far; shared work counts for each that shares it.
        value: the metric, its mean over the seeds.
        std: its standard deviation over the seeds; None for one seed.
        figures: all that is reported, means over the seeds.
        at: seconds since the sweep's start, interruptions left out.
    """

    report: int
    step: int
    tokens: int
    seconds: float
    value: float
    std: float | None = None
    figures: dict[str, float] = field(default_factory=dict)
    at: float = 0.0


@dataclass(frozen=True)
class Ended:
    """How a trial ended, and why in a sentence; empty when it ran to its end."""

    state: State
    why: str = ""


@dataclass(frozen=True)
class Lineage:
    """That a trial went on from another one's weights.

    Attributes:
        source: number of that trial.
        segment: exchanges that trial had behind it.
        report: after which report.
        step: optimizer steps done then.
        values: the configuration with which it goes on: that trial's, perturbed.
        changed: old and new value of what was perturbed.
    """

    source: int
    segment: int
    report: int
    step: int
    values: dict[str, Any] = field(default_factory=dict)
    changed: dict[str, list[Any]] = field(default_factory=dict)


class TrialFolder:
    """The record of one trial. Its lines are appended by the trial, its end is written once."""

    def __init__(self, root: Path) -> None:
        self.root = root

    @property
    def number(self) -> int:
        """The trial's number."""
        return int(self.root.name)

    def begin(self, values: Mapping[str, Any]) -> None:
        """Notes the trial's configuration."""
        self.root.mkdir(parents=True, exist_ok=True)
        write_atomic(self.root / "values.json", json.dumps(dict(values)))

    def values(self) -> dict[str, Any]:
        """The configuration that it began with."""
        return json.loads((self.root / "values.json").read_text(encoding="utf-8"))

    def values_after(self, segment: int | None = None) -> dict[str, Any]:
        """The configuration after so many exchanges; None means all of them."""
        exchanges = self.lineage()[:segment]
        return exchanges[-1].values if exchanges else self.values()

    def report(self, report: Report) -> None:
        """Appends a report."""
        MetricsLog(self.root / "reports.jsonl").append(_line(report))

    def reports(self) -> list[Report]:
        """All reports, in order; of a number that was reported twice the later one. A value that was not finite is NaN."""
        lines = {line["report"]: line for line in read_metrics(self.root / "reports.jsonl")}
        return [self._report(lines[number]) for number in sorted(lines)]

    def _report(self, line: dict[str, Any]) -> Report:
        try:
            fields: dict[str, Any] = {**line, "value": math.nan if line["value"] is None else float(line["value"])}
            return Report(**fields)
        except (ValueError, TypeError, KeyError) as error:
            raise StorageError(
                f"{self.root / 'reports.jsonl'}: report {line.get('report')} cannot be read: {error}",
                "Put the file back as it was, or take the sweep's folder away and start anew.",
            ) from error

    def end(self, state: State, why: str = "") -> None:
        """Notes how it ended; a trial ends once."""
        if self.ended() is None:
            write_atomic(self.root / "ended.json", json.dumps({"state": state, "why": why}))

    def ended(self) -> Ended | None:
        """How it ended; None while it has not."""
        try:
            return Ended(**json.loads((self.root / "ended.json").read_text(encoding="utf-8")))
        except FileNotFoundError:
            return None
        except (ValueError, TypeError) as error:
            raise StorageError(f"{self.root / 'ended.json'}: cannot be read: {error}") from error

    def descend(self, lineage: Lineage) -> None:
        """Notes that it goes on from another trial."""
        MetricsLog(self.root / "lineage.jsonl").append(asdict(lineage))

    def lineage(self) -> list[Lineage]:
        """From whom it has gone on, in order."""
        return [Lineage(**line) for line in read_metrics(self.root / "lineage.jsonl")]

    def forget_after(self, report: int, segment: int) -> None:
        """Drops what a sweep that takes another course now has noted beyond this report and exchange."""
        kept = {
            "reports.jsonl": [_line(one) for one in self.reports() if one.report <= report],
            "lineage.jsonl": [asdict(one) for one in self.lineage()[:segment]],
        }
        (self.root / "ended.json").unlink(missing_ok=True)
        for name, lines in kept.items():
            write_atomic(self.root / name, "".join(json.dumps(line) + "\n" for line in lines))
        for run in self.root.glob("run-*"):
            if int(run.name.split("-")[1]) > segment:
                shutil.rmtree(run)

    def run(self, segment: int, seed: int) -> Path:
        """Folder of one training of the trial: of the stretch since its latest exchange, with one of its seeds."""
        return self.root / f"run-{segment}-{seed}"


def _line(report: Report) -> dict[str, Any]:
    """A report as JSON has it: null for what is not finite."""
    line = asdict(report)
    line["figures"] = {name: value for name, value in report.figures.items() if math.isfinite(value)}
    return {
        key: None if isinstance(value, float) and not math.isfinite(value) else value for key, value in line.items()
    }


class SweepFolder:
    """The folder of one sweep."""

    def __init__(self, root: Path) -> None:
        self.root = root

    @property
    def identity(self) -> Path:
        """What the sweep began with."""
        return self.root / "sweep.json"

    @property
    def journal(self) -> Path:
        """The configurations that were proposed, one line each."""
        return self.root / "journal.jsonl"

    @property
    def clock(self) -> Path:
        """Seconds that the sweep has taken so far, interruptions left out."""
        return self.root / "clock.json"

    @property
    def scratch(self) -> Path:
        """Ray Tune's own files: nothing in them is needed again."""
        return self.root / ".ray"

    @property
    def results(self) -> Path:
        """Everything that the report shows, as JSON."""
        return self.root / "results.json"

    @property
    def result(self) -> Path:
        """What a sweep that has come to its end answered, and what it had been asked."""
        return self.root / "result.json"

    @property
    def report(self) -> Path:
        """The report."""
        return self.root / "report.html"

    @property
    def winner_recipe(self) -> Path:
        """The best trial as a recipe of its own."""
        return self.root / "winner.yaml"

    def trial(self, number: int) -> TrialFolder:
        """The record of a trial; it need not exist."""
        return TrialFolder(self.root / "trials" / f"{number:04d}")

    def trials(self) -> list[TrialFolder]:
        """All trials that were begun, by number."""
        begun = (self.root / "trials").glob("[0-9]*/values.json")
        return sorted((TrialFolder(path.parent) for path in begun), key=lambda trial: trial.number)
