"""What a client's JSON schema may hold: engines compile it into an automaton, which a hostile one would blow up."""

from __future__ import annotations

import json
from typing import Any

MOST_BYTES, MOST_NODES, LONGEST_PATTERN, LARGEST_COUNT = 65_536, 5_000, 512, 10_000
"""Of a schema as JSON; its objects and lists; characters of a `pattern`; of `minLength`, `maxItems` and their like."""

_COUNTS = ("minLength", "maxLength", "minItems", "maxItems", "minProperties", "maxProperties", "minContains")


def check_schema(schema: dict[str, Any]) -> None:
    """Refuses a schema that is too large, or that points outside itself: nothing is ever fetched for a client.

    Raises:
        ValueError: what is wrong with it.
    """
    if (size := len(json.dumps(schema))) > MOST_BYTES:
        raise ValueError(f"schema: {size} bytes as JSON; {MOST_BYTES} at most")
    nodes: list[Any] = [schema]
    for seen, node in enumerate(nodes):  # it grows as it goes
        if seen >= MOST_NODES:
            raise ValueError(f"schema: more than {MOST_NODES} objects and lists")
        if isinstance(node, dict):
            _check_node(node)
        children = node.values() if isinstance(node, dict) else node
        nodes.extend(child for child in children if isinstance(child, dict | list))


def _check_node(node: dict[str, Any]) -> None:
    for key in ("$ref", "$dynamicRef", "$recursiveRef"):
        target = node.get(key)
        if isinstance(target, str) and not target.startswith("#"):
            raise ValueError(f"schema: {key} {json.dumps(target[:80])} is outside of the schema")
    pattern = node.get("pattern")
    if isinstance(pattern, str) and len(pattern) > LONGEST_PATTERN:
        raise ValueError(f"schema: a pattern of {len(pattern)} characters; {LONGEST_PATTERN} at most")
    for key in _COUNTS:
        count = node.get(key)
        if isinstance(count, int | float) and count > LARGEST_COUNT:
            raise ValueError(f"schema: {key} {count}; {LARGEST_COUNT} at most")
