"""Durable writes: a file or a folder is either wholly there, with its hashes, or not there at all.

A folder is committed like this: its files are written to `NAME.tmp-<8 hex>/` and fsynced, `MANIFEST.json` comes last
and names every file with its size and sha256, then one rename makes the folder visible, then its parent is fsynced.
Whatever is killed in between leaves a `.tmp-` folder, which the next writer removes.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import shutil
import time
import uuid
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from tunesmith.cluster.errors import DiskFullError, StorageError

MANIFEST = "MANIFEST.json"
_TEMPORARY = ".tmp-"
_FULL = (errno.ENOSPC, errno.EDQUOT)


class FileRecord(NamedTuple):
    """What a manifest says of one file."""

    size: int
    """Bytes."""
    sha256: str
    """Lower-case hex."""


class HashingFile:
    """A write-only file that hashes what passes through, so that nothing is read again to be signed.

    It has no `fileno` on purpose: torch.save would write to the descriptor behind its back. `close` fsyncs.
    """

    def __init__(self, path: Path) -> None:
        self._file: BinaryIO = open(path, "wb")  # noqa: SIM115 - closed by close() or abandon()
        self._hash = hashlib.sha256()
        self._size = 0

    def write(self, data: Any) -> int:
        """Appends a bytes-like object; returns its length in bytes."""
        view = memoryview(data).cast("B")
        self._file.write(view)
        self._hash.update(view)
        self._size += len(view)
        return len(view)

    def flush(self) -> None:
        """Hands what was written to the operating system."""
        self._file.flush()

    def close(self) -> FileRecord:
        """Flushes, fsyncs and closes; returns the record for the manifest."""
        with self._file:
            self._file.flush()
            os.fsync(self._file.fileno())
        return FileRecord(self._size, self._hash.hexdigest())

    def abandon(self) -> None:
        """Closes after an error, without a promise that anything was written."""
        with contextlib.suppress(OSError):
            self._file.close()


def sha256_file(path: Path) -> str:
    """Lower-case hex sha256 of a file's bytes."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def fsync_folder(path: Path) -> None:
    """Makes the names in a folder durable."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_atomic(path: Path, data: bytes | str) -> None:
    """Replaces a file: readers see the old bytes or the new, never a part.

    Raises:
        DiskFullError: the bytes do not fit.
    """
    payload = data.encode() if isinstance(data, str) else data
    temporary = _temporary_name(path)
    try:
        with explained(path, len(payload)):
            with open(temporary, "wb") as file:
                file.write(payload)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
            fsync_folder(path.parent)
    except BaseException:
        with contextlib.suppress(OSError):  # the first error is the one to report
            temporary.unlink()
        raise


def free_bytes(path: Path) -> int:
    """Bytes that may still be written under a path, which need not exist yet."""
    while not path.exists():
        path = path.parent
    return shutil.disk_usage(path).free


def disk_full(path: Path, needed: int, free: int | None = None) -> DiskFullError:
    """The error of a write that does not fit; measures the free bytes unless they are given."""
    free = free_bytes(path) if free is None else free
    return DiskFullError(
        f"{path}: disk full: {needed} bytes needed, {free} bytes free",
        "Free some space, or put output.dir on a larger disk, and run the same command again.",
    )


def require_space(path: Path, needed: int) -> None:
    """Raises DiskFullError when fewer than `needed` bytes are free under `path`."""
    free = free_bytes(path)
    if free < needed:
        raise disk_full(path, needed, free)


def is_disk_full(error: BaseException | None) -> bool:
    """Whether an error, or one that led to it, says that the disk is full: not every library raises OSError for it."""
    while error is not None:
        if (isinstance(error, OSError) and error.errno in _FULL) or "No space left on device" in str(error):
            return True
        error = error.__cause__ or error.__context__
    return False


@contextlib.contextmanager
def explained(path: Path, needed: int) -> Iterator[None]:
    """Turns an OSError of the block into DiskFullError or StorageError with the path and the numbers (bytes)."""
    try:
        yield
    except OSError as error:
        if is_disk_full(error):
            raise disk_full(path, needed) from error
        raise StorageError(f"{error.filename or path}: {error.strerror or error}") from error


def begin_folder(final: Path) -> Path:
    """Makes the temporary folder that `commit` will rename to `final`."""
    with explained(final, 0):
        final.parent.mkdir(parents=True, exist_ok=True)
        temporary = _temporary_name(final)
        temporary.mkdir()
    return temporary


def commit(temporary: Path, final: Path, files: Mapping[str, FileRecord], extra: Mapping[str, Any]) -> None:
    """Signs a finished folder and makes it visible. Every file in `files` has been fsynced already.

    `extra` are the manifest's further keys (`kind` and whatever the reader wants to know). An existing `final` is
    replaced; killed between the two renames, neither is visible, which no reader mistakes for a whole one.
    """
    sign(temporary, files, extra)
    with explained(temporary, 0):
        replaced = _hide(final) if final.exists() else None
        os.rename(temporary, final)
        fsync_folder(final.parent)
        if replaced is not None:
            shutil.rmtree(replaced, ignore_errors=True)


def commit_once(temporary: Path, final: Path, files: Mapping[str, FileRecord], extra: Mapping[str, Any]) -> bool:
    """As `commit`, but a `final` that is there already stays and the temporary folder is removed; whether it is ours."""
    sign(temporary, files, extra)
    with explained(temporary, 0):
        try:
            os.rename(temporary, final)
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                raise
            shutil.rmtree(temporary, ignore_errors=True)
            return False
        fsync_folder(final.parent)
    return True


def sign(folder: Path, files: Mapping[str, FileRecord], extra: Mapping[str, Any]) -> None:
    """Writes a folder's manifest, durably; every file in `files` has been fsynced already."""
    document: dict[str, Any] = {"files": {name: files[name]._asdict() for name in sorted(files)}, **extra}
    text = json.dumps({**document, "digest": manifest_digest(document)}, indent=1, sort_keys=True)
    with explained(folder, len(text)):
        for part in _folders_of(files):
            fsync_folder(folder / part)
        write_atomic(folder / MANIFEST, text)


def discard(final: Path) -> None:
    """Removes a committed folder: by a rename first, so that no half of it is ever taken for the whole."""
    with explained(final, 0):
        shutil.rmtree(_hide(final), ignore_errors=True)


def manifest_digest(document: Mapping[str, Any]) -> str:
    """sha256 over the manifest itself (without its `digest`), so that a flipped byte in it is found too."""
    canonical = json.dumps(document, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    return hashlib.sha256(canonical.encode()).hexdigest()


@contextlib.contextmanager
def commit_folder(final: Path, manifest_extra: Mapping[str, Any], needed: int = 0) -> Iterator[Path]:
    """Yields a temporary folder and commits whatever files the block leaves in it as `final`.

    `manifest_extra` is read when the block ends, so the block may still add to a dict it passed. `needed` is the number
    of bytes about to be written, when known; they must be free. If the block raises, the temporary folder is removed
    and the error goes on.

    Raises:
        DiskFullError, StorageError: writing failed; an earlier `final` is untouched.
    """
    require_space(final, needed)
    temporary = begin_folder(final)
    try:
        with held(temporary):
            yield temporary
            files = {path.relative_to(temporary).as_posix(): seal(path) for path in _files_in(temporary)}
            commit(temporary, final, files, manifest_extra)
    except BaseException as error:
        written = sum(path.stat().st_size for path in _files_in(temporary))
        free = free_bytes(final)
        shutil.rmtree(temporary, ignore_errors=True)
        if is_disk_full(error) and not isinstance(error, DiskFullError):
            raise disk_full(final, max(needed, written + free + 1), free) from error
        raise


@contextlib.contextmanager
def held(temporary: Path) -> Iterator[None]:
    """Marks a temporary folder as being written by a live process, so that `remove_leftovers` lets it be."""
    descriptor = os.open(temporary, os.O_RDONLY | os.O_DIRECTORY)
    try:
        with contextlib.suppress(OSError):  # some network file systems lock no folders; the caller's own lock must do
            fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
        yield
    finally:
        os.close(descriptor)


def remove_leftovers(parent: Path, younger_stay_s: float = 0.0) -> list[Path]:
    """Removes what killed writers left in a folder (`*.tmp-*`); returns what was removed.

    What a live process of this machine is writing stays. On a file system shared by machines, hold the run's lock.
    Where several write at once, `younger_stay_s` spares what was made so recently that it may not be held yet.
    """
    removed = []
    for path in sorted(parent.glob(f"*{_TEMPORARY}*")):
        if path.is_dir() and _is_held(path):
            continue
        if younger_stay_s and path.exists() and time.time() - path.stat().st_mtime < younger_stay_s:
            continue
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)
        removed.append(path)
    return removed


def _hide(final: Path) -> Path:
    hidden = _temporary_name(final)
    os.rename(final, hidden)
    return hidden


def _temporary_name(final: Path) -> Path:
    return final.with_name(f"{final.name}{_TEMPORARY}{uuid.uuid4().hex[:8]}")


def _is_held(folder: Path) -> bool:
    try:
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    except FileNotFoundError:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return False
    finally:
        os.close(descriptor)
    return False


def _folders_of(files: Mapping[str, FileRecord]) -> list[Path]:
    """Every folder on the way to the files, the deepest first, so that a name is durable before what leads to it."""
    folders = {parent for name in files for parent in Path(name).parents} | {Path(".")}
    return sorted(folders, key=lambda folder: len(folder.parts), reverse=True)


def _files_in(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def seal(path: Path) -> FileRecord:
    """Fsyncs a file that something else has written; returns its record."""
    with open(path, "rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
        os.fsync(file.fileno())
        return FileRecord(os.fstat(file.fileno()).st_size, digest)
