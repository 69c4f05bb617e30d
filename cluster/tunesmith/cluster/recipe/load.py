"""From a YAML file and `--set` overrides to a checked recipe, with the line of every mistake."""

from __future__ import annotations

import difflib
import hashlib
import json
from pathlib import Path
from typing import Any, cast, get_args

import yaml
from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from tunesmith.cluster.errors import RecipeError
from tunesmith.cluster.recipe.lines import KeyPath, dotted, read_yaml
from tunesmith.cluster.recipe.schema import Recipe
from tunesmith.cluster.recipe.section import Section


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
    try:
        recipe = Recipe.model_validate(tree)
    except ValidationError as invalid:
        problems = [_explain(error, origins, str(path)) for error in _without_echoes(invalid.errors(include_url=False))]
        count = f"{len(problems)} mistakes" if len(problems) > 1 else "a mistake"
        raise RecipeError(f"{count} in {path}:\n" + "\n".join(f"  {problem}" for problem in problems)) from None
    recipe.forget_reads()
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
    parts: list[str | int] = [int(part) if part.isdigit() else part for part in key.strip().split(".")]
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


def _without_echoes(errors: list[ErrorDetails]) -> list[ErrorDetails]:
    """Leaves out that a key is missing when it stands in the same section misspelt, which is said anyway."""
    misspelt: set[KeyPath] = set()
    for error in errors:
        section = _section_at(error["loc"][:-1])
        if error["type"] == "extra_forbidden" and section is not None:
            near = difflib.get_close_matches(str(error["loc"][-1]), list(section.model_fields), n=1)
            misspelt |= {(*error["loc"][:-1], key) for key in near}
    return [error for error in errors if error["type"] != "missing" or error["loc"] not in misspelt]


def _explain(error: ErrorDetails, origins: dict[KeyPath, str], path: str) -> str:
    """One line: where, which key, what is wrong, and the nearest valid name."""
    location = _written_path(error["loc"], origins)
    where = next((origins[location[:n]] for n in range(len(location), -1, -1) if location[:n] in origins), path)
    key = dotted(location) or "the recipe"
    section = _section_at(error["loc"][:-1])
    if error["type"] == "extra_forbidden":
        return f"{where}: {key}: no such key{_suggest(str(location[-1]), section)}"
    if error["type"] == "missing":
        return f"{where}: {key}: missing; a recipe needs it"
    if error["type"] in ("literal_error", "union_tag_invalid"):
        allowed = (error.get("ctx") or {}).get("expected") or (error.get("ctx") or {}).get("expected_tags", "")
        given = error["input"].get("kind") if isinstance(error["input"], dict) else error["input"]
        near = difflib.get_close_matches(
            str(given), [a.strip("' ") for a in allowed.replace(" or ", ",").split(",")], n=1
        )
        hint = f"; did you mean {near[0]}?" if near else ""
        return f"{where}: {key}: {given!r} is not one of {allowed}{hint}"
    message = error["msg"].removeprefix("Value error, ")
    if error["type"] == "value_error":
        named = tuple(message.partition(":")[0].split("."))  # a mistake of the whole recipe begins with a key
        return f"{origins[named]}: {message}" if not location and named in origins else f"{where}: {key}: {message}"
    own = _section_at(error["loc"])
    if error["type"] == "model_type" and own is not None:
        found = "nothing stands under it" if error["input"] is None else f"a section of keys, not {error['input']!r}"
        return f"{where}: {key}: {found}; its keys are {', '.join(own.model_fields)}"
    if error["type"] == "string_pattern_mismatch" and section is not None:
        meaning = section.model_fields[str(location[-1])].description or message
        return f"{where}: {key}: {error['input']!r} does not fit: {meaning[0].lower()}{meaning[1:]}"
    shown = "a section" if isinstance(error["input"], dict | list) else repr(error["input"])
    return f"{where}: {key}: {message[0].lower()}{message[1:]}, not {shown}"


def _written_path(loc: tuple[str | int, ...], origins: dict[KeyPath, str]) -> KeyPath:
    """Drops what pydantic adds to a location: tags of a union, and the list round a lone source."""
    kept: list[str | int] = []
    for index, part in enumerate(loc):
        is_last, candidate = index == len(loc) - 1, (*kept, part)
        if (
            candidate in origins
            or (is_last and isinstance(part, str) and not _is_tag(kept, part))
            or not (isinstance(part, int) or _is_tag(kept, part))
        ):
            kept.append(part)
    return tuple(kept)


def _is_tag(before: list[str | int], part: str | int) -> bool:
    return before == ["adaptation"] and part in ("full", "lora", "peft")


def _section_at(loc: tuple[str | int, ...]) -> type[BaseModel] | None:
    """The section class that a location lies in, for suggestions."""
    section: Any = Recipe
    for part in loc:
        if isinstance(part, int):
            continue
        candidates = _section_classes(section.model_fields[part].annotation) if part in section.model_fields else []
        if candidates:
            section = candidates[0] if len(candidates) == 1 else _Several(candidates)
        elif isinstance(section, _Several):
            section = section.by_kind(part)
    return section if isinstance(section, type) else None


class _Several:
    """The members of a union of sections, told apart by the name of their kind."""

    model_fields: dict[str, Any] = {}  # noqa: RUF012 - a union has no fields of its own

    def __init__(self, members: list[type[BaseModel]]) -> None:
        self.members = members

    def by_kind(self, kind: str | int) -> type[BaseModel]:
        return next(m for m in self.members if kind in get_args(m.model_fields["kind"].annotation))


def _section_classes(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, Section):
        return [annotation]
    return [found for argument in get_args(annotation) for found in _section_classes(argument)]


def _suggest(key: str, section: type[BaseModel] | None) -> str:
    """The nearest key of this section, else a key of this name in another one."""
    fields = list((section or Recipe).model_fields)
    near = difflib.get_close_matches(key, fields, n=1, cutoff=0.6)
    near = near or [field for field in fields if key in (_initials(field), *field.split("_")) or f"_{key}" in field]
    if near:
        return f"; did you mean {' or '.join(near)}?"
    elsewhere = [place for place in _all_keys(Recipe) if place.rpartition(".")[2] == key]
    if elsewhere:
        return f"; did you mean {elsewhere[0]}?"
    return f"; the keys here are {', '.join(fields)}"


def _initials(key: str) -> str:
    """`lr` of `learning_rate`."""
    return "".join(word[0] for word in key.split("_"))


def _all_keys(section: type[BaseModel], prefix: str = "") -> list[str]:
    keys: list[str] = []
    for name, info in section.model_fields.items():
        keys.append(prefix + name)
        for nested in _section_classes(info.annotation):
            keys += _all_keys(cast(type[BaseModel], nested), f"{prefix}{name}.")
    return keys
