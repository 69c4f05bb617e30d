"""What is wrong with a document: where, by which rule, and what to do."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from tunesmith.cluster.recipe.lines import KeyPath

Document = Mapping[str, Any]


@dataclass(frozen=True)
class Finding:
    """One mistake.

    Attributes:
        rule: name of the rule, as docs/kubernetes.md lists it.
        path: keys and indices from the document's root.
        what: what is wrong, with the values that show it.
        fix: what to write instead.
    """

    rule: str
    path: KeyPath
    what: str
    fix: str
    file: str = ""
    document: str = ""

    def at(self, file: str, document: str) -> Finding:
        """The same mistake with where its document stands."""
        return replace(self, file=file, document=document)

    @property
    def where(self) -> str:
        """The path as people write it: `spec.workerGroupSpecs[0].groupName`."""
        text = ""
        for part in self.path:
            text += f"[{part}]" if isinstance(part, int) else f".{part}" if "." not in part else f"[{part!r}]"
        return text.removeprefix(".") or "the document"

    def line(self) -> str:
        """One line for people."""
        return f"{self.file}: {self.document}: {self.where}: {self.what} ({self.rule})\n    {self.fix}"

    def as_json(self) -> dict[str, str]:
        """Plain values."""
        return {
            "file": self.file,
            "document": self.document,
            "path": self.where,
            "rule": self.rule,
            "what": self.what,
            "fix": self.fix,
        }
