"""Storage that is full or fails for a while: the same write again, at growing intervals, within a bound."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import TypeVar

from tunesmith.cluster.errors import StorageError

T = TypeVar("T")

LONGEST_PAUSE_S = 30.0
STOP_GRACE_S = 600
"""How long a stopped job may take to save, unless told otherwise."""


def pauses(patience_s: float) -> Iterator[float]:
    """Seconds to wait between tries: 1, 2, 4 and so on up to half a minute, `patience_s` in all."""
    pause, left = 1.0, patience_s
    while left > 0:
        yield min(pause, left)
        left -= pause
        pause = min(2 * pause, LONGEST_PAUSE_S)


def patiently(write: Callable[[], T], patience_s: float, tell: Callable[[str], None]) -> T:
    """What `write` returns; tried again after each StorageError until the pauses are spent.

    When it is to be tried again follows from the number of the try alone, so ranks that fail together try together.

    Args:
        tell: hears of each failure that is not the last.

    Raises:
        StorageError: that of the last try.
    """
    for pause in pauses(patience_s):
        try:
            return write()
        except StorageError as error:
            tell(f"storage fails: {error.what}; tried again in {pause:g} s")
        time.sleep(pause)
    return write()
