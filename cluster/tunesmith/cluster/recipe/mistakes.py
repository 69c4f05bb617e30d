"""What is wrong with a written document of sections: each mistake with its line, its key and the nearest valid name."""

from __future__ import annotations

import difflib
from collections.abc import Iterator
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple, TypeVar, cast, get_args, get_origin

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from tunesmith.cluster.errors import UsageError
from tunesmith.cluster.recipe.lines import KeyPath, dotted
from tunesmith.cluster.recipe.section import Section

Document = TypeVar("Document", bound=Section)

_OF_A_NAME = "[key]"
"""What pydantic adds to a location when the name itself is wrong. What the schema has it add, for a member of a union, is in
brackets too."""


def checked(
    root: type[Document], tree: dict[str, Any], origins: dict[KeyPath, str], path: Path | str, error: type[UsageError]
) -> Document:
    """The document that a tree of plain values says.

    Args:
        root: class of the whole document.
        origins: where each key was written, as `file:line`.

    Raises:
        error: naming file, line, key and nearest valid key of every mistake.
    """
    try:
        return root.model_validate(tree)
    except ValidationError as invalid:
        reader = _Reader(root, origins, str(path))
        problems = list(reader.explained(invalid.errors(include_url=False)))
    count = f"{len(problems)} mistakes" if len(problems) > 1 else "a mistake"
    raise error(f"{count} in {path}:\n" + "\n".join(f"  {problem}" for problem in problems))


class _Reader(NamedTuple):
    """Explains pydantic's errors about one document."""

    root: type[Section]
    origins: dict[KeyPath, str]
    path: str

    def explained(self, errors: list[ErrorDetails]) -> Iterator[str]:
        """A line for each mistake; what a union's members each say of one value is one mistake."""

        def place(error: ErrorDetails) -> KeyPath:
            return self._written_path(error["loc"])

        for _, group in groupby(self._without_echoes(errors), key=place):
            several = list(group)
            if len(several) > 1 and all(len(one["loc"]) > len(place(one)) for one in several):
                yield self._none_of(several, place(several[0]))
            else:
                yield from map(self._explain, several)

    def _without_echoes(self, errors: list[ErrorDetails]) -> list[ErrorDetails]:
        """Leaves out that a key is missing when it stands in the same section misspelt, which is said anyway."""
        misspelt: set[KeyPath] = set()
        for error in errors:
            section = self._section_at(error["loc"][:-1])
            if error["type"] == "extra_forbidden" and section is not None:
                near = difflib.get_close_matches(str(error["loc"][-1]), list(section.model_fields), n=1)
                misspelt |= {(*error["loc"][:-1], key) for key in near}
        return [error for error in errors if error["type"] != "missing" or error["loc"] not in misspelt]

    def _none_of(self, errors: list[ErrorDetails], location: KeyPath) -> str:
        """One line for a value that no member of a union takes."""
        wanted = [
            str((one.get("ctx") or {}).get("expected") or one["msg"]).removeprefix("Input should be ").partition(",")[0]
            for one in errors
        ]
        value = f"{errors[0]['input']!r} is neither {' nor '.join(dict.fromkeys(wanted))}"
        return f"{self._where(location)}: {dotted(location)}: {value}"

    def _where(self, location: KeyPath) -> str:
        return next(
            (self.origins[location[:n]] for n in range(len(location), -1, -1) if location[:n] in self.origins),
            self.path,
        )

    def _explain(self, error: ErrorDetails) -> str:
        """One line: where, which key, what is wrong, and the nearest valid name."""
        location = self._written_path(error["loc"])
        where, key = self._where(location), dotted(location) or "the document"
        section = self._section_at(error["loc"][:-1])
        if error["type"] == "extra_forbidden":
            return f"{where}: {key}: no such key{self._suggest(str(location[-1]), section)}"
        if error["type"] == "missing":
            return f"{where}: {key}: missing; a {self.root.__name__.lower()} needs it"
        if error["type"] in ("literal_error", "union_tag_invalid"):
            return f"{where}: {key}: {_not_one_of(error)}"
        message = error["msg"].removeprefix("Value error, ")
        if error["type"] == "value_error":  # its message may begin with a key of this section
            named = dotted((*location, message.partition(":")[0]))
            place = next(
                (place for written, place in self.origins.items() if written and dotted(written) == named), None
            )
            return f"{place}: {dotted((*location, message))}" if place else f"{where}: {key}: {message}"
        own = self._section_at(error["loc"])
        if error["type"] == "model_type" and own is not None:
            found = (
                "nothing stands under it" if error["input"] is None else f"a section of keys, not {error['input']!r}"
            )
            return f"{where}: {key}: {found}; its keys are {', '.join(own.model_fields)}"
        if error["type"] == "dict_type":
            found = "nothing stands under it" if error["input"] is None else f"{error['input']!r} has no keys"
            return f"{where}: {key}: {found}; it is a mapping of keys to values"
        if error["type"] == "string_pattern_mismatch" and section is not None and location[-1] in section.model_fields:
            meaning = section.model_fields[str(location[-1])].description or message
            return f"{where}: {key}: {error['input']!r} does not fit: {meaning[0].lower()}{meaning[1:]}"
        shown = "a section" if isinstance(error["input"], dict | list) else repr(error["input"])
        return f"{where}: {key}: {message[0].lower()}{message[1:]}, not {shown}"

    def _written_path(self, loc: KeyPath) -> KeyPath:
        """Drops what pydantic adds to a location: a union's names for its members, and the list round a lone source."""
        kept: list[str | int] = []
        for index, part in enumerate(loc):
            is_name = isinstance(part, str) and self._is_name_of_member(part, loc[:index])
            is_added = isinstance(part, str) and part.startswith("[")
            if (*kept, part) in self.origins or (isinstance(part, str) and not is_name and not is_added):
                kept.append(part)
        return tuple(kept)

    def _is_name_of_member(self, part: str, before: KeyPath) -> bool:
        """Whether a part of a location names a union's member: below a value that is no section, or a kind of section."""
        at = self._section_at(before, tags=False)
        return at is None or (isinstance(at, _Several) and at.by_kind(part) is not None)

    def _section_at(self, loc: KeyPath, tags: bool = True) -> Any:
        """The section class that a location lies in; None below a plain value.

        Args:
            tags: whether a union of sections counts as none, because no kind was named.
        """
        section: Any = self.root
        names_an_entry = False  # of a mapping to sections
        for part in loc:
            if isinstance(part, int) or section is None or (part.startswith("[") and part != _OF_A_NAME):
                continue
            if names_an_entry:
                names_an_entry = False
                continue
            if isinstance(section, _Several):
                section = section.by_kind(part)
                continue
            fields = section.model_fields
            candidates = _section_classes(fields[part].annotation) if part in fields else []
            section = None if not candidates else candidates[0] if len(candidates) == 1 else _Several(candidates)
            names_an_entry = section is not None and get_origin(fields[part].annotation) is dict
        return None if names_an_entry or (tags and isinstance(section, _Several)) else section

    def _suggest(self, key: str, section: type[BaseModel] | None) -> str:
        """The nearest key of this section, else a key of this name in another one."""
        fields = list((section or self.root).model_fields)
        near = difflib.get_close_matches(key, fields, n=1, cutoff=0.6)
        near = near or [field for field in fields if key in (_initials(field), *field.split("_")) or f"_{key}" in field]
        if near:
            return f"; did you mean {' or '.join(near)}?"
        elsewhere = [place for place in all_keys(self.root) if place.rpartition(".")[2] == key]
        return f"; did you mean {elsewhere[0]}?" if elsewhere else f"; the keys here are {', '.join(fields)}"


class _Several:
    """The members of a union of sections, told apart by the name of their kind."""

    def __init__(self, members: list[type[BaseModel]]) -> None:
        self.members = members

    def by_kind(self, kind: str | int) -> type[BaseModel] | None:
        return next((m for m in self.members if kind in get_args(m.model_fields["kind"].annotation)), None)


def _not_one_of(error: ErrorDetails) -> str:
    context = error.get("ctx") or {}
    allowed = context.get("expected") or context.get("expected_tags", "")
    given = error["input"].get("kind") if isinstance(error["input"], dict) else error["input"]
    choices = [choice.strip("' ") for choice in allowed.replace(" or ", ",").split(",")]
    near = difflib.get_close_matches(str(given), choices, n=1)
    return f"{given!r} is not one of {allowed}" + (f"; did you mean {near[0]}?" if near else "")


def _section_classes(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, Section):
        return [annotation]
    return [found for argument in get_args(annotation) for found in _section_classes(argument)]


def _initials(key: str) -> str:
    """`lr` of `learning_rate`."""
    return "".join(word[0] for word in key.split("_"))


def all_keys(section: type[BaseModel], prefix: str = "") -> list[str]:
    """Every dotted key that a document of this section may have."""
    keys: list[str] = []
    for name, info in section.model_fields.items():
        keys.append(prefix + name)
        if get_origin(info.annotation) is dict:
            continue  # its keys are the user's
        for nested in _section_classes(info.annotation):
            keys += all_keys(cast(type[BaseModel], nested), f"{prefix}{name}.")
    return keys
