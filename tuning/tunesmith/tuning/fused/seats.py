"""Logical trials as seats of one process: they only wait for their worker, and need no process each.

Ray Tune 2.60 makes an actor for every trial. On a small machine eight of them import Ray Tune for longer than eight small
trials train. Here an actor class is put in their place whose every actor is a seat of one host: what Ray Tune calls on the
seat, the host calls on that trial.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import count
from typing import Any

import ray
from ray.actor import ActorClass

MOST_SEATS = 512


class Host:
    """The actor that holds the trials."""

    def __init__(self) -> None:
        import tunesmith.tuning.logical  # noqa: F401 - imported while the shared workers load

        self._trials: dict[int, Any] = {}
        self._locks: dict[int, threading.Lock] = {}

    def sit(self, seat: int, trainable: Any, settings: dict[str, Any]) -> None:
        """Makes a trial."""
        self._locks[seat] = threading.Lock()
        self._trials[seat] = trainable(**settings)

    def call(self, seat: int, method: str, *arguments: Any, **named: Any) -> Any:
        """Calls a method of a trial; one at a time for each."""
        if method == "stop":  # what it waits for in another call ends at once
            self._trials[seat].cleanup()
        with self._locks[seat]:
            return getattr(self._trials[seat], method)(*arguments, **named)

    def leave(self, seat: int) -> None:
        """Forgets a trial."""
        self._trials.pop(seat, None)
        self._locks.pop(seat, None)


@contextmanager
def seated(host: Any) -> Iterator[None]:
    """Within it the trials of Ray Tune sit in the host."""
    from ray.tune.execution.class_cache import _ActorClassCache

    before = _ActorClassCache.get
    kill = ray.kill
    _ActorClassCache.get = lambda cache, trainable: _SeatClass(host, trainable)  # type: ignore[method-assign]
    ray.kill = lambda actor, **named: actor.leave() if isinstance(actor, _Seat) else kill(actor, **named)  # pyright: ignore[reportPrivateImportUsage]
    try:
        yield
    finally:
        _ActorClassCache.get, ray.kill = before, kill  # type: ignore[method-assign]


class _SeatClass(ActorClass):
    """Stands where Ray Tune expects an actor's class."""

    _numbers = count()

    def __init__(self, host: Any, trainable: Any) -> None:
        self._host, self._trainable = host, ray.put(trainable)

    def options(self, **_: Any) -> _SeatClass:
        """A seat needs nothing of its own."""
        return self

    def remote(self, **settings: Any) -> Any:
        """A new seat, on which the trial is made."""
        number = next(self._numbers)
        return _Seat(self._host, number, self._host.sit.remote(number, self._trainable, settings))


class _Seat:
    """Stands where Ray Tune expects an actor."""

    def __init__(self, host: Any, number: int, made: Any) -> None:
        self._host, self._number, self._made = host, number, made

    def leave(self) -> Any:
        """Gives the seat up."""
        return self._host.leave.remote(self._number)

    def __getattr__(self, method: str) -> Any:
        if method == "__ray_ready__":
            return _Call(lambda: self._made)
        if method == "__ray_terminate__":
            return _Call(self.leave)
        return _Call(lambda *arguments, **named: self._host.call.remote(self._number, method, *arguments, **named))


class _Call:
    """Stands where Ray Tune expects an actor's method."""

    def __init__(self, remote: Any) -> None:
        self.remote = remote

    def options(self, **_: Any) -> _Call:
        """Nothing to set."""
        return self
