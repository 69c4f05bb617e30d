"""Files below a root that is a local folder or an object store, with the one promise a registry needs: a file that is
created exclusively is made by one writer only, and is there whole or not at all."""

from __future__ import annotations

import contextlib
import os
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

from tunesmith.cluster.errors import RegistryError, StorageError
from tunesmith.cluster.storage import explained, fsync_folder

EXCLUSIVE = ("memory", "s3", "s3a", "gs", "gcs", "az", "abfs", "abfss")
"""fsspec protocols whose `pipe_file(mode="create")` is one conditional request; elsewhere it looks first and then
writes, so that two writers can both believe that they won."""

_STALE_S = 3600.0
"""Age at which a temporary file is a killed writer's: a living one has it for milliseconds."""


class Store(Protocol):
    """Small files by their path below the root, with forward slashes."""

    root: str

    def names(self, folder: str) -> list[str]:
        """Names of the files and folders in a folder, unsorted; empty when there is no such folder."""
        ...

    def read(self, path: str) -> bytes:
        """A file's bytes.

        Raises:
            FileNotFoundError: there is no such file.
            StorageError: it cannot be read.
        """
        ...

    def create(self, path: str, data: bytes) -> None:
        """Makes a file, durably.

        Raises:
            FileExistsError: there is one already, which stays.
            StorageError: it cannot be written.
        """
        ...

    def remove(self, path: str) -> None:
        """Removes a file; one that is not there is ignored."""
        ...


def open_store(root: str) -> LocalStore | ObjectStore:
    """The store below a folder or a URI such as s3://bucket/registry.

    Raises:
        RegistryError: the URI names no object store that can create a file exclusively.
    """
    protocol, separator, rest = root.partition("://")
    if not separator:
        return LocalStore(Path(root).expanduser())
    if protocol in ("file", "local"):
        return LocalStore(Path(rest))
    if protocol not in EXCLUSIVE:
        raise RegistryError(
            f"{root}: {protocol} cannot create a file only when there is none, so two writers could both win",
            f"Give a folder, or a URI of one of: {', '.join(EXCLUSIVE)}.",
        )
    return ObjectStore(root)


class LocalStore:
    """A folder, which may be on a file system that several machines share."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder.absolute()
        self.root = str(self.folder)

    def names(self, folder: str) -> list[str]:
        """See `Store`."""
        with explained(self.folder / folder, 0):
            try:
                return os.listdir(self.folder / folder)
            except FileNotFoundError:
                return []

    def read(self, path: str) -> bytes:
        """See `Store`."""
        try:
            return (self.folder / path).read_bytes()
        except FileNotFoundError:
            raise
        except OSError as error:
            raise StorageError(f"{self.folder / path}: {error.strerror or error}") from error

    def create(self, path: str, data: bytes) -> None:
        """See `Store`. The name is given by a hard link, which fails where a rename would replace."""
        final = self.folder / path
        temporary = final.with_name(f"{final.name}.tmp-{uuid.uuid4().hex[:8]}")
        taken = False
        with explained(final, len(data)):
            final.parent.mkdir(parents=True, exist_ok=True)
            try:
                with open(temporary, "wb") as file:
                    file.write(data)
                    file.flush()
                    os.fsync(file.fileno())
                os.link(temporary, final)
                fsync_folder(final.parent)
            except FileExistsError:
                taken = True
            finally:
                with contextlib.suppress(FileNotFoundError):
                    temporary.unlink()
        if taken:
            raise FileExistsError(str(final))

    def remove(self, path: str) -> None:
        """See `Store`. What killed writers left beside it goes too."""
        final = self.folder / path
        with explained(final, 0):
            final.unlink(missing_ok=True)
            for left in final.parent.glob("*.tmp-*"):
                with contextlib.suppress(FileNotFoundError):
                    if time.time() - left.stat().st_mtime > _STALE_S:
                        left.unlink()


class ObjectStore:
    """A prefix of an object store, through fsspec."""

    def __init__(self, root: str) -> None:
        import fsspec

        self.root = root.rstrip("/")
        try:
            self.files: Any = fsspec.filesystem(root.partition("://")[0])
        except ImportError as error:
            raise RegistryError(f"{root}: {error}", "Install that package where the registry is used.") from error

    def url(self, path: str) -> str:
        """The full address of a path below the root."""
        return f"{self.root}/{path}"

    def names(self, folder: str) -> list[str]:
        """See `Store`. Listings are never taken from fsspec's cache: other processes write here."""
        with self.said(folder):
            self.files.invalidate_cache()
            try:
                return [entry.rstrip("/").rpartition("/")[2] for entry in self.files.ls(self.url(folder), detail=False)]
            except FileNotFoundError:
                return []

    def read(self, path: str) -> bytes:
        """See `Store`."""
        with self.said(path):
            return bytes(self.files.cat_file(self.url(path)))

    def create(self, path: str, data: bytes) -> None:
        """See `Store`.

        A request whose answer was lost is sent again by the client library and then finds its own file; and s3fs
        reports a lost race as EINVAL. So what lies there decides: our own bytes, which no other writer has, or others.
        """
        try:
            self.files.pipe_file(self.url(path), data, mode="create")
        except OSError as error:
            try:
                there = self.read(path)
            except FileNotFoundError:
                raise StorageError(f"{self.url(path)}: {error}") from error
            if there != data:
                raise FileExistsError(self.url(path)) from error

    def remove(self, path: str) -> None:
        """See `Store`."""
        with self.said(path), contextlib.suppress(FileNotFoundError):
            self.files.rm_file(self.url(path))

    @contextlib.contextmanager
    def said(self, path: str) -> Iterator[None]:
        """Turns what the block raises, other than that there is no such file, into StorageError with the address.

        Object stores' libraries have errors of their own for lost connections and credentials, which are no OSErrors.
        """
        try:
            yield
        except FileNotFoundError:
            raise
        except Exception as error:
            raise StorageError(f"{self.url(path)}: {error}") from error
