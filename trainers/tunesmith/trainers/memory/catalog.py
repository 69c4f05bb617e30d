"""Well-known models by name: their shapes, so that a plan needs neither weights nor a network."""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import yaml

_TABLE = Path(__file__).with_name("catalog.yaml")
_VARIANTS = frozenset({"instruct", "chat", "it", "pt", "base", "hf", "thinking", "meta", "2507"})
"""Words in a name that say what a model was trained for, not which shape it has."""


@dataclass(frozen=True)
class Entry:
    """One model."""

    name: str
    """Its name on the hub."""
    parameters: int
    """How many it has, a tied head counted once; of a model with a vision tower, its text model's."""
    config: Mapping[str, Any]
    """What its config.json says about its shape: `AutoConfig.for_model(**entry.config)`."""
    also: tuple[str, ...] = ()
    """Other names of the same shape."""


@cache
def entries() -> tuple[Entry, ...]:
    """All of them, in the order of the table."""
    table: dict[str, Any] = yaml.load(_TABLE.read_text(encoding="utf-8"), Loader=_fastest_loader())
    return tuple(
        Entry(name, entry["parameters"], entry["config"], tuple(entry.get("also", ()))) for name, entry in table.items()
    )


def find(reference: str) -> Entry | None:
    """The model of this name, or None. It is for names: whoever has a folder reads its config.json instead.

    The owner, case, and words such as Instruct or Chat do not matter, because they do not change a shape; whether the
    same name of another owner has the same shape is taken for granted, so say which entry a plan used.

    Args:
        reference: such as `meta-llama/Llama-3.1-8B-Instruct` or `qwen2.5-7b`.
    """
    if not re.fullmatch(r"\w[\w.\-]*(/\w[\w.\-]*)?", reference):
        return None  # a path, `run:NAME`, or nothing that the hub would take
    return _by_name().get(_bare(reference)) or _by_shape().get(_shape_name(reference))


def nearest(reference: str, most: int = 3) -> list[str]:
    """Names of models that are written like this one, best first; empty when none is near."""
    names = {_shape_name(name): entry.name for name, entry in reversed(_named())}
    near = difflib.get_close_matches(_shape_name(reference), names, n=2 * most, cutoff=0.6)
    return list(dict.fromkeys(names[key] for key in near))[:most]


def _named() -> list[tuple[str, Entry]]:
    return [(name, entry) for entry in entries() for name in (entry.name, *entry.also)]


@cache
def _by_name() -> dict[str, Entry]:
    return {_bare(name): entry for name, entry in reversed(_named())}


@cache
def _by_shape() -> dict[str, Entry]:
    return {_shape_name(name): entry for name, entry in reversed(_named())}


def _bare(reference: str) -> str:
    """Without owner and case."""
    return reference.rpartition("/")[2].lower().replace("_", "-")


def _shape_name(reference: str) -> str:
    """Without the words that do not change a shape."""
    return "-".join(word for word in _bare(reference).split("-") if word not in _VARIANTS)


def _fastest_loader() -> type:
    return getattr(yaml, "CSafeLoader", yaml.SafeLoader)
