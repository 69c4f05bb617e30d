"""Tokenised examples on disk, memory-mapped.

B examples, T tokens of all examples together. A folder holds tokens.npy int32 [T], trained.npy bool [T],
offsets.npy int64 [B+1] and, one entry an example, labels, source, file, line and cut; names.json has the file names.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

_PER_ROW = {"labels": np.int64, "source": np.int16, "file": np.int32, "line": np.int64, "cut": np.bool_}


class TokenStore:
    """One split of the data set. Opening it reads the per-example arrays; tokens stay on disk until they are asked for.

    Attributes:
        lengths: int64 [B], tokens of each example.
        trained_counts: int64 [B], usable labels: trained tokens that have a predecessor in the example.
        source: int16 [B], position of the example's source in `data.train` (or `data.validation`).
        line: int64 [B], 1-based line of JSONL and CSV, 1-based row number of other files.
        cut: bool [B], the example was truncated or is a piece of a longer row, so its end may be no end of a turn.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = Path(folder)
        self.offsets: np.ndarray = np.load(self.folder / "offsets.npy")
        mode = "r" if self.offsets[-1] else None  # nothing cannot be mapped
        self._tokens: np.ndarray = np.load(self.folder / "tokens.npy", mmap_mode=mode)
        self._trained: np.ndarray = np.load(self.folder / "trained.npy", mmap_mode=mode)
        self.lengths: np.ndarray = np.diff(self.offsets)
        self.trained_counts: np.ndarray = np.load(self.folder / "labels.npy")
        self.source: np.ndarray = np.load(self.folder / "source.npy")
        self.line: np.ndarray = np.load(self.folder / "line.npy")
        self.cut: np.ndarray = np.load(self.folder / "cut.npy")
        self._file: np.ndarray = np.load(self.folder / "file.npy")
        self._names: list[str] = json.loads((self.folder / "names.json").read_text(encoding="utf-8"))

    def __len__(self) -> int:
        return len(self.lengths)

    def __reduce__(self) -> tuple[type[TokenStore], tuple[Path]]:
        return TokenStore, (self.folder,)

    def example(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """Tokens int32 and trained bool of one example, both as long as it; views of the mapped files."""
        begin, end = self.offsets[index], self.offsets[index + 1]
        return self._tokens[begin:end], self._trained[begin:end]

    def where(self, index: int) -> str:
        """`file:line` of the row that the example came from."""
        return f"{self._names[self._file[index]]}:{self.line[index]}"


@dataclass
class Piece:
    """One example on its way to disk."""

    tokens: np.ndarray
    trained: np.ndarray
    source: int
    file: int
    line: int
    row: int
    """Position of the row among all usable rows; the pieces of a split row share it."""
    cut: bool


def count_labels(trained: np.ndarray) -> int:
    """Trained tokens that have a predecessor to be predicted from."""
    return int(np.count_nonzero(trained[1:]))


class Spool:
    """Examples in reading order, appended to two raw files until it is known which split each belongs to."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        folder.mkdir(parents=True)
        self._tokens = (folder / "tokens.bin").open("wb")
        self._trained = (folder / "trained.bin").open("wb")
        self._offsets: list[int] = [0]
        self._columns: dict[str, list[int]] = {name: [] for name in _PER_ROW}
        self._rows: list[int] = []

    def add(self, pieces: Iterable[Piece]) -> None:
        """Appends examples."""
        for piece in pieces:
            self._tokens.write(piece.tokens.astype(np.int32).tobytes())
            self._trained.write(piece.trained.astype(np.bool_).tobytes())
            self._offsets.append(self._offsets[-1] + len(piece.tokens))
            self._columns["labels"].append(count_labels(piece.trained))
            for name in ("source", "file", "line", "cut"):
                self._columns[name].append(getattr(piece, name))
            self._rows.append(piece.row)

    def write(self, folder: Path, rows: np.ndarray, names: list[str]) -> None:
        """Writes the examples of the rows whose entry in `rows` (bool, one a row) is true as a `TokenStore` folder."""
        self._tokens.flush()
        self._trained.flush()
        folder.mkdir(parents=True)
        owners = np.asarray(self._rows, dtype=np.int64)
        chosen = np.flatnonzero(rows[owners]) if len(owners) else owners
        starts = np.asarray(self._offsets, dtype=np.int64)
        lengths = np.diff(starts)[chosen]
        offsets = np.concatenate([np.zeros(1, np.int64), np.cumsum(lengths, dtype=np.int64)])
        np.save(folder / "offsets.npy", offsets)
        for name, kind in _PER_ROW.items():
            np.save(folder / f"{name}.npy", np.asarray(self._columns[name], dtype=kind)[chosen])
        for name, kind in (("tokens", np.int32), ("trained", np.bool_)):
            self._gather(folder, name, kind, starts[chosen], offsets)
        (folder / "names.json").write_text(json.dumps(names), encoding="utf-8")

    def _gather(self, folder: Path, name: str, kind: type, starts: np.ndarray, offsets: np.ndarray) -> None:
        if not offsets[-1]:
            np.save(folder / f"{name}.npy", np.zeros(0, kind))
            return
        read = np.asarray(np.memmap(self._folder / f"{name}.bin", dtype=kind, mode="r"))
        written = np.lib.format.open_memmap(folder / f"{name}.npy", mode="w+", dtype=kind, shape=(int(offsets[-1]),))
        for start, begin, end in zip(starts, offsets[:-1], offsets[1:], strict=True):
            written[begin:end] = read[start : start + end - begin]
        written.flush()

    def discard(self) -> None:
        """Closes and deletes the raw files."""
        for file in (self._tokens, self._trained):
            file.close()
            Path(file.name).unlink()
        self._folder.rmdir()
