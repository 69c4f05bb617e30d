"""Who imports whom, read from the source without running it."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Literal

REPOSITORY = Path(__file__).resolve().parent.parent
ROOTS = ("cluster", "trainers", "tuning", "serving")
When = Literal["load", "late", "typing"]


@dataclass(frozen=True)
class Import:
    """One imported module.

    Attributes:
        target: full name, such as `torch.nn` or `tunesmith.cluster.errors`.
        when: `load` when the importing module is loaded, `late` inside a function, `typing` for type checkers only.
        line: of the import.
    """

    target: str
    when: When
    line: int

    @property
    def top(self) -> str:
        return self.target.partition(".")[0]


@cache
def modules() -> dict[str, Path]:
    """Every module of the four roots by its full name."""
    found = {}
    for root in ROOTS:
        for path in sorted((REPOSITORY / root).rglob("*.py")):
            parts = path.relative_to(REPOSITORY / root).with_suffix("").parts
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


@cache
def imports_of(module: str) -> tuple[Import, ...]:
    """What a module imports, packages of an imported module included."""
    tree = ast.parse(modules()[module].read_text(encoding="utf-8"))
    return tuple(_imports_in(tree.body, "load"))


def loaded_by(module: str) -> dict[str, str]:
    """Every module that loading `module` loads, with the chain of our modules that leads to it.

    Outside modules are given by their full names; what they load in turn is not followed.
    """
    chains = {module: module}
    waiting = [module]
    while waiting:
        current = waiting.pop()
        for found in imports_of(current):
            if found.when == "load" and found.target not in chains:
                chains[found.target] = f"{chains[current]} > {found.target}"
                if found.target in modules():
                    waiting.append(found.target)
    return chains


def _imports_in(body: list[ast.stmt], when: When) -> Iterator[Import]:
    for node in body:
        if isinstance(node, ast.Import | ast.ImportFrom):
            yield from (Import(target, when, node.lineno) for target in _targets(node))
        elif isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            yield from _imports_in(node.body, "typing")
            yield from _imports_in(node.orelse, when)
        else:
            inner: When = "late" if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) else when
            yield from _imports_in(_nested(node), inner)


def _nested(node: ast.stmt) -> list[ast.stmt]:
    """The statements inside a compound statement."""
    blocks = [getattr(node, name, []) for name in ("body", "orelse", "finalbody")]
    blocks += [part.body for part in [*getattr(node, "handlers", []), *getattr(node, "cases", [])]]
    return [statement for block in blocks for statement in block]


def _targets(node: ast.Import | ast.ImportFrom) -> Iterator[str]:
    if isinstance(node, ast.ImportFrom):
        assert node.level == 0, f"line {node.lineno}: a relative import; write the full name"
        names = [node.module or ""]
        names += [f"{node.module}.{alias.name}" for alias in node.names if f"{node.module}.{alias.name}" in modules()]
    else:
        names = [alias.name for alias in node.names]
    for name in names:
        if name.startswith("tunesmith."):
            parents = name.split(".")
            yield from (package for end in range(2, len(parents)) if (package := ".".join(parents[:end])) in modules())
        yield name
