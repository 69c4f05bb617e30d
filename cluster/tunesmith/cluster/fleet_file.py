"""Fleets files: the GPUs that come with Tunesmith, and what a user's file adds to them or changes in them."""

from __future__ import annotations

import difflib
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from tunesmith.cluster.errors import FleetError
from tunesmith.cluster.fleet import FleetBook, FleetShape, Gpu, GpuFigures, parse_fleet
from tunesmith.cluster.recipe.lines import KeyPath, dotted, read_yaml

VARIABLE = "TUNESMITH_FLEETS"
"""Environment variable with the path of a fleets file, for those who always want theirs."""
BUILT_IN = Path(__file__).with_name("gpus.yaml")
_SECTIONS: dict[str, type[BaseModel]] = {"gpus": GpuFigures, "fleets": FleetShape}


def load_fleets(path: str | Path | None = None) -> FleetBook:
    """The built-in GPUs with those of a file.

    An entry for a GPU that is built in changes only the figures that it writes.

    Args:
        path: a YAML file with `gpus:` and `fleets:`; None takes the one that TUNESMITH_FLEETS names, if it does.

    Raises:
        FleetError: naming file, line, key and nearest valid key of every mistake, or a fleet whose GPU or shape is none.
    """
    gpus = _read(BUILT_IN, {}).gpus
    path = path or os.environ.get(VARIABLE) or None
    if path is None:
        return FleetBook(gpus)
    book = _read(Path(path), gpus)
    for name in book.fleets:
        try:
            parse_fleet(name, book)
        except FleetError as error:
            raise FleetError(f"{path}: fleets.{name}: {error.what}", error.fix) from None
    return book


def _read(path: Path, known: Mapping[str, Gpu]) -> FleetBook:
    tree, lines = read_yaml(path, FleetError, "fleets file", "gpus and fleets")
    problems: list[str] = []
    made: dict[str, dict[str, Any]] = {"gpus": dict(known), "fleets": {}}
    for section, entries in tree.items():
        if section not in _SECTIONS:
            near = difflib.get_close_matches(section, list(_SECTIONS), n=1)
            hint = f"did you mean {near[0]}?" if near else "the keys here are gpus, fleets"
            problems.append(f"{path}:{lines[(section,)]}: {section}: no such key; {hint}")
            continue
        if not isinstance(entries, dict):
            problems.append(f"{path}:{lines[(section,)]}: {section}: a section of names, not {entries!r}")
            continue
        for name, entry in entries.items():
            try:
                made[section][_known_as(name, made[section])] = _entry(section, name, entry, made["gpus"])
            except ValidationError as invalid:
                errors = invalid.errors(include_url=False)
                problems += [_explain(error, (section, name), lines, path) for error in errors]
    if problems:
        count = f"{len(problems)} mistakes" if len(problems) > 1 else "a mistake"
        raise FleetError(f"{count} in {path}:\n" + "\n".join(f"  {problem}" for problem in problems))
    return FleetBook(made["gpus"], made["fleets"])


def _known_as(name: str, entries: dict[str, Any]) -> str:
    """The name as it is spelt already, or as it is written here."""
    return next((known for known in entries if known.lower() == name.lower()), name)


def _entry(section: str, name: str, entry: Any, gpus: dict[str, Gpu]) -> Gpu | FleetShape:
    if section == "fleets":
        return FleetShape.model_validate(entry)
    name = _known_as(name, gpus)
    before = gpus[name].model_dump(exclude={"name"}) if name in gpus else {}
    figures = GpuFigures.model_validate({**before, **entry} if isinstance(entry, dict) else entry)
    return Gpu(name=name, **figures.model_dump())


def _explain(error: ErrorDetails, entry: tuple[str, str], lines: dict[KeyPath, int], path: Path) -> str:
    """One line: where, which key, what is wrong, and the nearest valid key."""
    location: KeyPath = (*entry, *error["loc"])
    line = next(lines[location[:n]] for n in range(len(location), 0, -1) if location[:n] in lines)
    fields = list(_SECTIONS[entry[0]].model_fields)
    where = f"{path}:{line}: {dotted(location)}"
    if error["type"] == "extra_forbidden":
        near = difflib.get_close_matches(str(location[-1]), fields, n=1)
        return f"{where}: no such key; " + (f"did you mean {near[0]}?" if near else f"the keys are {', '.join(fields)}")
    if error["type"] == "missing":
        return f"{where}: missing; {'a GPU' if entry[0] == 'gpus' else 'a fleet'} needs it"
    if error["type"] == "model_type":
        return f"{where}: a section of keys ({', '.join(fields)}), not {error['input']!r}"
    return f"{where}: {error['msg'][0].lower()}{error['msg'][1:]}, not {error['input']!r}"
