"""Real text that every machine with Python has: the documentation of the standard library.

The source files are parsed, never imported, so nothing of them runs. The same Python gives the same entries in the same
order. The language reference (`help("with")` shows it) is included where Python brings it.
"""

from __future__ import annotations

import ast
import hashlib
import re
import sysconfig
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

_LEFT_OUT = {"__phello__", "distutils", "ensurepip", "idlelib", "lib2to3", "site-packages", "dist-packages"} | {
    "lib-dynload",
    "pydoc_data",
    "test",
    "tests",
    "turtledemo",
}
_BOUND = re.compile(r"^(self|cls)(, |$)")  # what the caller of a method does not write
_SHORTEST, _LONGEST = 20, 240  # characters of an answer that is a sentence rather than a stub or a story


@dataclass(frozen=True)
class Entry:
    """One documented thing."""

    name: str
    """Full name, such as `textwrap.dedent`; of a topic, its title."""
    kind: Literal["module", "class", "function", "topic"]
    """What it is."""
    signature: str
    """Arguments in parentheses; empty but for functions."""
    text: str
    """Its docstring, or the topic's page."""


def entries(library: Path | None = None) -> list[Entry]:
    """Everything public that has a docstring, then the topics of the language reference.

    Args:
        library: folder of the standard library's source; None takes the running Python's.
    """
    root = library or Path(sysconfig.get_path("stdlib"))
    found = [entry for path in sorted(root.rglob("*.py")) for entry in _entries_of(path, path.relative_to(root))]
    return found + _topics(root / "pydoc_data" / "topics.py")


def documents(found: Iterable[Entry]) -> list[str]:
    """One text per entry, headed by what it documents."""
    heading = {"module": "module {0.name}", "class": "class {0.name}", "function": "def {0.name}{0.signature}"}
    return [
        entry.text if entry.kind == "topic" else f"{heading[entry.kind].format(entry)}\n\n{entry.text}"
        for entry in found
    ]


def conversations(found: Iterable[Entry], limit: int) -> list[list[dict[str, str]]]:
    """Questions about the entries and the documentation's own answers, as chats of two messages.

    At most `limit` of them, picked by a hash of the question, so that they come from all over the library.
    """
    pairs = dict(pair for entry in found for pair in _questions(entry))
    picked = sorted(pairs, key=lambda question: hashlib.sha256(question.encode()).digest())[:limit]
    return [
        [{"role": "user", "content": question}, {"role": "assistant", "content": pairs[question]}]
        for question in picked
    ]


def first_sentence(text: str) -> str:
    """The first sentence of a docstring on one line, ended by a full stop; empty when it is a stub or a story."""
    paragraph = " ".join(text.split("\n\n", 1)[0].split())
    sentence = paragraph.split(". ", 1)[0].rstrip(".:")
    return f"{sentence}." if _SHORTEST <= len(sentence) <= _LONGEST else ""


def _questions(entry: Entry) -> Iterator[tuple[str, str]]:
    asked = {"module": "What is the module {} for?", "class": "What is {}?", "function": "What does {} do?"}
    answer = first_sentence(entry.text)
    if entry.kind in asked and answer:
        yield asked[entry.kind].format(entry.name), answer
    if entry.kind == "function":
        yield f"How do I call {entry.name}?", f"{entry.name}{entry.signature}"


def _entries_of(path: Path, relative: Path) -> Iterator[Entry]:
    parts = list(relative.with_suffix("").parts)
    if parts[-1] == "__init__":
        parts.pop()
    if any(part in _LEFT_OUT or part.startswith(("_", "config-")) for part in parts):
        return
    try:
        tree = ast.parse(path.read_bytes())
    except SyntaxError:  # deliberately broken examples lie about in some Pythons
        return
    module = ".".join(parts)
    if text := ast.get_docstring(tree):
        yield Entry(module, "module", "", text)
    yield from _definitions(tree.body, module)


def _definitions(body: list[ast.stmt], prefix: str) -> Iterator[Entry]:
    for node in body:
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef) or node.name.startswith("_"):
            continue
        name, text = f"{prefix}.{node.name}", ast.get_docstring(node)
        if isinstance(node, ast.ClassDef):
            if text:
                yield Entry(name, "class", "", text)
            yield from _definitions(node.body, name)
        elif text:
            arguments = ast.unparse(node.args)
            yield Entry(name, "function", f"({_BOUND.sub('', arguments)})", text)


def _topics(path: Path) -> list[Entry]:
    if not path.is_file():
        return []
    for node in ast.parse(path.read_bytes()).body:
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Dict):
            pages: dict[str, str] = ast.literal_eval(node.value)
            return [Entry(title, "topic", "", pages[title]) for title in sorted(pages)]
    return []
