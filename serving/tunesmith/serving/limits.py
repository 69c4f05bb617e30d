"""What one key may use: requests and tokens a minute, and requests at work. The clock is always passed in.

Tokens are taken when a request begins, by an estimate of its prompt and the most it may answer, and corrected when it
ends: what was not used comes back. A chat that names no `max_tokens` is taken by its prompt alone until it ends, so a burst
of those may leave a key below zero, and it waits until that is paid.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from tunesmith.cluster.errors import RequestError
from tunesmith.serving.config import Limits
from tunesmith.serving.engines.protocol import Message

MOST_IDLE = 1024
"""Meters of idle keys that are kept before those that are full again are dropped."""

_MINUTE = 60.0
_BYTES_PER_TOKEN = 3  # below the usual four of English, so that the estimate is rather too high
_TOKENS_PER_MESSAGE = 6  # a template's role and separators


def estimated_tokens(prompt: Sequence[Message] | str | Sequence[int]) -> int:
    """Tokens of a prompt, about, without a tokenizer; exact for token ids."""
    if isinstance(prompt, str):
        return 1 + len(prompt.encode()) // _BYTES_PER_TOKEN
    return sum(1 if isinstance(one, int) else _TOKENS_PER_MESSAGE + estimated_tokens(one["content"]) for one in prompt)


class Bucket:
    """A token bucket that holds one minute's worth, may go below zero, and refills evenly.

    Args:
        per_minute: refill, and the most that it holds.
    """

    def __init__(self, per_minute: float, now: float) -> None:
        self._per_minute = per_minute
        self._level, self._at = float(per_minute), now

    def level(self, now: float) -> float:
        """What may be taken."""
        # a clock that goes back fills nothing
        earned = max(0.0, now - self._at) * self._per_minute / _MINUTE
        return min(self._per_minute, self._level + earned)

    def take(self, amount: float, now: float) -> None:
        """Takes, even below zero; a negative amount gives back."""
        self._level, self._at = min(self._per_minute, self.level(now) - amount), max(now, self._at)

    def wait(self, amount: float, now: float) -> float:
        """Seconds until this much may be taken; infinite when it is more than the bucket holds."""
        if amount > self._per_minute:
            return float("inf")
        return max(0.0, amount - self.level(now)) * _MINUTE / self._per_minute


@dataclass
class Lease:
    """A request that has begun."""

    key: str
    tokens: int
    ended: bool = False


@dataclass
class _Meter:
    limits: Limits
    requests: Bucket | None
    tokens: Bucket | None
    at_work: int = 0


@dataclass
class Meters:
    """Every key's use."""

    _meters: dict[str, _Meter] = field(default_factory=dict)

    def enter(self, key: str, limits: Limits, tokens: int, now: float) -> Lease:
        """Begins a request of a key, or refuses it and takes nothing.

        Args:
            tokens: estimate of the prompt, and the most that may be answered.

        Raises:
            RequestError: 429 with the limit, the numbers and, where waiting helps, the seconds to wait.
        """
        meter = self._meter(key, limits, now)
        if limits.concurrency is not None and meter.at_work >= limits.concurrency:
            raise _limited(f"this key has {meter.at_work} requests at work, and may have {limits.concurrency}", 1.0)
        _check(meter.requests, 1, limits.requests_per_minute, "requests", now)
        _check(meter.tokens, tokens, limits.tokens_per_minute, "tokens", now)
        for bucket, amount in ((meter.requests, 1), (meter.tokens, tokens)):
            if bucket is not None:
                bucket.take(amount, now)
        meter.at_work += 1
        return Lease(key, tokens)

    def leave(self, lease: Lease, used: int, now: float) -> None:
        """Ends a request; a second time changes nothing.

        Args:
            used: tokens of its prompt and answers, as far as they came.
        """
        if lease.ended:
            return
        lease.ended = True
        meter = self._meters[lease.key]
        meter.at_work -= 1
        if meter.tokens is not None:
            meter.tokens.take(used - lease.tokens, now)

    def at_work(self, key: str) -> int:
        """Requests of a key that have begun and not ended."""
        meter = self._meters.get(key)
        return meter.at_work if meter else 0

    def _meter(self, key: str, limits: Limits, now: float) -> _Meter:
        meter = self._meters.get(key)
        if meter is None:
            if len(self._meters) >= MOST_IDLE:
                self._drop_idle(now)
            meter = self._meters[key] = _Meter(
                limits, _bucket(limits.requests_per_minute, now), _bucket(limits.tokens_per_minute, now)
            )
        elif meter.limits != limits:  # changed by an operator: what is at work stays counted
            meter.limits = limits
            meter.requests = _bucket(limits.requests_per_minute, now)
            meter.tokens = _bucket(limits.tokens_per_minute, now)
        return meter

    def _drop_idle(self, now: float) -> None:
        """A full bucket with nothing at work is what a new one would be."""
        self._meters = {
            key: meter
            for key, meter in self._meters.items()
            if meter.at_work
            or not _full(meter.requests, meter.limits.requests_per_minute, now)
            or not _full(meter.tokens, meter.limits.tokens_per_minute, now)
        }


def _bucket(per_minute: int | None, now: float) -> Bucket | None:
    return None if per_minute is None else Bucket(per_minute, now)


def _full(bucket: Bucket | None, per_minute: int | None, now: float) -> bool:
    return bucket is None or per_minute is None or bucket.level(now) >= per_minute


def _check(bucket: Bucket | None, amount: int, per_minute: int | None, what: str, now: float) -> None:
    if bucket is None or (wait := bucket.wait(amount, now)) < 1e-6:  # what rounding leaves
        return
    if wait == float("inf"):
        raise RequestError(
            f"this request may take {amount} {what}, and this key has {per_minute} a minute: ask for fewer",
            status=429,
            code="request_too_large",
        )
    left = max(0, int(bucket.level(now)))
    raise _limited(f"{amount} {what} wanted, {left} of {per_minute} a minute left; come again in {wait:.1f} s", wait)


def _limited(what: str, retry_after: float) -> RequestError:
    return RequestError(what, status=429, code="rate_limit_exceeded", retry_after=retry_after)
