"""The recipe's data section: sources, how they become rows, and what is held out."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, PositiveFloat, PositiveInt, field_validator, model_validator

from tunesmith.cluster.recipe.section import Fraction, Section


class Source(Section):
    """One data source."""

    path: Annotated[str, Field(min_length=1)]
    """A .jsonl, .json, .parquet or .csv file, a glob of them, a saved `datasets` folder, any fsspec URI of these, or a
    hub id of a data set."""
    weight: PositiveFloat | None = None
    """Share of an epoch's rows that come from this source, relative to the other weights. Give it for all sources or for
    none; with none, every row is seen once an epoch."""
    split: str = "train"
    """Which split of a hub data set or a `datasets` folder of several."""


class Split(Section):
    """Held-out shares of the training sources, chosen by a hash of each row: the same on every machine."""

    validation: Fraction = 0.05
    """Share of the rows held out for the evaluation loss. Not used when `data.validation` names sources."""
    test: Fraction = 0.0
    """Share of the rows never touched by training or model selection."""

    @model_validator(mode="after")
    def _leave_something_to_train(self) -> Split:
        if self.validation + self.test >= 1.0:
            raise ValueError(f"validation {self.validation} + test {self.test} leave no rows to train on")
        return self


class Data(Section):
    """What is trained on."""

    train: list[Source]
    """A path, or a list of paths or `{path, weight, split}`."""
    validation: list[Source] | None = None
    """Held-out sources of their own; None holds out a share of `train` (see `data.split`)."""
    template: Literal["tokenizer", "chatml", "llama3", "alpaca"] = "tokenizer"
    """How conversations become text. `tokenizer` is the template that came with the model."""
    loss_on: Literal["assistant", "all"] | None = None
    """Which tokens are trained. None means the assistant's for `sft`, and every token for `cpt`."""
    max_length: PositiveInt = 1024
    """Tokens in a packed row, and the longest a single example may be. At most the model's context."""
    long_rows: Literal["truncate", "drop", "split"] | None = None
    """What happens to an example longer than `max_length`; each is counted. None means `truncate` for `sft` and `split`
    (into several examples) for `cpt`."""
    packing: bool = True
    """Fills each row with several examples that cannot see each other. False gives each example a row of its own."""
    split: Split = Split()
    """Shares held out from `train`."""
    max_bad_rows: Annotated[float, Field(ge=0.0)] = 0
    """How many unusable rows may be set aside in quarantine.jsonl before the run stops: a count when 1 or more, a share
    of all rows when below 1. 0, the default, stops at the first, because a silent loss of data is worse than a stop."""

    @field_validator("train", "validation", mode="before")
    @classmethod
    def _paths_to_sources(cls, value: Any) -> Any:
        if isinstance(value, str | dict):
            value = [value]
        if isinstance(value, list):
            return [{"path": item} if isinstance(item, str) else item for item in value]
        return value

    @field_validator("train", "validation")
    @classmethod
    def _weights_for_all_or_none(cls, sources: list[Source] | None) -> list[Source] | None:
        if sources is None:
            return None
        if not sources:
            raise ValueError("an empty list: name at least one source")
        weighted = [source.path for source in sources if source.weight is not None]
        if weighted and len(weighted) < len(sources):
            raise ValueError(f"{len(weighted)} of {len(sources)} sources have a weight: give one to all or to none")
        return sources
