"""What became of every row: the account that `data.json` keeps of a run."""

from __future__ import annotations

from pydantic import BaseModel

FORMAT_NAMES = {
    "messages": "chat messages",
    "sharegpt": "ShareGPT conversations",
    "alpaca": "Alpaca instructions",
    "prompt_completion": "prompt and completion",
    "text": "plain text",
}


_NAMED = 8
"""Ignored columns that a line names."""


class BadRow(BaseModel):
    """A row that was not used."""

    file: str
    line: int
    reason: str

    def __str__(self) -> str:
        return f"{self.file}:{self.line}: {self.reason}"


class SourceReport(BaseModel):
    """One source. `rows` is the sum of `used`, `bad` and `dropped`."""

    path: str
    role: str
    """`train` or `validation`: the list of the recipe that names it."""
    format: str
    columns: list[str]
    ignored: list[str] = []
    """Columns that hold something and are not read."""
    rows: int = 0
    used: int = 0
    bad: int = 0
    """Rows that could not be used: they count against `data.max_bad_rows`."""
    truncated: int = 0
    dropped: int = 0
    """Rows set aside by the rule for long rows."""
    split: int = 0
    """Long rows that became several examples."""
    examples: int = 0
    tokens: int = 0
    trained_tokens: int = 0
    """Labels: trained tokens that have a predecessor."""


class SplitReport(BaseModel):
    """One split."""

    rows: int
    examples: int
    tokens: int
    trained_tokens: int


class DataReport(BaseModel):
    """The whole data set."""

    sources: list[SourceReport]
    splits: dict[str, SplitReport]
    """`train`, `validation`, `test`."""
    bad_rows: list[BadRow]
    """The first 100; quarantine.jsonl in the same folder has all, and those that were dropped."""
    max_length: int
    """Tokens in force: `data.max_length`, or the model's context where that is shorter."""
    max_length_note: str | None = None
    """Set when the model's context cut the default of `data.max_length`."""
    long_rows: str
    loss_on: str
    template: str | None = None
    """Name of the template; None when no row is a conversation."""
    chat_template: str | None = None
    """The template itself, as the artifact's tokenizer must carry it."""
    end_of_turn: int | None = None
    """Token that ends an assistant's turn; None when no row is a conversation or every token is trained."""
    split_notes: list[str] = []
    """Shares that equal rows, which stay together, have moved far from what was asked."""
    leaked_rows: int = 0
    """Rows of `data.validation` that are also trained on."""

    @property
    def skipped_rows(self) -> int:
        """Rows that no example came from."""
        return sum(source.bad + source.dropped for source in self.sources)

    def lines(self) -> list[str]:
        """What a person should know, a line each."""
        said = [_source_line(source) for source in self.sources]
        for name, split in self.splits.items():
            if split.rows:
                said.append(f"{name}: {split.rows:,} rows, {split.tokens:,} tokens, {split.trained_tokens:,} trained")
        said.extend(self.split_notes)
        if self.template:
            said.append(f"conversations follow the template {self.template}; loss on {self.loss_on}")
        if self.max_length_note:
            said.append(self.max_length_note)
        if self.leaked_rows:
            said.append(
                f"{self.leaked_rows:,} rows of data.validation are also trained on: the evaluation loss flatters"
            )
        return said


def _source_line(source: SourceReport) -> str:
    counts = [f"{source.rows:,} rows", f"{source.used:,} used"]
    for name in ("bad", "truncated", "dropped", "split"):
        if count := getattr(source, name):
            counts.append(f"{count:,} {name}")
    said = f"{source.path}: {FORMAT_NAMES[source.format]}, {', '.join(counts)}"
    if not source.ignored:
        return said
    more = f" and {len(source.ignored) - _NAMED:,} more" if len(source.ignored) > _NAMED else ""
    return f"{said}; ignored columns: {', '.join(source.ignored[:_NAMED])}{more}"
