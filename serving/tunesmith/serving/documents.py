"""JSON of unknown origin: bounded in depth, unambiguous where it matters, and never a way to name code."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from tunesmith.cluster.errors import AdapterError

DEEPEST = 48
"""Levels of nesting that are read."""


def parse_json(data: bytes, shown: str, strict: bool = False) -> Any:
    """The value of a JSON document.

    Args:
        shown: what errors call the document.
        strict: whether a key that stands twice, NaN and Infinity are refused too; readers disagree about them.

    Raises:
        AdapterError: it is no JSON, or nested more deeply than DEEPEST.
    """

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for key, value in pairs:
            if key in found:
                raise AdapterError(f"{shown}: the key {key[:80]!r} stands twice")
            found[key] = value
        return found

    def constant(text: str) -> None:
        raise AdapterError(f"{shown}: {text} is no JSON number")

    hooks: dict[str, Any] = {"object_pairs_hook": once, "parse_constant": constant} if strict else {}
    too_deep = AdapterError(f"{shown}: nested more deeply than {DEEPEST} levels")
    try:
        value = json.loads(data.decode(), **hooks)
    except RecursionError:
        raise too_deep from None
    except ValueError as error:
        raise AdapterError(f"{shown}: not JSON: {str(error)[:200]}") from error
    level = [value]
    for _ in range(DEEPEST + 1):
        level = [below for node in level for below in _below(node)]
        if not level:
            return value
    raise too_deep


def refuse_code(value: Any, shown: str) -> None:
    """Refuses what makes a loader import or download code.

    Raises:
        AdapterError: names the key and what it holds.
    """
    for key, held in _pairs(value):
        named = isinstance(held, str | list | dict) and bool(held)
        if (key in ("auto_map", "custom_pipelines") and named) or (
            key == "trust_remote_code" and (named or held is True)
        ):
            raise AdapterError(
                f"{shown}: {key} names code to be run: {str(held)[:80]}",
                "Adapters are weights and settings; take the key out, and serve it on a base that needs no code.",
            )


def is_count(value: Any) -> bool:
    """Whether a JSON value is a whole number, 0 or above."""
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _below(node: Any) -> list[Any]:
    """What a node holds, without the plain values."""
    held = node.values() if isinstance(node, dict) else node if isinstance(node, list) else ()
    return [one for one in held if isinstance(one, dict | list)]


def _pairs(value: Any) -> Iterator[tuple[str, Any]]:
    waiting = [value]
    while waiting:
        node = waiting.pop()
        if isinstance(node, dict):
            yield from node.items()
        waiting += _below(node)
