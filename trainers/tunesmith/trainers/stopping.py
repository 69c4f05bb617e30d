"""SIGTERM and SIGINT: the first asks the workers to save and stop, the second stops at once."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable
from types import FrameType, TracebackType

from tunesmith.cluster.errors import InterruptedRunError, StoppedAtOnceError, StoppedError, TunesmithError
from tunesmith.cluster.events import Listener, Note

SIGNALS = (signal.SIGTERM, signal.SIGINT)

ONE_STOP_S = 1.0
"""Signals this close together are one wish to stop: `timeout` signals its command, and then its group once more."""


class StopSignals:
    """Catches both signals while it is entered. Outside the main thread it catches nothing, as Python has it."""

    def __init__(self, run: str) -> None:
        self.run = run
        self.received: signal.Signals | None = None
        self._received_at = 0.0
        self._acknowledged = False
        self._request: Callable[[], None] | None = None
        self._before: dict[signal.Signals, object] = {}

    def stop_with(self, request: Callable[[], None]) -> None:
        """From now on a first signal calls `request` and lets the run end by itself. Until now it raised at once.

        Raises:
            StoppedError, InterruptedRunError: one came before, and what it raised was caught by whatever it broke into.
        """
        self._request = request
        if self.received is not None:
            raise self.error("training had not begun")

    def acknowledge(self, on_event: Listener) -> None:
        """Says once what a received signal brings about. Not in the handler, which may have broken into a print."""
        if self.received is not None and not self._acknowledged:
            self._acknowledged = True
            on_event(Note("stopping: the workers save after this step; once more to stop at once without saving"))

    def error(self, what: str) -> TunesmithError:
        """The error that the received signal ends the command with."""
        interrupted = self.received == signal.SIGINT
        kind = InterruptedRunError if interrupted else StoppedError
        how = "interrupted" if interrupted else "stopped"
        return kind(f"run {self.run} was {how}: {what}", "The same command goes on from there.")

    def translated(self, error: TunesmithError) -> TunesmithError:
        """What a worker raised, as the user caused it: a stop asked for by SIGINT is an interruption."""
        if isinstance(error, StoppedError) and self.received == signal.SIGINT:
            return InterruptedRunError(error.what, error.fix)
        return error

    def __enter__(self) -> StopSignals:
        if threading.current_thread() is threading.main_thread():
            self._before.update({number: signal.signal(number, self._handle) for number in SIGNALS})
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)  # type: ignore[arg-type]
        self._before.clear()

    def _handle(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        first = self.received is None
        if first:
            self.received, self._received_at = signal.Signals(number), now
        elif now - self._received_at < ONE_STOP_S:
            return
        if self._request is None:
            raise self.error("training had not begun")
        if not first:
            self.received = signal.Signals(number)
            kind = InterruptedRunError if number == signal.SIGINT else StoppedAtOnceError
            raise kind(
                f"run {self.run} was stopped at once, at the second signal, without saving; what was saved before stays",
                "The same command goes on from there.",
            )
        self._request()
