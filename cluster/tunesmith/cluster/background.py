"""Work in a thread of its own, for a main thread that watches it and is told of signals."""

from __future__ import annotations

import threading
from collections.abc import Callable


class Background(threading.Thread):
    """Calls `work` once it is started.

    Attributes:
        failure: what `work` raised, for the thread that waits for this one to judge; None while it has not.
    """

    def __init__(self, name: str, work: Callable[[], object]) -> None:
        super().__init__(name=name, daemon=True)
        self._work = work
        self.failure: Exception | None = None

    def run(self) -> None:
        try:
            self._work()
        except Exception as failure:  # noqa: BLE001 - judged by the thread that waits for this one
            self.failure = failure
