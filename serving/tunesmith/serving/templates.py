"""Chat templates of unknown origin: found in an adapter's files, parsed, and judged before any of them is ever rendered.

A template is a program that a service runs at every request. The sandbox keeps it from the machine, but not from running
for ever or filling the memory; `template_rules` says what it may do.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from jinja2 import TemplateSyntaxError, nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from tunesmith.cluster.errors import AdapterError
from tunesmith.serving.template_rules import Judge
from tunesmith.serving.template_values import RefusedError

LONGEST = 2**18
"""Characters of a template."""
DEEPEST = 80
"""Levels of nesting; Python gives up on the code that Jinja makes of more than about a hundred."""
LONGEST_TOKEN = 1000
"""Characters of a text in a tokenizer's settings: templates are given the special tokens by name."""
_FIX = (
    "A chat template runs at every request. Leave it out to use the base's own, or trust this one with "
    "--trust-template."
)
_TOKENS = ("tokenizer_config.json", "special_tokens_map.json")


def check_templates(folder: Path, files: Iterable[str], settings: Mapping[str, Any]) -> None:
    """Judges every chat template that a tokenizer would take from an adapter's folder. Renders none.

    Args:
        files: their names.
        settings: what the JSON files beside the weights hold, by name.

    Raises:
        AdapterError: names the file, the line and the reason.
    """
    for name in sorted(files):
        if name.endswith(".jinja"):
            try:
                check_template((folder / name).read_text(encoding="utf-8"), name)
            except UnicodeDecodeError as error:
                raise AdapterError(f"{name}: not UTF-8: {error}", _FIX) from error
    for name, held in settings.items():
        if isinstance(held, dict):
            for shown, text in _templates_of(name, held.get("chat_template")):
                check_template(text, shown)
            if name in _TOKENS:
                _check_tokens(name, held)


def check_template(text: str, shown: str) -> None:
    """Refuses a template that could run or grow far beyond the conversation that it is given.

    Args:
        shown: what errors call it.

    Raises:
        AdapterError: see `check_templates`.
    """
    if len(text) > LONGEST:
        raise AdapterError(f"{shown}: {len(text):,} characters; a template has at most {LONGEST:,}", _FIX)
    try:
        tree = _ENVIRONMENT.parse(text)
        if _depth(tree) > DEEPEST:
            raise AdapterError(f"{shown}: nested more deeply than {DEEPEST} levels", _FIX)
        Judge(tree).check()
    except TemplateSyntaxError as error:
        raise AdapterError(f"{shown}: line {error.lineno}: no Jinja: {str(error.message)[:200]}", _FIX) from error
    except RefusedError as refusal:
        raise AdapterError(f"{shown}: line {refusal.line}: {refusal.reason}", _FIX) from refusal
    except (RecursionError, MemoryError):
        raise AdapterError(f"{shown}: nested more deeply than {DEEPEST} levels", _FIX) from None
    except (ValueError, OverflowError) as error:  # a number of thousands of digits
        raise AdapterError(f"{shown}: no Jinja: {str(error)[:200]}", _FIX) from error


class _Generation(Extension):
    """Transformers' `{% generation %}`, which marks the assistant's words: here just what stands in it."""

    tags = {"generation"}  # noqa: RUF012 - Jinja declares it as one of the instance

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.Scope(body).set_lineno(line)


_ENVIRONMENT = ImmutableSandboxedEnvironment(
    trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols]
)
"""As transformers sets it up. It only parses: already compiling would work out what constants come to."""


def _templates_of(name: str, held: Any) -> Iterator[tuple[str, str]]:
    """The templates that a settings file holds, with what errors call them."""
    if held is None:
        return
    if isinstance(held, list) and all(isinstance(one, dict) for one in held):
        named = [(f" {str(one.get('name'))[:60]!r}", one.get("template")) for one in held]
    else:
        named = [(f" {key[:60]!r}", text) for key, text in held.items()] if isinstance(held, dict) else [("", held)]
    for title, text in named:
        if not isinstance(text, str):
            raise AdapterError(f"{name}: chat_template is neither a text nor a list of names and templates", _FIX)
        yield f"{name}: chat_template{title}", text


def _check_tokens(name: str, settings: dict[str, Any]) -> None:
    waiting: list[Any] = [value for key, value in settings.items() if key != "chat_template"]
    while waiting:
        one = waiting.pop()
        if isinstance(one, str) and len(one) > LONGEST_TOKEN:
            raise AdapterError(
                f"{name}: a text of {len(one):,} characters, {one[:40]!r}…; chat templates are given tokens of at most "
                f"{LONGEST_TOKEN}",
                _FIX,
            )
        waiting += one.values() if isinstance(one, dict) else one if isinstance(one, list) else ()


def _depth(tree: nodes.Node) -> int:
    """Levels of a tree; looks no further than one beyond DEEPEST."""
    level, depth = [tree], 0
    while level and depth <= DEEPEST:
        level, depth = [child for node in level for child in node.iter_child_nodes()], depth + 1
    return depth
