"""An event loop whose clock jumps to the next timer when nothing is left to do: seconds of waiting cost none."""

from __future__ import annotations

import asyncio
import selectors
from collections.abc import Coroutine
from typing import Any, TypeVar

Result = TypeVar("Result")


class _Selector(selectors.DefaultSelector):
    loop: VirtualLoop

    def select(self, timeout: float | None = None):
        ready = super().select(0)
        if not ready and timeout:
            self.loop.now += timeout
        assert ready or timeout is not None, "nothing will ever happen: the test hangs"
        return ready


class VirtualLoop(asyncio.SelectorEventLoop):
    """For tests that use timers alone, and no sockets."""

    def __init__(self) -> None:
        self.now = 0.0
        selector = _Selector()
        selector.loop = self
        super().__init__(selector)

    def time(self) -> float:
        return self.now


def run(main: Coroutine[Any, Any, Result]) -> Result:
    """Runs a coroutine in virtual time, which begins at 0."""
    with asyncio.Runner(loop_factory=VirtualLoop) as runner:
        return runner.run(main)
