"""How much data there is: exact with a tokenizer, an estimate by bytes without."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from tunesmith.cluster.base import BaseRef
from tunesmith.cluster.errors import DataError
from tunesmith.cluster.recipe.schema import Recipe
from tunesmith.trainers.data import formats
from tunesmith.trainers.data.build import LOOK, recognise
from tunesmith.trainers.data.formats import Completion, Example, Text
from tunesmith.trainers.data.prepare import prepare
from tunesmith.trainers.data.sources import read_rows
from tunesmith.trainers.data.tokens import TokenStore

BYTES_PER_TOKEN = 4
"""Of English text in current vocabularies, roughly. Code takes fewer, and other scripts vary more."""


@dataclass(frozen=True)
class Counts:
    """The training rows."""

    rows: int
    trained_tokens: int
    """Of one pass."""
    lines: list[str]
    """What people should know of the data, a line each."""
    max_length: int | None
    """Tokens of a full row; None without a tokenizer."""
    store: TokenStore | None
    """The rows themselves; None without a tokenizer."""


def has_documents(recipe: Recipe) -> bool:
    """Whether a source is plain text, in which there is no answer to train.

    Raises:
        DataError: a source is missing, empty, or of no known format.
    """
    looks = [recognise(source, list(islice(read_rows(source), LOOK)))[0] for source in recipe.data.train]
    return "text" in looks


def count(recipe: Recipe, tokenizer: BaseRef | None, cache: Path) -> Counts:
    """Tokenises the recipe's data as training would, into the same cache; or adds up its bytes.

    Raises:
        DataError: the data cannot be trained on.
    """
    if tokenizer is None:
        return _estimate(recipe)
    prepared = prepare(recipe, tokenizer, cache)
    train = prepared.report.splits["train"]
    return Counts(train.rows, train.trained_tokens, prepared.report.lines(), prepared.max_length, prepared.train)


def _estimate(recipe: Recipe) -> Counts:
    rows, size, unusable = 0, 0, 0
    for source in recipe.data.train:
        raws = read_rows(source)
        first = list(islice(raws, LOOK))
        fmt, _ = recognise(source, first)
        for raw in [*first, *raws]:
            example = formats.normalise(raw.row, fmt) if raw.row is not None else raw.problem or ""
            if isinstance(example, str):
                unusable += 1
            else:
                rows += 1
                size += _trained_bytes(example)
    names = ", ".join(source.path for source in recipe.data.train)
    if not rows:
        raise DataError(f"none of the {unusable:,} rows of {names} can be used", "See docs/data.md for the formats.")
    bad = f", {unusable:,} more cannot be used" if unusable else ""
    tokens = size // BYTES_PER_TOKEN
    line = f"{names}: {rows:,} rows{bad}, about {tokens:,} trained tokens (by bytes: the base's tokenizer is not here)"
    return Counts(rows, tokens, [line], None, None)


def _trained_bytes(example: Example) -> int:
    if isinstance(example, Text):
        texts = [example.text]
    elif isinstance(example, Completion):
        texts = [example.completion]
    else:
        turns = enumerate(example.messages)
        texts = [t["content"] for n, t in turns if t["role"] == "assistant" and n >= example.first_trained]
    return sum(len(text.encode("utf-8", errors="replace")) for text in texts)
