"""What the service does, in numbers for Prometheus. The desk holds them, for it alone sees every gateway.

A gateway reports a request once, when it has ended. Label sets are bounded: what comes beyond the bounds is counted under
`other`, and sets that nobody has asked for in an hour make room, so that the newest version is not for ever `other`.
"""

from __future__ import annotations

import asyncio
from collections import Counter as Tally
from collections import OrderedDict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from tunesmith.cluster.errors import RequestError
from tunesmith.serving.drift import Finding

MOST_VALUES = 100
"""Of a label."""
MOST_SETS = 500
"""Of labels; a set is about fifty lines of /metrics."""
IDLE_S = 3600.0
"""After which a label set makes room for others."""
OTHER = "other"
NONE = "none"
MIXTURE = "mixture"
"""Stands for the base where a mixture of agents is asked; its members are requests of their own."""
LEFT = 499
"""Status of a request whose client did not wait for its end."""

_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0)
_TOKEN_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.25, 0.5, 1.0)


@dataclass(frozen=True)
class Report:
    """How a request ended, as its gateway saw it.

    Attributes:
        prompt_tokens: of all its prompts.
        completion_tokens: of all its answers, as far as they came.
        answers: that were written side by side.
        first_s: seconds from its arrival, so with the wait in the queue, to its first token; None unless it streamed.
        total_s: seconds from its arrival to its end; None when nobody knows.
        status: as HTTP has it, also of what went wrong once the answer had begun.
    """

    prompt_tokens: int = 0
    completion_tokens: int = 0
    answers: int = 1
    first_s: float | None = None
    total_s: float | None = None
    status: int = 200

    @property
    def used(self) -> int:
        """Tokens that its key is charged."""
        return self.prompt_tokens + self.completion_tokens

    @property
    def token_s(self) -> float | None:
        """Seconds between an answer's tokens after the first; None where that cannot be told."""
        later = self.completion_tokens / self.answers - 1
        if self.first_s is None or self.total_s is None or later <= 0:
            return None
        return (self.total_s - self.first_s) / later


class Labels(NamedTuple):
    """Whom a request is counted under.

    Attributes:
        adapter: its name, or the mixture's.
        version: the first 12 digits of the adapter's digest.
    """

    base: str = NONE
    adapter: str = NONE
    version: str = NONE
    tenant: str = NONE


def status_of(error: BaseException) -> int:
    """The HTTP status that an exception amounts to."""
    if isinstance(error, RequestError):
        return error.status
    return LEFT if isinstance(error, asyncio.CancelledError | GeneratorExit) else 500


def outcome(status: int) -> str:
    """`2xx`, `4xx`, `5xx`, or `left` when the client did not wait."""
    return "left" if status == LEFT else f"{status // 100}xx"


class LabelSets:
    """The label sets that there are, within bounds.

    Args:
        most_values: of each label but the base, which the configuration bounds.
        most_sets: of all labels together.
        idle_s: seconds without use after which a set makes room.
    """

    def __init__(
        self, most_values: int = MOST_VALUES, most_sets: int = MOST_SETS, idle_s: float = IDLE_S
    ) -> None:  # fmt: skip
        self._most_values, self._most_sets, self._idle_s = most_values, most_sets, idle_s
        self._used_at: OrderedDict[Labels, float] = OrderedDict()
        self._values: tuple[Tally[str], ...] = tuple(Tally() for _ in Labels._fields)

    def admit(self, labels: Labels, now: float) -> tuple[Labels, list[Labels]]:
        """The set to count under, and the sets that made room for it."""
        gone: list[Labels] = []
        if labels not in self._used_at and self._folded(labels) != labels:
            gone = self._idle(now)
        labels = self._folded(labels)
        if labels not in self._used_at:
            for tally, value in zip(self._values, labels, strict=True):
                tally[value] += 1
        self._used_at[labels] = now
        self._used_at.move_to_end(labels)
        return labels, gone

    def _folded(self, labels: Labels) -> Labels:
        if labels in self._used_at:
            return labels
        pairs = zip(self._values[1:], labels[1:], strict=True)
        folded = Labels(
            labels.base,
            *(
                one if one in tally or len(tally) < self._most_values + (OTHER in tally) else OTHER
                for tally, one in pairs
            ),
        )
        if folded in self._used_at or len(self._used_at) < self._most_sets:
            return folded
        return Labels(labels.base, OTHER, OTHER, OTHER)

    def _idle(self, now: float) -> list[Labels]:
        gone = [labels for labels, at in self._used_at.items() if now - at > self._idle_s]
        for labels in gone:
            del self._used_at[labels]
            for tally, value in zip(self._values, labels, strict=True):
                tally[value] -= 1
                if not tally[value]:
                    del tally[value]
        return gone


class Metrics:
    """The service's metrics, in a registry of their own. `now` is seconds of any clock that only goes forward."""

    def __init__(self, sets: LabelSets | None = None) -> None:
        self.registry = CollectorRegistry()
        self._sets = sets or LabelSets()
        self._requests = self._counter("requests", "Requests that have ended, by outcome.", "outcome")
        self._prompt_tokens = self._counter("prompt_tokens", "Tokens of prompts.")
        self._completion_tokens = self._counter("completion_tokens", "Tokens of answers.")
        self._loads = self._counter("adapter_loads", "Times that an engine's replica loaded a version.")
        self._evictions = self._counter("adapter_evictions", "Times that a replica let a version go.")
        self._first = self._histogram("time_to_first_token_seconds", "From a streamed request's arrival.")
        self._per_token = self._histogram(
            "time_per_output_token_seconds", "Of a streamed answer after its first token.", _TOKEN_SECONDS
        )
        self._total = self._histogram("request_seconds", "From a request's arrival to its end.")
        self._queue = self._histogram("queue_seconds", "That a request waited for its turn.")
        extra = [*Labels._fields, "feature", "against"]
        self._drift = Gauge(
            "tunesmith_drift_divergence",
            "Of the last full window, above the noise: 0 to 1.",
            extra,
            registry=self.registry,
        )
        self._alarms = self._counter("drift_alarms", "Windows that were further off than noise explains.", *extra[-2:])
        self._open = self._gauge("requests_open", "Requests that have begun and not ended.")
        self._waiting = self._gauge("requests_waiting", "Requests that wait for their turn.")

    def refused(self, labels: Labels, status: int, now: float) -> None:
        """A request has been refused at the door, or left it."""
        self._requests.labels(*self._admitted(labels, now), outcome(status)).inc()

    def began(self, labels: Labels, waited_s: float, now: float) -> None:
        """A request has begun after a wait."""
        self._queue.labels(*self._admitted(labels, now)).observe(waited_s)

    def ended(self, labels: Labels, report: Report, now: float) -> None:
        """A request that had begun has ended."""
        labels = self._admitted(labels, now)
        self._requests.labels(*labels, outcome(report.status)).inc()
        self._prompt_tokens.labels(*labels).inc(report.prompt_tokens)
        self._completion_tokens.labels(*labels).inc(report.completion_tokens)
        for histogram, seconds in (
            (self._first, report.first_s),
            (self._per_token, report.token_s),
            (self._total, report.total_s),
        ):
            if seconds is not None:
                histogram.labels(*labels).observe(seconds)

    def adapters(self, loads: Iterable[Labels], evictions: Iterable[Labels], now: float) -> None:
        """Versions that an engine's replica has loaded, and let go."""
        for counter, versions in ((self._loads, loads), (self._evictions, evictions)):
            for labels in versions:
                counter.labels(*self._admitted(labels, now)).inc()

    def drifted(self, labels: Labels, findings: Iterable[Finding], now: float) -> None:
        """A window of a version's answers has been compared."""
        labels = self._admitted(labels, now)
        for one in findings:
            self._drift.labels(*labels, one.feature, one.against).set(one.above)
            self._alarms.labels(*labels, one.feature, one.against).inc(one.is_alarm)

    def text(self, open: Mapping[str, int], waiting: Mapping[str, int]) -> str:
        """Prometheus' text format, with the requests by base that are open and that wait now."""
        for gauge, counts in ((self._open, open), (self._waiting, waiting)):
            gauge.clear()
            for base, count in counts.items():
                gauge.labels(base).set(count)
        return generate_latest(self.registry).decode()

    def _admitted(self, labels: Labels, now: float) -> Labels:
        admitted, gone = self._sets.admit(labels, now)
        for old in gone:
            for metric in self._labelled:
                metric.remove_by_labels(old._asdict())
        return admitted

    @property
    def _labelled(self) -> tuple[Counter | Histogram | Gauge, ...]:
        counters = self._requests, self._prompt_tokens, self._completion_tokens, self._loads, self._evictions
        return *counters, self._first, self._per_token, self._total, self._queue, self._drift, self._alarms

    def _counter(self, name: str, about: str, *more: str) -> Counter:
        return Counter(f"tunesmith_{name}", about, [*Labels._fields, *more], registry=self.registry)

    def _histogram(self, name: str, about: str, buckets: tuple[float, ...] = _SECONDS) -> Histogram:
        return Histogram(f"tunesmith_{name}", about, Labels._fields, registry=self.registry, buckets=buckets)

    def _gauge(self, name: str, about: str) -> Gauge:
        return Gauge(f"tunesmith_{name}", about, ["base"], registry=self.registry)
