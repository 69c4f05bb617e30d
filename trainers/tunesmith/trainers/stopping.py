"""SIGTERM and SIGINT: the first asks the workers to save and stop, the second stops at once."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable
from types import FrameType, TracebackType

from tunesmith.cluster.errors import InterruptedRunError, StoppedError, TunesmithError

SIGNALS = (signal.SIGTERM, signal.SIGINT)


class StopSignals:
    """Catches both signals while it is entered. Outside the main thread it catches nothing, as Python has it."""

    def __init__(self, run: str) -> None:
        self.run = run
        self.received: signal.Signals | None = None
        self._request: Callable[[], None] | None = None
        self._before: dict[signal.Signals, object] = {}

    def stop_with(self, request: Callable[[], None]) -> None:
        """From now on a first signal calls `request` and lets the run end by itself. Until now it raised at once."""
        self._request = request
        self._install()  # importing Ray may have put its own handlers there

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
        self._install()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)  # type: ignore[arg-type]
        self._before.clear()

    def _install(self) -> None:
        if threading.current_thread() is not threading.main_thread():
            return
        for number in SIGNALS:
            before = signal.signal(number, self._handle)
            self._before.setdefault(number, before)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        first = self.received is None
        if first:
            self.received = signal.Signals(number)
        if self._request is None:
            raise self.error("training had not begun")
        if not first:
            raise self.error("at once, at the second signal; what was saved before stays")
        self._request()
