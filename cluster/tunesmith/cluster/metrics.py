"""The metrics file: one JSON object a line, one line a step, never two."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tunesmith.cluster.errors import StorageError
from tunesmith.cluster.storage import explained, write_atomic


class MetricsLog:
    """Appends lines that a reader, and a later attempt, can rely on."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._repaired = False

    def append(self, line: Mapping[str, Any]) -> None:
        """Writes one line at once; a number that is not finite becomes null.

        Raises:
            DiskFullError: the line does not fit; names its bytes and the bytes free.
        """
        payload = _dump(line)
        with explained(self.path, len(payload)):
            if not self._repaired:
                self._cut_torn_line()
            self._repaired = False  # until the line is whole: it may be tried again
            descriptor = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
            try:
                left = memoryview(payload)
                while left:  # a disk that is nearly full takes a part and says so only when asked for the rest
                    left = left[os.write(descriptor, left) :]
            finally:
                os.close(descriptor)
            self._repaired = True

    def truncate_after(self, step: int) -> None:
        """Drops, in one atomic rewrite, the lines of steps beyond `step`: they are about to be repeated."""
        kept = [line for line in read_metrics(self.path) if line.get("step", 0) <= step]
        if self.path.exists():
            write_atomic(self.path, b"".join(_dump(line) for line in kept))
        self._repaired = True

    def _cut_torn_line(self) -> None:
        if self.path.is_file():
            data = self.path.read_bytes()
            if data and not data.endswith(b"\n"):
                os.truncate(self.path, data.rfind(b"\n") + 1)
        self._repaired = True


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """All whole lines; a last line torn by a crash is left out, and a missing file is an empty one.

    Raises:
        StorageError: names the line that is not JSON.
    """
    if not path.exists():
        return []
    lines = []
    for number, line in enumerate(path.read_bytes().splitlines(keepends=True), start=1):
        if line.endswith(b"\n"):
            try:
                lines.append(json.loads(line))
            except ValueError as error:
                raise StorageError(f"{path}:{number}: not a line of metrics: {error}") from error
    return lines


def _dump(line: Mapping[str, Any]) -> bytes:
    finite = {
        key: None if isinstance(value, float) and not math.isfinite(value) else value for key, value in line.items()
    }
    return (json.dumps(finite, allow_nan=False) + "\n").encode()
