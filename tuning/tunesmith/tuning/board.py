"""How a sweep looks while it runs: a live table on a terminal, a line an event elsewhere."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any

from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from tunesmith.cluster.console import say
from tunesmith.cluster.progress import duration
from tunesmith.cluster.recipe.tune import Tune
from tunesmith.tuning.records import Report

MOST_ROWS = 24
"""Trials that the live table shows: those at work, then the best."""


@dataclass
class Line:
    """What is known of a trial.

    Attributes:
        state: `training`, `waiting`, or how it ended.
        rate: tokens a second between its last two reports.
    """

    number: int
    values: dict[str, Any]
    state: str = "training"
    reports: list[Report] = field(default_factory=list)
    why: str = ""
    rate: float = 0.0

    @property
    def value(self) -> float | None:
        """The metric at the last report."""
        return self.reports[-1].value if self.reports else None

    @property
    def is_finite(self) -> bool:
        """Whether it has a value that can be compared."""
        return self.value is not None and math.isfinite(self.value)


class Board:
    """Keeps what is known of all trials and shows it. Use as a context manager."""

    def __init__(self, console: Console, tune: Tune, trials: int) -> None:
        self.console, self.tune, self.trials = console, tune, trials
        self.lines: dict[int, Line] = {}
        self._live: Live | None = None

    def __enter__(self) -> Board:
        if self.console.is_terminal:
            self._live = Live(get_renderable=self.picture, console=self.console, refresh_per_second=4)
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._live is not None:
            self._live.stop()
            self._live = None

    def begin(self, number: int, values: Mapping[str, Any]) -> None:
        """A trial was launched."""
        line = self.lines.setdefault(number, Line(number, dict(values)))
        line.state, line.values = "training", dict(values)

    def refuse(self, number: int, values: Mapping[str, Any], why: str) -> None:
        """A trial cannot be tried, and is not launched."""
        self.begin(number, values)
        self.end(number, "infeasible", why)

    def report(self, number: int, report: Report) -> None:
        """A trial has reported."""
        line = self.lines[number]
        if line.reports and report.report <= line.reports[-1].report:
            return
        before = line.reports[-1] if line.reports else Report(0, 0, 0, 0.0, 0.0)
        took = report.seconds - before.seconds
        line.rate = (report.tokens - before.tokens) / took if took > 0 else 0.0
        line.reports.append(report)
        if self._live is None:
            say(self.console, f"trial {number} · {self._facts(line)} · {spelled(line.values)}")

    def end(self, number: int, state: str, why: str = "") -> None:
        """A trial has ended."""
        line = self.lines[number]
        if line.state == state:
            return
        line.state, line.why = state, why
        if self._live is None:
            say(self.console, f"trial {number} {state}{f': {why}' if why else ''}")

    def best(self) -> Line | None:
        """The trial with the best last report of those that are not failed."""
        return best_of(list(self.lines.values()), self.tune.mode)

    def eta(self) -> float | None:
        """Seconds until every trial would have all its reports, at the sweep's pace so far; None before the first report."""
        done = sum(len(line.reports) if line.state == "training" else self.tune.reports for line in self.lines.values())
        reports = [report for line in self.lines.values() for report in line.reports]
        if not reports:
            return None
        left = self.trials * self.tune.reports - done
        return max(0.0, left * max(report.at for report in reports) / len(reports))

    def picture(self) -> Group:
        """The table."""
        table = Table(box=None, pad_edge=False, header_style="bold")
        for title, side in (("trial", "right"), ("state", "left"), ("rung", "right"), (self.tune.metric, "right")):
            table.add_column(title, justify=side)  # type: ignore[arg-type]
        table.add_column("tokens/s", justify="right")
        table.add_column("values", overflow="fold")
        best = self.best()
        for line in self._shown():
            style = "bold green" if best is line else "dim" if line.state not in ("training", "finished") else ""
            value = "" if line.value is None else f"{line.value:.4f}"
            rung = f"{len(line.reports)}/{self.tune.reports}"
            rate = f"{line.rate:,.0f}" if line.state == "training" and line.rate else ""
            table.add_row(str(line.number), line.state, rung, value, rate, spelled(line.values), style=style)
        return Group(table, Text(self.summary(), style="cyan"))

    def summary(self) -> str:
        """Where the sweep stands, in one line."""
        ended = sum(line.state != "training" for line in self.lines.values())
        parts = [f"{ended} of {self.trials} trials ended"]
        best = self.best()
        if best is not None:
            parts.append(f"best trial {best.number} with {self.tune.metric} {best.value:.4f}")
        if (eta := self.eta()) is not None:
            parts.append(f"at most {duration(eta)} left")
        return " · ".join(parts)

    def _facts(self, line: Line) -> str:
        report = line.reports[-1]
        spread = f" ± {report.std:.4f}" if report.std is not None else ""
        rate = f" · {line.rate:,.0f} tokens/s" if line.rate else ""
        return f"report {report.report}/{self.tune.reports} · {self.tune.metric} {report.value:.4f}{spread}{rate}"

    def _shown(self) -> list[Line]:
        sign = 1 if self.tune.mode == "min" else -1

        def order(line: Line) -> tuple[bool, float]:
            return line.state != "training", sign * line.value if line.is_finite else math.inf  # type: ignore[operator]

        chosen = sorted(self.lines.values(), key=order)[:MOST_ROWS]
        return sorted(chosen, key=lambda line: line.number)


def best_of(lines: list[Line], mode: str) -> Line | None:
    """The line with the best value, of equals the first; failed ones and values that are not finite do not count."""
    able = [line for line in lines if line.is_finite and line.state not in ("failed", "infeasible")]
    sign = 1 if mode == "min" else -1
    return min(able, key=lambda line: (sign * line.value, line.number), default=None)  # type: ignore[operator]


def spelled(values: Mapping[str, Any]) -> str:
    """A configuration in one line, keys by their last part."""
    return " ".join(f"{key.rpartition('.')[2]}={_short(value)}" for key, value in values.items())


def _short(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)
