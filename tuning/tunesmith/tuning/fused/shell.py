"""The actor around a shared worker. It can be pickled and restarted without torch in the process that makes it."""

from __future__ import annotations

import os
import threading
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from tunesmith.cluster.imports import uncollected

if TYPE_CHECKING:
    from tunesmith.tuning.fused.worker import Worker


@dataclass(frozen=True)
class Ready:
    """What a worker says once it has its base.

    Attributes:
        baseline: held-out loss of the base alone; None without held-out rows.
        largest: rank that fits.
        too_large: why ranks above `largest` cannot be trained here; empty when all can.
    """

    baseline: float | None
    largest: int
    too_large: str = ""


def _die() -> None:
    """Ends the process, which Ray then starts anew: the state of every trial's last report is on disk."""
    time.sleep(1)  # for callers to hear why
    os._exit(1)


class Shell:
    """A worker that loads itself when it is first asked for something, and again after a restart.

    Args:
        settings: fields of `tunesmith.tuning.fused.worker.Settings`.
    """

    def __init__(self, settings: dict[str, Any]) -> None:
        self._settings = settings
        self._lock = threading.Lock()
        self._worker: Worker | None = None
        self._ready: Ready | None = None

    def start(self) -> Ready:
        """Loads the base, once."""
        with self._lock:
            if self._ready is None:
                with uncollected():
                    from tunesmith.tuning.fused.worker import Settings, Worker

                self._worker = Worker(Settings(**self._settings), _die)
                self._ready = self._worker.start()
            return self._ready

    def open(self, *arguments: Any) -> int:
        """See `Worker.open`."""
        self.start()
        assert self._worker is not None
        return self._worker.open(*arguments)

    def next(self, key: str) -> dict[str, Any]:
        """See `Worker.next`."""
        assert self._worker is not None, "the worker was restarted: open the trial again"
        return self._worker.next(key)

    def export(self, *arguments: Any) -> str:
        """See `Worker.export`."""
        self.start()
        assert self._worker is not None
        return self._worker.export(*arguments)

    def close(self, key: str) -> None:
        """See `Worker.close`."""
        if self._worker is not None:
            self._worker.close(key)

    def load(self) -> int:
        """See `Worker.load`."""
        return 0 if self._worker is None else self._worker.load()
