"""Follows a file of JSON lines, such as metrics.jsonl, while workers write it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


class MetricsTail:
    """Gives each new whole line once. Lines that were there at the beginning are not new.

    A later attempt rewrites the file without the steps that it repeats; then only what follows the rewrite is given.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._inode, self._offset = self._state()

    def lines(self) -> list[dict[str, Any]]:
        """What was appended since the last call."""
        inode, size = self._state()
        if self._inode == 0:
            self._inode = inode
        if inode != self._inode or size < self._offset:
            self._inode, self._offset = inode, size
            return []
        if size == self._offset:
            return []
        with open(self.path, "rb") as file:
            file.seek(self._offset)
            data = file.read()
        whole = data[: data.rfind(b"\n") + 1]
        self._offset += len(whole)
        return [json.loads(line) for line in whole.splitlines()]

    def _state(self) -> tuple[int, int]:
        try:
            stat = self.path.stat()
        except FileNotFoundError:
            return 0, 0
        return stat.st_ino, stat.st_size
