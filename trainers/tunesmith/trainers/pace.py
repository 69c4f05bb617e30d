"""Which worker is slower than the others: all wait for the slowest in every step.

What is timed is the forward pass, in which workers do not wait for each other; under ZeRO-3 they do, and a slow one slows them all
alike: there nobody is named.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch

WINDOW = 20
"""Steps over which a worker's pace is taken, as the median: single steps vary."""
SLOW = 1.3
"""Times the median of all workers that make one slow."""


class Pace:
    """Seconds of forward pass a token, of one worker, step after step."""

    def __init__(self, device: torch.device) -> None:
        self._on_gpu = device.type == "cuda"
        self._spans: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []
        self._seconds, self._tokens = 0.0, 0

    @contextmanager
    def forward(self, tokens: int) -> Iterator[None]:
        """Times a forward pass over so many tokens."""
        self._tokens += tokens
        if self._on_gpu:  # events, not the clock: the processor is far ahead of the device
            first, last = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            first.record()
            yield
            last.record()
            self._spans.append((first, last))
        else:
            began = time.perf_counter()
            yield
            self._seconds += time.perf_counter() - began

    def take(self) -> float:
        """Seconds a token since it was last taken; the device has done its work by then."""
        seconds = self._seconds + sum(first.elapsed_time(last) / 1e3 for first, last in self._spans)
        pace = seconds / max(1, self._tokens)
        self._spans, self._seconds, self._tokens = [], 0.0, 0
        return pace


class Paces:
    """The paces of all workers, as one of them sees them."""

    def __init__(self) -> None:
        self._window: list[Sequence[float]] = []
        self._named: set[int] = set()

    def note(self, paces: Sequence[float], tell: Callable[[str], None]) -> None:
        """Takes in a step's paces, by rank, and tells of a slow worker, once of each and at the end of a window."""
        self._window.append(paces)
        if len(self._window) < WINDOW:
            return
        of_ranks = [statistics.median(column) for column in zip(*self._window, strict=True)]
        self._window = []
        slowest = max(range(len(of_ranks)), key=of_ranks.__getitem__)
        usual = statistics.median_low(of_ranks)
        if slowest in self._named or of_ranks[slowest] < SLOW * usual:
            return
        self._named.add(slowest)
        tell(
            f"rank {slowest} takes {of_ranks[slowest] / usual:.1f} times as long for a token as is usual among the workers "
            f"({of_ranks[slowest] * 1e6:.1f} against {usual * 1e6:.1f} µs, forward), and all wait for it"
        )
