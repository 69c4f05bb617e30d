"""A section of the recipe, which remembers the keys that were read.

A key that was accepted but never read is a silent mistake: the user believes it did something. Every attribute access
is recorded, so that the end of set-up can name the keys that nothing has used.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Annotated, Any, get_args

from pydantic import BaseModel, ConfigDict, Field, PrivateAttr, model_validator

Fraction = Annotated[float, Field(ge=0.0, lt=1.0)]


class Section(BaseModel):
    """Strict, immutable base of all sections."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True, allow_inf_nan=False)

    _read: set[str] = PrivateAttr(default_factory=set)

    @model_validator(mode="before")
    @classmethod
    def _no_truth_for_a_number(cls, written: Any) -> Any:
        """YAML reads `yes` and `on` as true, and Python would count with it."""
        for key, value in written.items() if isinstance(written, dict) else ():
            field = cls.__pydantic_fields__.get(key)
            if isinstance(value, bool) and field is not None and _takes_a_number(field.annotation):
                raise ValueError(f"{key}: {str(value).lower()} is not a number (YAML reads yes, no, on and off so)")
        return written

    def __getattribute__(self, name: str) -> Any:
        if not name.startswith("_") and name in type(self).__pydantic_fields__:
            private = object.__getattribute__(self, "__pydantic_private__")
            if private is not None:
                private["_read"].add(name)
        return super().__getattribute__(name)

    def __eq__(self, other: object) -> bool:
        """By value; what was read of it is no part of that."""
        return type(self) is type(other) and self.__dict__ == other.__dict__

    def forget_reads(self) -> None:
        """Forgets what was read so far: validation itself reads keys, and that does not count."""
        self._read.clear()
        for _, section in self._sections():
            section.forget_reads()

    def mark_read(self, keys: Iterable[str]) -> None:
        """Takes over the dotted keys that another process has read."""
        for key in keys:
            node: Any = self
            for part in key.split("."):
                if isinstance(node, Section):
                    node._read.add(part)
                    node = node.__dict__[part]
                else:
                    node = node[int(part)]

    def read_keys(self) -> list[str]:
        """Dotted keys of the leaves that were read, list items by index (`data.train.0.path`)."""
        return [key for key, was_read in self._leaves() if was_read]

    def unread_keys(self) -> list[str]:
        """Dotted keys that the user wrote and nothing has read. A `kind` is read by validation: it chooses the section."""
        leaves = self._leaves(written_only=True)
        return [key for key, was_read in leaves if not was_read and key.rpartition(".")[2] != "kind"]

    def _sections(self) -> Iterator[tuple[str, Section]]:
        for name, value in self.__dict__.items():
            if isinstance(value, Section):
                yield name, value
            elif isinstance(value, list):
                for index, item in enumerate(value):
                    if isinstance(item, Section):
                        yield f"{name}.{index}", item

    def _leaves(self, written_only: bool = False) -> Iterator[tuple[str, bool]]:
        nested = dict(self._sections())
        parents = {name.partition(".")[0] for name in nested}
        for name in self.__dict__:
            if name not in parents and not (written_only and name not in self.model_fields_set):
                yield name, name in self._read
        for prefix, section in nested.items():
            if not written_only or prefix.partition(".")[0] in self.model_fields_set:
                for key, was_read in section._leaves(written_only):
                    yield f"{prefix}.{key}", was_read


def _takes_a_number(annotation: Any) -> bool:
    return annotation in (int, float) or any(_takes_a_number(argument) for argument in get_args(annotation))
