"""Scales of the report's charts: where a value lies on an axis, and which values are written beside it."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from tunesmith.tuning.wording import compact, duration, setting

_TIME_STEPS = (1, 2, 5, 10, 15, 30, 60, 120, 300, 600, 900, 1800, 3600, 7200, 14400, 21600, 43200, 86400)  # seconds
_APART = 0.07  # of an axis: ticks closer than this would print over one another


@dataclass(frozen=True)
class Axis:
    """One scale. Either a range of numbers, or categories, each in the middle of its equal part."""

    low: float = 0.0
    high: float = 1.0
    log: bool = False
    categories: tuple[Any, ...] = ()

    def share(self, value: Any) -> float:
        """Where a value lies: 0 at the low end, 1 at the high; what is beyond an end is drawn at that end."""
        if self.categories:
            return (self.categories.index(value) + 0.5) / len(self.categories)
        if self.high <= self.low:
            return 0.5
        if self.log:
            share = math.log(max(value, self.low) / self.low) / math.log(self.high / self.low)
        else:
            share = (value - self.low) / (self.high - self.low)
        return min(1.0, max(0.0, share))

    def holds(self, value: float) -> bool:
        """Whether a number lies within the axis."""
        return self.low <= value <= self.high

    def ticks(self) -> list[tuple[Any, str]]:
        """Values and their texts: every category (every second of many), or both ends and round values between."""
        if self.categories:
            step = math.ceil(len(self.categories) / 14)
            return [(value, setting(value)) for value in self.categories[::step]]
        ends = [self.low] if self.high <= self.low else [self.low, self.high]
        between = _decades(self.low, self.high) if self.log else rounds(self.low, self.high, 4)
        taken = list(ends)
        for value in between:
            if all(abs(self.share(value) - self.share(other)) >= _APART for other in taken):
                taken.append(value)
        return [(value, setting(value)) for value in sorted(taken)]


def of_space(entry: dict[str, Any], observed: Sequence[Any]) -> Axis:
    """The axis of one key of a space.

    Args:
        entry: the key's part of the space: kind, and low and high or values.
        observed: the trials' values; some may lie outside, because population-based training moves them.
    """
    if "values" in entry:
        values = list(entry["values"])
        for value in observed:
            if value not in values:
                values.append(value)
        return Axis(categories=tuple(values))
    numbers = [entry["low"], entry["high"], *observed]
    return Axis(low=min(numbers), high=max(numbers), log=entry["kind"].startswith("log") and min(numbers) > 0)


def of_metric(values: Sequence[float], mode: str, room: float = 0.0, sound: Sequence[float] = ()) -> Axis:
    """A range that ends in round numbers and holds the values, but for those far worse than most.

    A trial that diverged would press all others into one line. The axis therefore leaves out what is more than three
    times as far from the best value as the 75th percentile is, or as the median of `sound` where that is farther.

    Args:
        values: finite; at least one.
        mode: "min" or "max".
        room: to leave free beyond the best value, as a share of the range.
        sound: values that are bad without being wrong, such as every trial's first.
    """
    sign = 1.0 if mode == "min" else -1.0
    badness = sorted(sign * value for value in values)
    usual = badness[int(0.75 * (len(badness) - 1))]
    if sound:
        usual = max(usual, sign * statistics.median(sound))
    limit = usual + 2 * (usual - badness[0]) if usual > badness[0] else math.inf
    worst = max(value for value in badness if value <= limit)
    low, high = sorted((sign * (badness[0] - room * (worst - badness[0])), sign * worst))
    if high == low:
        low, high = low - (abs(low) or 1) * 0.05, high + (abs(high) or 1) * 0.05
    step = _round_step((high - low) / 8)
    return Axis(low=_tidy(math.floor(low / step + 1e-9) * step), high=_tidy(math.ceil(high / step - 1e-9) * step))


def rounds(low: float, high: float, count: int) -> list[float]:
    """About `count` round numbers from low to high, both included where they are round."""
    if high <= low:
        return [low]
    step = _round_step((high - low) / count)
    return [_tidy(n * step) for n in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)]


def metric_ticks(axis: Axis) -> list[tuple[float, str]]:
    """Round values of a metric, all with as many decimals as their distance needs."""
    values = rounds(axis.low, axis.high, 5)
    step = abs(values[1] - values[0]) if len(values) > 1 else 1.0
    if max(map(abs, values)) >= 1e5 or step < 1e-4:
        return [(value, setting(float(value))) for value in values]
    decimals = next(n for n in range(6) if n == 5 or abs(step * 10**n - round(step * 10**n)) < 1e-6)
    return [(value, f"{value:,.{decimals}f}") for value in values]


def count_ticks(high: float) -> list[tuple[float, str]]:
    """Round counts from zero: 0, 20k, 40k."""
    return [(value, compact(value)) for value in rounds(0, high, 4)]


def time_ticks(seconds: float) -> list[tuple[float, str]]:
    """Round times from zero: 0, 1m, 2m."""
    if seconds < 4:
        return [(value, f"{value:g}s") for value in rounds(0, seconds, 4)]
    step = next((step for step in _TIME_STEPS if seconds / step <= 5), 86400 * _round_step(seconds / 86400 / 4))
    return [(n * step, duration(n * step) if n else "0") for n in range(int(seconds / step + 1e-9) + 1)]


def _decades(low: float, high: float) -> list[float]:
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    tens = [float(f"1e{power}") for power in powers if low <= float(f"1e{power}") <= high]
    if sum(low < ten < high for ten in tens) >= 2:
        return tens
    more = [float(f"{digit}e{power}") for power in powers for digit in (2, 5)]
    return tens + [value for value in more if low < value < high]


def _round_step(rough: float) -> float:
    """The smallest of 1, 2, 2.5, 5 and 10 times a power of ten that is not below `rough`."""
    power = 10.0 ** math.floor(math.log10(rough))
    return next(factor * power for factor in (1, 2, 2.5, 5, 10) if factor * power >= rough * (1 - 1e-9))


def _tidy(value: float) -> float:
    return float(f"{value:.12g}")
