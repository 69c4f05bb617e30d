"""YAML files with the line of every key, so that a mistake can be answered with where it stands."""

from __future__ import annotations

import difflib
from pathlib import Path
from typing import Any

import yaml

from tunesmith.cluster.errors import UsageError

KeyPath = tuple[str | int, ...]


def read_yaml(path: Path, error: type[UsageError], kind: str, keys: str) -> tuple[dict[str, Any], dict[KeyPath, int]]:
    """The file's content as plain Python values, and the line of each key.

    Args:
        path: a YAML file whose root is a mapping.
        error: what to raise.
        kind: what such a file is called, such as `recipe`.
        keys: what stands in one, for the message: `name, model and data`.

    Raises:
        UsageError: of the given class, when the file is missing, unreadable, no YAML, no mapping, or has a key twice.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        near = difflib.get_close_matches(path.name, [p.name for p in path.parent.glob("*.y*ml")], n=1, cutoff=0.5)
        hint = f"Did you mean {path.parent / near[0]}?" if near else f"Give the path of a {kind}, a YAML file."
        raise error(f"no {kind} at {path}", hint) from None
    except OSError as unreadable:
        raise error(f"cannot read {path}: {unreadable.strerror or unreadable}") from None
    except UnicodeDecodeError as broken:
        raise error(f"cannot read {path}: invalid UTF-8 at byte {broken.start + 1}") from None
    try:
        root = yaml.compose(text, Loader=yaml.SafeLoader)
    except yaml.MarkedYAMLError as bad:
        mark = bad.problem_mark or bad.context_mark
        where = f"{path}:{mark.line + 1}" if mark else str(path)
        raise error(f"{where}: not valid YAML: {bad.problem}") from None
    except yaml.YAMLError as bad:
        raise error(f"{path}: not valid YAML: {bad}") from None
    if not isinstance(root, yaml.MappingNode):
        raise error(f"{path}: a {kind} is a mapping of keys such as {keys}")
    lines: dict[KeyPath, int] = {}
    return _to_python(root, (), lines, path, error), lines


def dotted(path: KeyPath | list[str | int]) -> str:
    """A key as users write it: `data.train.0.path`."""
    return ".".join(str(part) for part in path)


def _to_python(node: yaml.Node, at: KeyPath, lines: dict[KeyPath, int], path: Path, error: type[UsageError]) -> Any:
    """The node's value; notes the line of each key and refuses a key written twice."""
    lines.setdefault(at, node.start_mark.line + 1)
    if isinstance(node, yaml.MappingNode):
        result: dict[str, Any] = {}
        for key_node, value_node in node.value:
            key, line = str(key_node.value), key_node.start_mark.line + 1
            if key in result:
                first = lines[(*at, key)]
                raise error(f"{path}:{line}: {dotted((*at, key))} is written twice, first on line {first}")
            lines[(*at, key)] = line
            result[key] = _to_python(value_node, (*at, key), lines, path, error)
        return result
    if isinstance(node, yaml.SequenceNode):
        return [_to_python(item, (*at, index), lines, path, error) for index, item in enumerate(node.value)]
    return _scalar(node)


def _scalar(node: yaml.Node) -> Any:
    loader = yaml.SafeLoader("")
    try:
        value = loader.construct_object(node)
    finally:
        loader.dispose()
    return value
