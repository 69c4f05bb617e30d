"""Collective steps after which every rank knows the same, and raises the same error if one could not do its part.

An exception on one rank alone leaves the others waiting in their next collective until its timeout.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from datetime import timedelta
from typing import TypeVar

import torch.distributed as dist

from tunesmith.cluster.errors import StorageError, TunesmithError

T = TypeVar("T")

LONGEST = timedelta(days=7)
_LONG_WORKS = itertools.count()


def gather(value: T) -> list[T]:
    """Every rank's value, in order of rank, on every rank. Values must pickle."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return [value]
    values: list[T | None] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values  # pyright: ignore[reportReturnType]


def on_first(function: Callable[[], T]) -> T:
    """Runs a function on rank 0 alone and gives its value to all; what it raises is raised on all.

    Raises:
        TunesmithError: whatever the function raised; an OSError comes as StorageError.
    """
    outcome: list[T | TunesmithError | None] = [None]
    unexpected: Exception | None = None
    if not dist.is_initialized() or dist.get_rank() == 0:
        try:
            outcome = [function()]
        except TunesmithError as error:
            outcome = [error]
        except OSError as error:
            outcome = [StorageError(f"{error.filename or ''}: {error.strerror or error}")]
        except Exception as error:  # noqa: BLE001 - raised below, once the others have been told not to wait
            unexpected = error
            outcome = [TunesmithError(f"rank 0 failed with {type(error).__name__}: {error}")]
    if dist.is_initialized() and dist.get_world_size() > 1:
        dist.broadcast_object_list(outcome, src=0)
    if unexpected is not None:
        raise unexpected
    if isinstance(outcome[0], TunesmithError):
        raise outcome[0]
    return outcome[0]  # pyright: ignore[reportReturnType]


def on_first_at_length(function: Callable[[], T]) -> T:
    """As `on_first`, for work that may take longer than a collective operation may wait: until it is done the others wait at
    the group's store. It is for those who watch the workers to see that rank 0 gets on with it."""
    if dist.is_initialized() and dist.get_world_size() > 1:
        store, done = dist.distributed_c10d._get_default_store(), f"tunesmith/done-{next(_LONG_WORKS)}"
        if dist.get_rank() > 0:
            store.wait([done], LONGEST)
        else:
            function = _then(function, lambda: store.set(done, ""))
    return on_first(function)


def _then(function: Callable[[], T], say: Callable[[], None]) -> Callable[[], T]:
    def work() -> T:
        try:
            return function()
        finally:
            say()

    return work
