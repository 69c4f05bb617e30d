"""This machine's copies of adapter versions. A copy in use stays; beyond a size the least recently used one leaves."""

from __future__ import annotations

import asyncio
import fcntl
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path

from tunesmith.cluster.errors import RegistryError, RequestError, StorageError
from tunesmith.cluster.storage import discard
from tunesmith.serving.engines.protocol import Version
from tunesmith.serving.registry import Registry

_DIGITS = 64
"""Of a digest, and so of a copy's name; what is being written has a longer one."""


class Copies:
    """The copies in one folder, which several processes may share.

    Args:
        most_bytes: of all copies together; those in use stay nevertheless.
    """

    def __init__(self, registry: Registry, folder: Path, most_bytes: float) -> None:
        self._registry, self._folder, self._most_bytes = registry, folder, most_bytes
        self._checked: set[str] = set()
        self._copying: dict[str, asyncio.Task[None]] = {}

    @asynccontextmanager
    async def of(self, version: Version | None) -> AsyncIterator[Version | None]:
        """The version with its copy's folder, which stays there for the block; None is the base alone.

        Raises:
            RequestError: 503, there is no copy and none can be made.
        """
        if version is None:
            yield None
            return
        while (descriptor := self._held(version.digest)) is None:
            if version.digest not in self._copying:
                self._copying[version.digest] = asyncio.create_task(self._copy(version.digest))
            await asyncio.shield(self._copying[version.digest])
        try:
            yield Version(version.digest, str(self._folder / version.digest))
        finally:
            os.close(descriptor)

    def _held(self, digest: str) -> int | None:
        """A shared lock on a copy that this process has checked; None when it is not there, or about to leave."""
        if digest not in self._checked:
            return None
        path = self._folder / digest
        with suppress(FileNotFoundError):
            descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
            try:
                if _locked_shared(descriptor) and path.stat().st_ino == os.fstat(descriptor).st_ino:
                    os.utime(path)
                    return descriptor
            except FileNotFoundError:  # it has left between the two
                pass
            os.close(descriptor)
        self._checked.discard(digest)
        return None

    async def _copy(self, digest: str) -> None:
        try:
            await asyncio.to_thread(self._registry.fetch, digest, self._folder)
            self._checked.add(digest)
            await asyncio.to_thread(self.make_room, digest)
        except (StorageError, RegistryError) as error:
            raise RequestError(f"version {digest[:12]} cannot be read: {error}", 503, retry_after=5) from error
        finally:
            del self._copying[digest]

    def make_room(self, newest: str) -> None:
        """Removes the least recently used copies, until the rest are within the size.

        Args:
            newest: digest of a copy that stays.
        """
        used: dict[Path, float] = {}
        for path in self._folder.iterdir():
            with suppress(FileNotFoundError):
                if len(path.name) == _DIGITS and path.name != newest:
                    used[path] = path.stat().st_mtime
        sizes = {path: _size(path) for path in used}
        left = sum(sizes.values()) + _size(self._folder / newest)
        for path in sorted(used, key=lambda one: used[one]):
            if left <= self._most_bytes:
                return
            if _removed(path):
                left -= sizes[path]


def _locked_shared(descriptor: int) -> bool:
    """Locks a copy against being removed; False when somebody is about to."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:  # some network file systems lock no folders; there no copy leaves either
        pass
    return True


def _size(folder: Path) -> int:
    found = 0
    for parent, _, names in os.walk(folder):  # which passes over what has left meanwhile
        for name in names:
            with suppress(FileNotFoundError):
                found += os.stat(Path(parent, name)).st_size
    return found


def _removed(path: Path) -> bool:
    """Whether a copy that nobody uses was removed. It is locked while it is renamed, so that nobody begins to."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    except FileNotFoundError:
        return True
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        discard(path)
    except (OSError, StorageError):  # somebody uses it, or has removed it
        return not path.exists()
    finally:
        os.close(descriptor)
    return True
