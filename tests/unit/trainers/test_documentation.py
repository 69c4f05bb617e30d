"""The corpus: real, complete, the same each time, and read without running anything."""

from __future__ import annotations

import sys
from pathlib import Path

from tunesmith.trainers import documentation
from tunesmith.trainers.documentation import Entry

MODULE = '''"""Knots, and how to tie them.

More about knots.
"""
raise SystemExit("nobody may run this file")

class Rope:
    """A rope of some length. It bends."""

    def cut(self, at, *, clean=True):
        """Cut the rope at a distance from its start."""

    def _splice(self):
        """Private."""

def undocumented(): ...

async def tie(rope: Rope, times: int = 2) -> None:
    """Tie a knot into the rope
    as often as asked.
    """
'''


def library(folder: Path) -> Path:
    for name in ("knots.py", "test/knots.py", "_hidden.py", "sails/__init__.py"):
        path = folder / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(MODULE)
    (folder / "broken.py").write_text("def (:")
    return folder


def test_public_names_are_found_without_running_the_files(tmp_path: Path) -> None:
    found = documentation.entries(library(tmp_path))
    names = [(entry.name, entry.kind, entry.signature) for entry in found if entry.name.startswith("knots")]
    assert names == [
        ("knots", "module", ""),
        ("knots.Rope", "class", ""),
        ("knots.Rope.cut", "function", "(at, *, clean=True)"),
        ("knots.tie", "function", "(rope: Rope, times: int=2)"),
    ]
    assert {entry.name.split(".")[0] for entry in found} == {"knots", "sails"}


def test_documents_are_headed_by_what_they_document(tmp_path: Path) -> None:
    texts = documentation.documents(documentation.entries(library(tmp_path)))
    assert texts[0].startswith("module knots\n\nKnots, and how to tie them.")
    assert texts[2] == "def knots.Rope.cut(at, *, clean=True)\n\nCut the rope at a distance from its start."


def test_questions_are_answered_by_the_first_sentence_and_the_signature() -> None:
    tie = Entry("knots.tie", "function", "(rope)", "Tie a knot into the rope\nas often as asked.  Then stop.\n\nMore.")
    answers = {chat[0]["content"]: chat[1]["content"] for chat in documentation.conversations([tie], 10)}
    assert answers == {
        "What does knots.tie do?": "Tie a knot into the rope as often as asked.",
        "How do I call knots.tie?": "knots.tie(rope)",
    }


def test_stubs_and_stories_are_no_answers() -> None:
    assert documentation.first_sentence("See above.") == ""
    assert documentation.first_sentence("word " * 100) == ""


def test_the_corpus_of_this_python_is_large_and_the_same_each_time() -> None:
    found = documentation.entries()
    chats = documentation.conversations(found, 500)
    assert len(found) > 3000
    assert "textwrap.dedent" in {entry.name for entry in found}
    assert len(chats) == 500
    assert chats == documentation.conversations(documentation.entries(), 500)


def test_reading_the_corpus_imports_none_of_it() -> None:
    before = set(sys.modules)
    documentation.entries()
    assert {"antigravity", "this", "turtle"}.isdisjoint(set(sys.modules) - before)
