"""How DeepSpeed's checkpoint files reach the disk and come back: through its pluggable CheckpointEngine.

Writing never raises, because DeepSpeed follows each file with a barrier that the other ranks are already in: what went
wrong is kept and told to all ranks afterwards. Files are hashed as they are written. Files may be made in host memory
first: their bytes then are those of the moment, and a thread writes them while training changes what they were made of.
Only files that a manifest names and whose hash was checked are read, because reading them unpickles.
"""

from __future__ import annotations

import pickle
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from deepspeed.runtime.checkpoint_engine import CheckpointCommitInfo
from deepspeed.runtime.checkpoint_engine.checkpoint_engine import CheckpointEngine

from tunesmith.cluster.errors import CheckpointError, StorageError, TunesmithError
from tunesmith.cluster.storage import FileRecord, HashingFile, disk_full, free_bytes, is_disk_full, seal


class SignedFiles(CheckpointEngine):
    """Writes one rank's files of one checkpoint, or reads them.

    Args:
        folder: the checkpoint's folder; temporary while writing.
        module_names: names of the trainable parameters and the buffers: all that the module's state is reduced to.
            Frozen weights come from the base model, whose digest the run's identity holds.
        readable: the files whose hashes were checked, by relative path.
        in_memory: whether files are made in host memory, and wait there for `write_copies`.
    """

    def __init__(
        self, folder: Path, module_names: Iterable[str], readable: Iterable[str] = (), in_memory: bool = False
    ) -> None:
        super().__init__()
        self.name = "SignedFiles"
        self.folder = folder
        self.module_names = set(module_names)
        self.readable = set(readable)
        self.in_memory = in_memory
        self.files: dict[str, FileRecord] = {}
        self.wanted = 0
        """Bytes that this rank had to write, whether or not they fitted."""
        self.error: TunesmithError | None = None
        self.found_names: set[str] = set()
        """Names of the module's state that was read."""
        self.is_given_up = False
        """Set from another thread, ends `write_copies` early: nobody will commit."""
        self._copies: deque[tuple[Path, _Copy]] = deque()

    def create(self, info: CheckpointCommitInfo) -> None:
        """Nothing: the folder is there already."""

    def makedirs(self, path: str, exist_ok: bool = False) -> None:
        """Nothing: the folder is there already."""

    def commit(self, info: CheckpointCommitInfo) -> None:
        """Nothing: the store commits, when all ranks have written."""

    def save(self, state_dict: dict[str, Any], path: str) -> None:
        """Writes one file, keeping rather than raising what goes wrong; or makes it in memory."""
        if "module" in state_dict:
            kept = {name: value for name, value in state_dict["module"].items() if name in self.module_names}
            state_dict = {**state_dict, "module": kept}
        if self.in_memory:
            copy = _Copy()
            torch.save(state_dict, copy)  # pyright: ignore[reportArgumentType] - as below
            self._copies.append((Path(path), copy))
        else:
            # It writes and flushes, no more is asked of the file.
            self._write(Path(path), tensor_bytes(state_dict), lambda file: torch.save(state_dict, file))  # pyright: ignore[reportArgumentType]

    def write_copies(self) -> None:
        """Writes the files that were made in memory, and frees each part of them with its writing."""
        while self._copies and not self.is_given_up:
            path, copy = self._copies.popleft()
            self._write(path, copy.length, lambda file, copy=copy: copy.pour(file, self))

    def _write(self, path: Path, expected: int, pour: Callable[[_Patient], None]) -> None:
        free = free_bytes(self.folder)
        if self.error is not None or free < expected:
            self.wanted += expected
            self.error = self.error or disk_full(path, expected, free)
            return  # the bytes of further files still count: the error names what the whole checkpoint needs
        try:
            file = _Patient(path)
        except OSError as error:
            self.keep(path, error, expected)
            return
        pour(file)
        self.wanted += file.length
        try:
            self.files[path.relative_to(self.folder).as_posix()] = file.finish()
        except OSError as error:
            self.keep(path, error, 0)

    def sign_folder(self, folder: Path) -> None:
        """Hashes and fsyncs files that DeepSpeed copied by itself (NVMe offload); only these are read again."""
        for path in sorted(folder.rglob("*")):
            if path.is_file():
                record = seal(path)
                self.wanted += record.size
                self.files[path.relative_to(self.folder).as_posix()] = record

    def keep(self, path: Path, error: OSError, expected: int) -> None:
        """Remembers the first error, with its numbers."""
        self.wanted += expected
        if self.error is None:
            full = is_disk_full(error)
            self.error = disk_full(path, self.wanted) if full else StorageError(f"{path}: {error.strerror or error}")

    def load(self, path: str, map_location: Any = None) -> Any:
        """Reads one file, if its hash was checked.

        Raises:
            CheckpointError: the manifest does not name it, or it is not what was expected.
        """
        relative = Path(path).relative_to(self.folder).as_posix()
        if relative not in self.readable:
            raise CheckpointError(f"{path}: the manifest does not name this file, so it is not read")
        try:
            state = torch.load(path, map_location=map_location, weights_only=False)
        except (OSError, RuntimeError, pickle.UnpicklingError) as error:
            raise CheckpointError(f"{path}: cannot be read: {error}") from error
        if isinstance(state, dict) and "module" in state:
            self.found_names |= set(state["module"])
        return state


class _Patient:
    """A file that takes everything, and says at the end what could not be written.

    An exception inside torch.save's own writer would end the process in its destructor; and the length that torch.save
    wanted is the number of bytes to name when the disk was full.
    """

    def __init__(self, path: Path) -> None:
        self._file = HashingFile(path)
        self._error: OSError | None = None
        self.length = 0

    def write(self, data: Any) -> int:
        size = memoryview(data).nbytes
        self.length += size
        if self._error is None:
            try:
                self._file.write(data)
            except OSError as error:
                self._error = error
        return size

    def flush(self) -> None:
        """Left to `finish`."""

    def finish(self) -> FileRecord:
        if self._error is not None:
            self._file.abandon()
            raise self._error
        return self._file.close()


class _Copy:
    """A file in host memory: the very bytes that torch.save would have written to disk, one copy of them."""

    def __init__(self) -> None:
        self._parts: deque[bytes] = deque()
        self.length = 0

    def write(self, data: Any) -> int:
        part = bytes(data)
        self._parts.append(part)
        self.length += len(part)
        return len(part)

    def flush(self) -> None:
        """Nothing: it is in memory."""

    def pour(self, file: _Patient, owner: SignedFiles) -> None:
        """Moves the bytes to a file, unless they are given up meanwhile."""
        while self._parts and not owner.is_given_up:
            file.write(self._parts.popleft())


def module_names(module: torch.nn.Module) -> set[str]:
    """Names in the module's state that a checkpoint needs: trainable parameters (by every name they go by), buffers.

    What a quantised layer adds to its frozen weight is neither, and is left out.
    """
    names = {name for name, value in module.named_parameters(remove_duplicate=False) if value.requires_grad}
    for prefix, part in module.named_modules(remove_duplicate=False):
        held = {name for name, value in part._buffers.items() if value is not None} - part._non_persistent_buffers_set
        names |= {f"{prefix}.{name}" if prefix else name for name in held}
    return names


def tensor_bytes(value: Any) -> int:
    """Bytes of the distinct storages of all tensors in nested dicts, lists and tuples."""
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in _tensors(value)}
    return sum(storages.values())


def _tensors(value: Any) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from _tensors(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _tensors(item)
