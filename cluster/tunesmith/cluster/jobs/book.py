"""Where a job is written down: Ray's log, its log and record in the run's folder, and the store of its driver's machine.

A job does not fail because it could not be written down. Storage that is full or fails for a while is owed what was to be
written, and gets it with the next note; only when the job has ended is it waited for.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tunesmith.cluster.errors import OutputError, StorageError
from tunesmith.cluster.jobs import secrets
from tunesmith.cluster.patience import patiently
from tunesmith.cluster.runstore import JobRecord, RunStore, keep, log_file

NOTE_S = 10.0
"""How often a job says that it lives, and why it waits."""
STORE_S = 5.0
"""How long the store may keep the job waiting, which must ask for its workers all the while."""
OWED_S = 60.0
"""How long storage is waited for when the job begins or has ended, and only its record is left to write."""


class Book:
    """What a job says, and what is known of it. After `begin`, nothing here raises because storage fails."""

    def __init__(self, record: JobRecord) -> None:
        self.record = record
        self.hidden: Mapping[str, str] = {}
        """Secrets that must not be printed."""
        self._folder = Path(record.folder)
        self._log = log_file(self._folder, record.id)
        self._begun = False
        self._owed = b""
        """What was said and is not in the log yet."""
        self._lock = threading.Lock()
        self._failing: set[str] = set()
        self._store: RunStore | None = None

    def begin(self, patience_s: float = OWED_S) -> None:
        """Makes the job's log in the run's folder, and keeps the first record.

        Raises:
            OutputError: the folder cannot be made or written.
            StorageError: its disk has been full, or has failed, all the time.
        """
        try:
            self._log.parent.mkdir(parents=True, exist_ok=True)
            self._log.touch()
        except OSError as error:
            raise OutputError(
                f"{self._folder}: cannot be written by the job's driver: {error.strerror or error}",
                "Set output.dir to a folder that the cluster's nodes may write.",
            ) from error
        self._begun = True
        patiently(self._keep, patience_s, self._storage_fails)

    def say(self, text: str) -> None:
        """Prints a line, and keeps it with the run."""
        line = secrets.hide(text, self.hidden) + "\n"
        with self._lock:
            with contextlib.suppress(OSError):  # Ray's own log is full: there is nowhere to say so
                print(line, end="", flush=True)
            self._owed += line.encode(errors="replace")
            with contextlib.suppress(StorageError):  # owed; `note` says so
                self._write_log()

    def note(self, text: str = "", **fields: Any) -> None:
        """Changes the job's record; says what happened, if anything did."""
        self.record = self.record.model_copy(update={**fields, "heard_at": time.time()})
        if text:  # before the record says that the job has ended: who follows the log leaves then
            self.say(f"job {self.record.id}: {text}")
        fails = ""
        try:
            self._keep()
        except StorageError as failing:
            fails = f"storage fails: {failing.what}"
            self._storage_fails(f"{fails}; what the job says is written when it can be")
        self._tell_store(text, fails)

    def add_event(self, text: str) -> None:
        """Adds to the job's events what the log has already."""
        self._tell_store(text, "")

    def beat(self) -> None:
        """Notes now and then that the job lives."""
        if time.time() - self.record.heard_at > NOTE_S:
            self.note()

    def close(self, patience_s: float = OWED_S) -> None:
        """Waits for storage that is owed something, and removes a log that stayed empty: Ray has all of it."""
        if not self._begun:
            return
        try:
            patiently(self._keep, patience_s, self._storage_fails)
        except StorageError as failing:
            self.say(f"warning: storage fails: {failing.what}; how the job ended is told by Ray's log alone")
        with contextlib.suppress(OSError):
            if self._log.stat().st_size == 0:
                self._log.unlink()

    def _keep(self) -> None:
        if not self._begun:
            return
        with self._lock:
            self._write_log()
        keep(self.record)
        self._failing.discard("storage")

    def _write_log(self) -> None:
        if not (self._owed and self._begun):
            return
        try:
            with self._log.open("ab", buffering=0) as log:
                while self._owed:
                    self._owed = self._owed[log.write(self._owed) :]
        except OSError as error:
            raise StorageError(f"{self._log}: {error.strerror or error}") from error

    def _tell_store(self, text: str, fails: str) -> None:
        """The store repeats what the run's folder tells, or says why that tells nothing. One that fails is opened again with the next note."""
        about = self.record.model_dump(exclude={"id"})
        if fails and not self.record.ended:
            about["why"] = f"{self.record.why}; {fails}" if self.record.why else fails
        try:
            self._store = self._store or RunStore(busy_s=STORE_S)
            if self._store.job(self.record.id) is None:  # it was submitted elsewhere, or the database was made anew
                self._store.add(self.record, "its driver has started")
            self._store.change(self.record.id, text, **about)
            self._failing.discard("store")
        except StorageError as failing:
            if self._store is not None:
                self._store.close()
                self._store = None
            self._warn_once("store", f"the run store is not written: {failing.what}")

    def _storage_fails(self, text: str) -> None:
        self._warn_once("storage", text)

    def _warn_once(self, what: str, text: str) -> None:
        """Until it works again."""
        if what not in self._failing:
            self._failing.add(what)
            self.say(f"warning: {text}")
