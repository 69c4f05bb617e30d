"""Writes the reference of the recipe from the schema's own docstrings.

python -m tunesmith.cluster.recipe.reference > docs/recipe.md
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from typing import Any

from tunesmith.cluster.recipe.schema import Recipe

_INTRODUCTION = """\
# The recipe

<!-- Generated: python -m tunesmith.cluster.recipe.reference > docs/recipe.md -->

A recipe is one YAML file that says everything about a run. This is a whole one; the rest has defaults:

```yaml
name: support-bot
model: {base: meta-llama/Llama-3.1-8B}
data: {train: tickets.jsonl}
objective: sft
adaptation: lora
```

A key that does not exist is refused with its line and the nearest key that does; so is a key that the run would never
read. `tunesmith validate RECIPE` checks a recipe, `--set section.key=value` overrides a key on the command line, and the
recipe with every default filled in is kept in the run's folder as `recipe.yaml`. Relative paths start from the folder in
which the command is called.
"""

_LEAST = {"name": "x", "model": {"base": "x"}, "data": {"train": "x"}, "objective": "sft", "adaptation": "lora"}
_SAME = {"data.validation"}  # takes what `data.train` takes


ENTRY = ".KEY"
"""Stands for a key of the user's."""


def markdown() -> str:
    """The reference: a section for each section of the recipe, a row for each key."""
    schema = Recipe.model_json_schema()
    return "\n".join([_INTRODUCTION, *_section(schema, "", schema["$defs"])]).rstrip() + "\n"


def _section(schema: dict[str, Any], path: str, definitions: dict[str, Any]) -> Iterator[str]:
    """The table of one section, then the sections inside it."""
    yield f"## {f'`{path}`' if path else 'Top level'}\n"
    if path:
        yield f"{schema['description']}\n"
    yield "| key | value | default | meaning |\n| --- | --- | --- | --- |"
    required = schema.get("required", [])
    for key, field in schema["properties"].items():
        default = (
            "**required**"
            if key in required
            else _spelled(field["default"] if "default" in field else _made(path, key))
        )
        meaning = " ".join((field.get("description") or _purpose(field, definitions)).split()).replace("|", "\\|")
        yield f"| `{key}` | {_value(field, path, key, definitions)} | {default} | {meaning} |"
    yield ""
    for key, field in schema["properties"].items():
        for name in _sections_of(field):
            inner = definitions[name]
            kind = inner["properties"].get("kind", {}).get("const")
            where = f"{path}.{key}{ENTRY if _is_mapping(field) else ''}".strip(".")
            if where not in _SAME:
                yield from _section(inner, f"{where}: {kind}" if kind else where, definitions)


def _value(field: dict[str, Any], path: str, key: str, definitions: dict[str, Any]) -> str:
    """What may be written for a key, in words."""
    if "$ref" in field:
        return f"a section, [below](#{_anchor(path, key)})"
    if "allOf" in field:
        return _value(field["allOf"][0], path, key, definitions)
    if "const" in field:
        return f"`{field['const']}`"
    if "enum" in field:
        return ", ".join(_spelled(option) for option in field["enum"])
    choices = [option for option in field.get("oneOf", field.get("anyOf", [])) if option.get("type") != "null"]
    if choices:
        if len(choices) > 1 and all("$ref" in option for option in choices):
            names = [definitions[_name(option)]["properties"]["kind"]["const"] for option in choices]
            return "one of the sections below: " + ", ".join(f"`{name}`" for name in names)
        return " or ".join(_value(option, path, key, definitions) for option in choices)
    if _is_mapping(field):
        return f"a section for each key, [below](#{_anchor(path, key + ENTRY)})"
    if field["type"] == "array":
        return _list(field, path, key, definitions)
    words = {
        "string": "text",
        "integer": "whole number",
        "number": "number",
        "boolean": "`true`, `false`",
        "object": "keys and values",
    }
    return words[field["type"]] + _limits(field)


def _list(field: dict[str, Any], path: str, key: str, definitions: dict[str, Any]) -> str:
    if "prefixItems" in field:
        return f"`[{', '.join('number' for _ in field['prefixItems'])}]`"
    items = field["items"]
    if "$ref" in items:
        return "a path, or a list of sources, [below](#datatrain)"
    return f"a list of {_value(items, path, key, definitions)}" if items else "a list"


def _is_mapping(field: dict[str, Any]) -> bool:
    """Whether a key holds sections under keys of the user's."""
    inside = field.get("additionalProperties")
    return isinstance(inside, dict) and "$ref" in inside


def _purpose(field: dict[str, Any], definitions: dict[str, Any]) -> str:
    """What the section that a key holds is for."""
    return definitions[_name(field)]["description"] if "$ref" in field else ""


def _made(path: str, key: str) -> Any:
    """A default that the schema makes anew for each recipe, and so does not show."""
    value: Any = Recipe.model_validate(_LEAST).model_dump(mode="json")
    for part in [*path.split("."), key]:
        value = value[part]
    return value


def _limits(field: dict[str, Any]) -> str:
    signs = {"exclusiveMinimum": ">", "minimum": "≥", "exclusiveMaximum": "<", "maximum": "≤"}
    parts = [f"{sign} {field[name]:g}" for name, sign in signs.items() if name in field]
    return f" {', '.join(parts)}" if parts else ""


def _sections_of(field: dict[str, Any]) -> list[str]:
    """Names of the sections that a key holds, in the schema's definitions."""
    found = [_name(field)] if "$ref" in field else []
    for option in [*field.get("allOf", []), *field.get("oneOf", []), *field.get("anyOf", [])]:
        found += _sections_of(option)
    for name in ("items", "additionalProperties"):
        found += _sections_of(field[name]) if isinstance(field.get(name), dict) else []
    return list(dict.fromkeys(found))


def _name(reference: dict[str, Any]) -> str:
    return reference["$ref"].rpartition("/")[2]


def _anchor(path: str, key: str) -> str:
    """As code hosts make it from a heading: dots fall away, capitals too."""
    return f"{path}.{key}".replace(".", "").lower()


def _spelled(value: Any) -> str:
    """A value as YAML has it; a section's defaults are not repeated."""
    if value is None:
        return "none"
    if isinstance(value, dict):
        return "as below"
    return f"`{value if isinstance(value, str) else json.dumps(value)}`"


if __name__ == "__main__":
    sys.stdout.write(markdown())
