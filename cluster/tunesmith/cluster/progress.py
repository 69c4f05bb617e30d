"""Shows a run while it goes on: a bar on a terminal, a plain line now and then elsewhere."""

from __future__ import annotations

import time
from types import TracebackType
from typing import Any

from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn
from rich.text import Text

from tunesmith.cluster.console import say
from tunesmith.cluster.events import Ended, Event, Note, Step, Training, Warned

SECONDS_BETWEEN_LINES = 10.0
"""Without a terminal. The first step, every evaluation and the last step are always said."""

CLOSING = "writing the artifact and its receipts…"
"""Said after the last step: on a large model this takes a while."""


class Display:
    """Listens to a run's events and shows them on a console. Use as a context manager."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self._state = StepState()
        self._live: Live | None = None
        self._bar: Progress | None = None
        self._task: Any = None
        self._said_at = 0.0

    def __call__(self, event: Event) -> None:
        match event:
            case Note(text):
                say(self.console, text)
            case Warned(text):
                self.console.print(Text.assemble(("warning: ", "bold yellow"), text))
            case Training():
                self._state = StepState.of(event)
                self._begin(event)
            case Step(line):
                self._state.take(line)
                self._show()
            case Ended():
                self._end()

    def __enter__(self) -> Display:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._end()

    def _begin(self, training: Training) -> None:
        again = f", attempt {training.attempt}" if training.attempt > 1 else ""
        goes_on = f" goes on from step {training.from_step}" if training.from_step else " starts"
        say(self.console, f"run {training.run}{goes_on}{again}", "bold")
        if self.console.is_terminal:
            self._bar = Progress(
                SpinnerColumn(), TextColumn("{task.description}"), BarColumn(bar_width=None), expand=True
            )
            self._task = self._bar.add_task("workers start", total=None)
            self._live = Live(get_renderable=self._picture, console=self.console, refresh_per_second=8)
            self._live.start()

    def _picture(self) -> Group:
        assert self._bar is not None, "a bar is shown from _begin to _end"
        return Group(self._bar, Text(self._state.facts(), style="cyan", no_wrap=False, overflow="fold"))

    def _show(self) -> None:
        state = self._state
        is_last = state.step == state.total_steps
        if self._live is not None and self._bar is not None:
            self._bar.update(
                self._task,
                description=f"{state.headline()} · {CLOSING}" if is_last else state.headline(),
                completed=state.step,
                total=state.total_steps or None,
            )
            return
        now = time.monotonic()
        if is_last or state.evaluated or now - self._said_at >= SECONDS_BETWEEN_LINES:
            self._said_at = now
            say(self.console, f"{state.headline()} · {state.facts()}")
        if is_last:
            say(self.console, CLOSING)

    def _end(self) -> None:
        if self._live is not None:
            self._live.stop()
            self._live = None


class StepState:
    """What is known after the latest step, and how it reads."""

    def __init__(self, total_steps: int | None = None, from_step: int = 0) -> None:
        self.total_steps = total_steps
        self.step = from_step
        self.line: dict[str, Any] = {}
        self.eval_loss: float | None = None
        self.evaluated = False
        self._seconds = 0.0
        self._timed_steps = 0

    @classmethod
    def of(cls, training: Training) -> StepState:
        return cls(training.total_steps, training.from_step)

    def take(self, line: dict[str, Any]) -> None:
        """Takes in a line of metrics.jsonl."""
        self.step = line["step"]
        self.total_steps = line.get("total_steps") or self.total_steps
        self.evaluated = line.get("eval_loss") is not None
        if self.evaluated:
            self.eval_loss = line["eval_loss"]
        if "loss" in line:
            self.line = line
            self._timed_steps += 1
            # the first step of an attempt compiles and warms up; a moving mean forgets it
            weight = max(0.1, 1 / self._timed_steps)
            self._seconds += weight * (line["step_seconds"] - self._seconds)

    def headline(self) -> str:
        total = f"/{self.total_steps}" if self.total_steps else ""
        return f"step {self.step}{total}"

    def eta(self) -> float | None:
        """Seconds left, from the recent pace; None before the first step."""
        if not self.total_steps or not self._timed_steps:
            return None
        return (self.total_steps - self.step) * self._seconds

    def facts(self) -> str:
        """Loss, epoch, pace and state in one line."""
        line, parts = self.line, []
        if line.get("loss") is not None:
            parts.append(f"loss {line['loss']:.4f}")
        if self.eval_loss is not None:
            parts.append(f"held-out {self.eval_loss:.4f}")
        if line:
            parts.append(f"epoch {line['epoch'] + 1}")  # counted from 0 in the file
            parts.append(f"{line['tokens_per_second']:,.0f} tokens/s")
        if (eta := self.eta()) is not None:
            parts.append(f"{duration(eta)} left")
        if line.get("memory_gib"):
            parts.append(f"{line['memory_gib']:.1f} GiB")
        if line.get("skipped_rows"):
            parts.append(f"{line['skipped_rows']:,} rows skipped")
        if line.get("checkpoint"):
            parts.append(f"saved at {line['checkpoint']}")
        return " · ".join(parts)


def duration(seconds: float) -> str:
    """As a person says it: 42s, 3m 20s, 2h 05m."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole}s"
    if whole < 3600:
        return f"{whole // 60}m {whole % 60:02d}s"
    return f"{whole // 3600}h {whole % 3600 // 60:02d}m"
