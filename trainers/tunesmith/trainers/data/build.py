"""Reads, encodes and writes a data set: the slow part of `prepare`, done once for each fingerprint."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Iterator
from itertools import chain, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from tunesmith.cluster.errors import DataError
from tunesmith.cluster.recipe.data import Source
from tunesmith.cluster.recipe.schema import Recipe
from tunesmith.trainers.data import formats, split
from tunesmith.trainers.data.encoding import Encoder
from tunesmith.trainers.data.fit import Rule, fit
from tunesmith.trainers.data.formats import Conversation, Example, Format, Text
from tunesmith.trainers.data.report import BadRow, DataReport, SourceReport, SplitReport
from tunesmith.trainers.data.sources import RawRow, find_files, read_rows
from tunesmith.trainers.data.tokens import Piece, Spool, TokenStore, count_labels

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SPLITS = ("train", "validation", "test")
_BATCH = 1024
LOOK = 100
"""Rows that decide a source's format."""
_SHOWN = 10
_KEPT = 100


class Rules(NamedTuple):
    """The recipe's settings once its defaults are resolved."""

    loss_on: str
    long_rows: Rule
    max_length: int


class _Used(NamedTuple):
    """A row that can be encoded."""

    raw: RawRow
    example: Example
    digest: bytes


class Builder:
    """Takes in source after source, then writes the three splits.

    Args:
        folder: where everything is written.
        recipe: template, shares and budget are read from it, each only where it matters.
    """

    def __init__(self, folder: Path, recipe: Recipe, tokenizer: PreTrainedTokenizerBase, rules: Rules) -> None:
        self.folder = folder
        self.recipe = recipe
        self.rules = rules
        self.encoder = Encoder(tokenizer, rules.loss_on)
        self.template: str | None = None
        self.spool = Spool(folder / "spool")
        self.reports: list[SourceReport] = []
        self.unused: list[tuple[SourceReport, BadRow, Any]] = []
        self.bad: list[BadRow] = []
        """Those of the unused that count against the budget; the others were dropped by the rule for long rows."""
        self.digests: dict[str, list[bytes]] = {"train": [], "validation": []}
        self.roles: list[str] = []
        self.names: dict[str, int] = {}
        self.split_notes: list[str] = []

    def take(self, source: Source, role: str, index: int) -> None:
        """Encodes one source; `index` is its position in the recipe's list.

        Raises:
            DataError: it is empty, its columns say no known format, or its rows cannot answer for the objective.
        """
        rows = read_rows(source)
        first = list(islice(rows, LOOK))
        fmt, columns = recognise(source, first)
        report = SourceReport(path=source.path, role=role, format=fmt, columns=columns)
        self.reports.append(report)
        ignored: dict[str, None] = {}
        for batch in _batched(chain(first, rows), _BATCH):
            report.rows += len(batch)
            for raw in batch:
                ignored.update(dict.fromkeys(formats.ignored(raw.row or {}, fmt)))
            used = [item for raw in batch if (item := self._usable(raw, fmt, report)) is not None]
            self._encode(used, report, index)
        report.ignored = list(ignored)

    def finish(self) -> DataReport:
        """Checks the budget, writes the splits and quarantine.jsonl.

        Raises:
            DataError: more rows are bad than `data.max_bad_rows` allows, or none is left.
        """
        self._check_budget()
        splits = self._assign()
        rows_of = np.bincount(splits, minlength=len(SPLITS))
        summaries = {}
        for number, name in enumerate(SPLITS):
            self.spool.write(self.folder / name, splits == number, list(self.names))
            summaries[name] = _summary(TokenStore(self.folder / name), int(rows_of[number]))
        self.spool.discard()
        self._write_quarantine()
        return self._report(summaries, splits)

    def _usable(self, raw: RawRow, fmt: Format, report: SourceReport) -> _Used | None:
        example = formats.normalise(raw.row, fmt) if raw.row is not None else raw.problem or "no row"
        if isinstance(example, str):
            return self._set_aside(raw, example, report)
        if isinstance(example, Text) and self.rules.loss_on == "assistant":
            raise DataError(
                f"{report.path} is plain text, and objective: {self.recipe.objective.kind} trains the assistant's "
                "words: there is no assistant",
                "Use objective: cpt, or train on every token with data.loss_on: all.",
            )
        try:
            return _Used(raw, example, split.content_hash(_content(example)))
        except UnicodeEncodeError:
            return self._set_aside(raw, "invalid Unicode: half of a surrogate pair", report)
        except TypeError as error:
            return self._set_aside(raw, f"a value that JSON has no form for: {error}", report)

    def _set_aside(self, raw: RawRow, reason: str, report: SourceReport, dropped: bool = False) -> None:
        row = BadRow(file=raw.file, line=raw.line, reason=reason)
        if dropped:
            report.dropped += 1
        else:
            report.bad += 1
            self.bad.append(row)
        self.unused.append((report, row, raw.row))

    def _encode(self, used: list[_Used], report: SourceReport, index: int) -> None:
        if self.encoder.renderer is None and any(isinstance(item.example, Conversation) for item in used):
            self.template = self.recipe.data.template
            self.encoder.use_template(self.template)
        for item, encoded in zip(used, self.encoder.encode([item.example for item in used]), strict=True):
            if isinstance(encoded, str):
                self._set_aside(item.raw, encoded, report)
            elif not count_labels(encoded.trained):
                self._set_aside(item.raw, f"nothing to train in its {len(encoded.tokens)} tokens", report)
            else:
                fitted = fit(encoded, self.rules.max_length, self.rules.long_rows)
                if fitted.fate == "dropped":
                    self._set_aside(item.raw, fitted.reason, report, dropped=True)
                    continue
                report.truncated += fitted.fate == "truncated"
                report.split += fitted.fate == "split"
                file = self.names.setdefault(item.raw.file, len(self.names))
                cut, row = fitted.fate != "whole", len(self.roles)
                pieces = [
                    Piece(part.tokens, part.trained, index, file, item.raw.line, row, cut) for part in fitted.examples
                ]
                self._keep(pieces, item, report)

    def _keep(self, pieces: list[Piece], item: _Used, report: SourceReport) -> None:
        self.spool.add(pieces)
        self.roles.append(report.role)
        self.digests[report.role].append(item.digest)
        report.used += 1
        report.examples += len(pieces)
        report.tokens += sum(len(piece.tokens) for piece in pieces)
        report.trained_tokens += sum(count_labels(piece.trained) for piece in pieces)

    def _check_budget(self) -> None:
        rows, used = sum(report.rows for report in self.reports), sum(report.used for report in self.reports)
        count = len(self.bad)
        allowed = self.recipe.data.max_bad_rows
        limit = allowed if allowed >= 1 else int(allowed * rows)
        if count > limit:
            what = f"{count:,} of {rows:,} rows cannot be used, and data.max_bad_rows: {allowed:g} allows {limit:g}"
            raise DataError(
                f"{what}\n{_listed(self.bad)}",
                "Repair or remove them, or raise data.max_bad_rows: they are then set aside in quarantine.jsonl.",
            )
        empty = next((report for report in self.reports if not report.used), None)
        if empty is not None or not used:
            path = empty.path if empty else "the data"
            mine = [row for report, row, _ in self.unused if report is empty]
            fix = (
                "Raise data.max_length, or choose another rule with data.long_rows." if empty and empty.dropped else ""
            )
            raise DataError(f"no row of {path} can be used\n{_listed(mine)}", fix)

    def _assign(self) -> np.ndarray:
        """Split of each usable row: int8 [rows]."""
        shares = self.recipe.data.split
        own = self.recipe.data.validation is not None
        validation, test = 0.0 if own else shares.validation, shares.test
        hashes = self.digests["train"]
        chosen = split.assign(hashes, validation, test)
        for name, number, share in (("validation", split.VALIDATION, validation), ("test", split.TEST, test)):
            if note := split.stray(name, share, int(np.count_nonzero(chosen == number)), hashes):
                self.split_notes.append(note)
        roles = np.asarray(self.roles)
        splits = np.full(len(roles), split.VALIDATION, dtype=np.int8)
        splits[roles == "train"] = chosen
        return splits

    def _write_quarantine(self) -> None:
        with (self.folder / "quarantine.jsonl").open("w", encoding="utf-8") as file:
            for report, row, content in self.unused:
                entry = {"source": report.path, **row.model_dump(), "row": content}
                file.write(json.dumps(entry, default=str) + "\n")

    def _report(self, summaries: dict[str, SplitReport], splits: np.ndarray) -> DataReport:
        train_splits = splits[np.asarray(self.roles) == "train"]
        trained = {digest for digest, at in zip(self.digests["train"], train_splits, strict=True) if at == split.TRAIN}
        return DataReport(
            sources=self.reports,
            splits=summaries,
            bad_rows=[row for _, row, _ in self.unused[:_KEPT]],
            **self.rules._asdict(),
            template=self.template,
            chat_template=self.encoder.renderer.template if self.encoder.renderer else None,
            end_of_turn=self.encoder.end_of_turn_id,
            split_notes=self.split_notes,
            leaked_rows=sum(digest in trained for digest in self.digests["validation"]),
        )


def look_at(source: Source) -> None:
    """Refuses what the first rows give away, before anything slow begins: of files only, not of `datasets` folders or the hub.

    Raises:
        DataError: it is missing, empty, or its columns say no known format.
    """
    files = find_files(source.path)
    if files and not Path(files[0]).is_dir():
        recognise(source, list(islice(read_rows(source), LOOK)))


def recognise(source: Source, rows: list[RawRow]) -> tuple[Format, list[str]]:
    """The format that most of the first rows have, and the columns of the first one that has it."""
    if not rows:
        raise DataError(f"{source.path} is empty: it has no rows")
    readable = [raw.row for raw in rows if raw.row is not None]
    if not readable:
        bad = [BadRow(file=raw.file, line=raw.line, reason=raw.problem or "") for raw in rows]
        raise DataError(f"none of the first {len(rows):,} rows of {source.path} can be read\n{_listed(bad)}")
    votes: Counter[Format] = Counter()
    columns: dict[Format, list[str]] = {}
    for row in readable:
        fmt = formats.detect(row)
        if fmt is not None:
            votes[fmt] += 1
            columns.setdefault(fmt, list(row))
    if not votes:
        known = "; ".join(", ".join(needed) for needed in formats.COLUMNS.values())
        raise DataError(
            f"{source.path}: the columns {', '.join(map(str, readable[0])) or '(none)'} are no known format",
            f"Name the columns after one of these: {known}.",
        )
    winner = max(votes, key=lambda name: votes[name])
    return winner, columns[winner]


def _batched(rows: Iterable[RawRow], size: int) -> Iterator[list[RawRow]]:
    rows = iter(rows)
    while batch := list(islice(rows, size)):
        yield batch


def _content(example: Example) -> dict[str, Any]:
    """What a row says, without what nothing reads and without weights: rows that say the same are in the same split."""
    said = {name: value for name, value in vars(example).items() if name != "untrained"}
    return {"kind": type(example).__name__, **said}


def _listed(bad: list[BadRow]) -> str:
    more = [f"  … and {len(bad) - _SHOWN:,} more"] if len(bad) > _SHOWN else []
    return "\n".join([f"  {row}" for row in bad[:_SHOWN]] + more)


def _summary(store: TokenStore, rows: int) -> SplitReport:
    return SplitReport(
        rows=rows,
        examples=len(store),
        tokens=int(store.offsets[-1]),
        trained_tokens=int(store.trained_counts.sum()),
    )
