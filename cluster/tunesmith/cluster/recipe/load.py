"""From a YAML file and `--set` overrides to a checked recipe, with the line of every mistake."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import yaml

from tunesmith.cluster.errors import RecipeError
from tunesmith.cluster.recipe.lines import KeyPath, dotted, read_yaml
from tunesmith.cluster.recipe.mistakes import checked
from tunesmith.cluster.recipe.schema import Recipe
from tunesmith.cluster.recipe.tune import Dimension


def load_recipe(path: str | Path, overrides: list[str] | None = None) -> Recipe:
    """Reads and checks a recipe.

    Args:
        path: a YAML file.
        overrides: `section.key=value` strings, the value in YAML; later ones win.

    Raises:
        RecipeError: naming the file, line, key and nearest valid key of every mistake.
    """
    path = Path(path)
    tree, lines = read_yaml(path, RecipeError, "recipe", "name, model, data and objective")
    origins: dict[KeyPath, str] = {key: f"{path}:{line}" for key, line in lines.items()}
    for override in overrides or []:
        _apply_override(tree, override, origins)
    recipe = checked(Recipe, tree, origins, path, RecipeError)
    recipe.forget_reads()
    recipe.written_at({dotted(key): place for key, place in origins.items()})
    return recipe


def resolved(recipe: Recipe) -> dict[str, Any]:
    """The recipe with every default written out, as plain JSON types."""
    return recipe.model_dump(mode="json")


def recipe_hash(recipe: Recipe) -> str:
    """Hex SHA-256 of the resolved recipe."""
    return hashlib.sha256(json.dumps(resolved(recipe), sort_keys=True).encode()).hexdigest()


def unread_error(recipe: Recipe) -> RecipeError | None:
    """An error that names the keys the user wrote and the run has not read, or None when all were read."""
    unread = recipe.unread_keys()
    if not unread:
        return None
    were = "key was" if len(unread) == 1 else "keys were"
    return RecipeError(
        f"{len(unread)} {were} accepted but nothing in this run reads {'it' if len(unread) == 1 else 'them'}: "
        + ", ".join(unread),
        "Remove what has no effect here, or change what makes it so (a template without conversations, a warm-up "
        "without a schedule, ...).",
    )


def _apply_override(tree: dict[str, Any], override: str, origins: dict[KeyPath, str]) -> None:
    key, equals, text = override.partition("=")
    if not equals or not key.strip():
        raise RecipeError(f"--set {override}: not of the form section.key=value")
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError as bad:
        raise RecipeError(f"--set {override}: the value is not valid YAML: {bad}") from None
    parts = _parts(key.strip())
    node: Any = tree
    for depth, part in enumerate(parts[:-1]):
        child = _child(node, parts[:depth], part, override)
        if isinstance(child, str) and dotted(parts[: depth + 1]) in ("objective", "adaptation"):
            child = {"kind": child}
            node[part] = child
        if child is None:
            child = {}
            node[part] = child
        node = child
    if isinstance(node, list):
        _child(node, parts[:-1], parts[-1], override)
    elif not isinstance(node, dict):
        raise RecipeError(f"--set {override}: {dotted(parts[:-1])} is not a section but {node!r}")
    container: Any = node
    container[parts[-1]] = value
    origins[tuple(parts)] = f"--set {override}"


def _parts(key: str) -> list[str | int]:
    """The way to a key. One below `tune.space` is a key of the recipe, with dots of its own."""
    names = key.split(".")
    if names[:2] == ["tune", "space"] and len(names) > 2:
        end = len(names) - (names[-1] in Dimension.model_fields)
        return ["tune", "space", ".".join(names[2:end]), *names[end:]]
    return [int(name) if name.isdigit() else name for name in names]


def _child(node: Any, at: list[str | int], part: str | int, override: str) -> Any:
    if isinstance(node, list):
        if not (isinstance(part, int) and part < len(node)):
            raise RecipeError(
                f"--set {override}: {dotted(at)} is a list of {len(node)}, numbered from 0, and has no {part!r}"
            )
        return node[part]
    if isinstance(node, dict):
        return node.get(part)
    raise RecipeError(f"--set {override}: {dotted(at)} is {node!r}, which has no {part!r} in it")
