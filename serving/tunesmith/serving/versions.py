"""Where the files of adapter versions lie: `versions/DIGEST/`, visible once the manifest is there."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from tunesmith.cluster.artifacts import verify
from tunesmith.cluster.errors import CheckpointError
from tunesmith.cluster.storage import (
    MANIFEST,
    FileRecord,
    begin_folder,
    commit,
    commit_once,
    explained,
    remove_leftovers,
    sign,
)
from tunesmith.serving.store import LocalStore, ObjectStore, open_store

_FOLDER = "versions"
_YOUNG_S = 60.0


def open_versions(root: str) -> LocalVersions | ObjectVersions:
    """The versions below a root.

    Raises:
        RegistryError: see `open_store`.
    """
    store = open_store(root)
    return LocalVersions(store) if isinstance(store, LocalStore) else ObjectVersions(store)


class LocalVersions:
    """Committed folders."""

    def __init__(self, store: LocalStore) -> None:
        self._folder = store.folder / _FOLDER

    def stage(self) -> Path:
        """An empty folder to make a version in; what killed writers left of theirs is removed."""
        remove_leftovers(self._folder, younger_stay_s=_YOUNG_S)
        return begin_folder(self._folder / "incoming")

    def has(self, digest: str) -> bool:
        """Whether a version is there, whole."""
        return (self._folder / digest / MANIFEST).is_file()

    def publish(self, staged: Path, digest: str, files: Mapping[str, FileRecord], extra: Mapping[str, Any]) -> None:
        """Makes a staged folder the version, unless it is there already; a damaged one is replaced.

        Raises:
            StorageError: it cannot be written.
        """
        final = self._folder / digest
        if not final.exists():
            commit_once(staged, final, files, extra)
            return
        try:
            verify(final)
        except CheckpointError:
            commit(staged, final, files, extra)

    def get(self, digest: str, name: str, target: Path) -> None:
        """Copies one file of a version.

        Raises:
            FileNotFoundError: there is none.
            StorageError: it cannot be copied.
        """
        source = self._folder / digest / name
        if not source.is_file():
            raise FileNotFoundError(f"{source} is not there")
        with explained(target, source.stat().st_size):
            shutil.copyfile(source, target)

    def discard(self, digest: str, is_used: Callable[[], bool]) -> None:
        """Deletes a version, unless somebody has begun to use it again.

        It is hidden first and the question asked then: who adds the same content looks for the files after naming
        them, so either that look finds them gone, or the answer here is yes.
        """
        final = self._folder / digest
        hidden = begin_folder(final)
        with explained(final, 0):
            try:
                os.rename(final, hidden / digest)
            except FileNotFoundError:
                hidden.rmdir()
                return
            if is_used() and not final.exists():
                os.rename(hidden / digest, final)
        shutil.rmtree(hidden, ignore_errors=True)


class ObjectVersions:
    """Prefixes of an object store; a version's manifest is uploaded last and deleted first."""

    def __init__(self, store: ObjectStore) -> None:
        self._store = store

    def stage(self) -> Path:
        """An empty local folder to make a version in."""
        return Path(tempfile.mkdtemp(prefix="tunesmith-adapter-"))

    def has(self, digest: str) -> bool:
        """Whether a version is there, whole."""
        return MANIFEST in self._store.names(f"{_FOLDER}/{digest}")

    def publish(self, staged: Path, digest: str, files: Mapping[str, FileRecord], extra: Mapping[str, Any]) -> None:
        """Uploads a staged folder, unless the version is there already.

        Raises:
            StorageError: it cannot be written.
        """
        if self.has(digest):
            return
        sign(staged, files, extra)
        for name in (*files, MANIFEST):
            with self._store.said(name):
                self._store.files.put_file(str(staged / name), self._url(digest, name))

    def get(self, digest: str, name: str, target: Path) -> None:
        """See `LocalVersions.get`."""
        with self._store.said(name):
            self._store.files.get_file(self._url(digest, name), str(target))

    def discard(self, digest: str, is_used: Callable[[], bool]) -> None:
        """Deletes a version. Whoever adds the same content at this very moment finds out, and uploads it again."""
        folder = f"{_FOLDER}/{digest}"
        if is_used():
            return
        self._store.remove(f"{folder}/{MANIFEST}")
        with self._store.said(folder):
            self._store.files.rm(self._store.url(folder), recursive=True)

    def _url(self, digest: str, name: str) -> str:
        return self._store.url(f"{_FOLDER}/{digest}/{name}")
