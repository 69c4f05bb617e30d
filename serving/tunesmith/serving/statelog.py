"""A small durable state with compare-and-swap: every state is a new numbered document, made by exclusive creation.

`NAME/000000000042.json` holds generation 42 as a whole, with its hash. To change the state, a writer creates the next
number; of two, one loses. There is no lock to be left behind, and nothing is ever written over.
"""

from __future__ import annotations

import hashlib
import json
import logging
import random
import re
import time
import uuid
from collections.abc import Callable
from typing import Any

from tunesmith.cluster.errors import MovedError, RegistryError, StorageError
from tunesmith.serving.store import open_store

KEPT = 100
"""Documents that are kept; older ones are removed."""

ATTEMPTS = 60
"""Times that an update is tried; each loss means that another writer has succeeded."""

State = dict[str, Any]
_DOCUMENT = re.compile(r"(\d{12})\.json")
_log = logging.getLogger(__name__)


class StateLog:
    """One state below a root.

    Args:
        root: a folder, or a URI of an object store.
        name: of the state; its documents are in the folder of that name.
    """

    def __init__(self, root: str, name: str) -> None:
        self._store = open_store(root)
        self._name = name

    def read(self) -> tuple[int, State]:
        """The newest readable state and its generation; `(0, {})` before the first.

        Raises:
            StorageError: there are documents, and none can be read.
        """
        _, generation, state = self._look()
        return generation, state

    def write(self, expected: int, state: State) -> int:
        """Makes a state the next one; returns its generation.

        Args:
            expected: the generation that the state was made from.

        Raises:
            MovedError: another generation is the newest.
            StorageError: it cannot be written.
        """
        highest, now, _ = self._look()
        if now != expected:
            raise self._moved(expected, now)
        mine = highest + 1  # beyond a damaged document, whose number is taken
        try:
            self._store.create(self._path(mine), _document(mine, state))
        except FileExistsError:
            raise self._moved(expected, mine) from None
        numbers = self._numbers()
        newest = max(numbers, default=mine)
        for number in numbers:
            if number <= newest - KEPT:
                self._store.remove(self._path(number))
        if mine <= newest - KEPT:  # asleep for so long that its number had been taken, superseded and removed
            raise self._moved(expected, newest)
        return mine

    def update(self, change: Callable[[State], State], expected: int | None = None) -> tuple[int, State]:
        """Applies a change to the newest state, again when another writer was faster.

        Args:
            change: from a state, which it may alter, to the next one; nothing is written when both are equal.
            expected: the generation that it must be applied to; None takes whichever is the newest.

        Raises:
            MovedError: `expected` is not the newest, or other writers were faster every time.
        """
        for attempt in range(ATTEMPTS):
            generation, state = self.read()
            if expected is not None and generation != expected:
                raise self._moved(expected, generation)
            before = json.dumps(state, sort_keys=True)
            changed = change(state)
            if json.dumps(changed, sort_keys=True) == before:
                return generation, changed
            try:
                return self.write(generation, changed), changed
            except MovedError:
                if expected is not None:
                    raise
                time.sleep(random.random() * min(0.2, 0.002 * 2**attempt))
        raise MovedError(f"{self._path(0)}: changed by others {ATTEMPTS} times in a row", "Run the command again.")

    def _look(self) -> tuple[int, int, State]:
        """From one listing: the highest number, and the newest readable generation with its state."""
        for _ in range(ATTEMPTS):
            numbers = sorted(self._numbers(), reverse=True)
            if not numbers:
                return 0, 0, {}
            try:
                return numbers[0], *self._first_readable(numbers)
            except FileNotFoundError:  # so many were written since the listing that this one is no longer kept
                continue
        raise StorageError(f"{self._path(0)}: documents vanish while they are read", "Does something else delete them?")

    def _first_readable(self, numbers: list[int]) -> tuple[int, State]:
        damage = ""
        for number in numbers:
            try:
                state = _checked(number, self._store.read(self._path(number)))
            except _Damaged as error:
                damage = damage or f"{self._path(number)}: {error}"
                continue
            if damage:
                _log.warning("%s; generation %d is used instead", damage, number)
            return number, state
        raise StorageError(
            f"{damage}; nor can any of the {len(numbers) - 1} documents before it be read",
            f"Restore {self._store.root}/{self._name} from a backup.",
        )

    def _numbers(self) -> list[int]:
        return [int(match[1]) for name in self._store.names(self._name) if (match := _DOCUMENT.fullmatch(name))]

    def _path(self, number: int) -> str:
        return f"{self._name}/{number:012d}.json" if number else self._name

    def _moved(self, expected: int, now: int) -> MovedError:
        return MovedError(
            f"{self._store.root}/{self._name} has moved meanwhile: generation {expected} was expected, and {now} is there",
            "Look at what it is now, and decide again.",
        )


class _Damaged(RegistryError):
    """A document is not what was written."""


def _document(generation: int, state: State) -> bytes:
    # the writer's mark tells its own document from another's equal one, should a request have been sent twice
    body = {"generation": generation, "writer": uuid.uuid4().hex, "state": state}
    return json.dumps({**body, "sha256": _hash(body)}, indent=1, sort_keys=True).encode()


def _checked(number: int, data: bytes) -> State:
    try:
        document = json.loads(data)
        written = document.pop("sha256")
        if _hash(document) != written:
            raise _Damaged("its bytes are not those that were written")
        if document["generation"] != number:
            raise _Damaged(f"it is generation {document['generation']} under another's name")
        return document["state"]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise _Damaged(f"not a whole state ({len(data)} bytes)") from error


def _hash(body: State) -> str:
    return hashlib.sha256(json.dumps(body, sort_keys=True, separators=(",", ":")).encode()).hexdigest()
