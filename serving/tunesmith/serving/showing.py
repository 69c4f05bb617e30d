"""The end of the quickstart: its adapter is served, and asked through OpenAI's own client beside its base."""

from __future__ import annotations

import json
import socket
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich import box
from rich.table import Table

from tunesmith.cluster import storage
from tunesmith.serving.config import Serve, load_config
from tunesmith.serving.registry import Registry
from tunesmith.serving.serve_command import started

QUESTIONS = 3
MOST_TOKENS = 40
BASE, ADAPTER = "documentation", "answers"
CONFIG = """\
# What the quickstart trained: the model of stage one, and the adapter of stage two over it.
bases:
  {base}: {{path: {artifact}, engine: transformers}}
registry: {registry}
http: {{port: {port}, auth: none}}   # for this machine alone; `auth: keys` is for everybody else
"""


@dataclass(frozen=True)
class Shown:
    """One question and the two answers."""

    question: str
    base: str
    tuned: str


def side_by_side(folder: Path, base: Path, adapter: Path) -> list[Shown]:
    """Serves the quickstart's adapter for a moment and asks it and its base.

    Args:
        folder: of the quickstart; its serving configuration and registry are left there.
        base, adapter: the two artifacts.
    """
    registry = folder / "registry"
    Registry(str(registry)).add(ADAPTER, adapter, alias="prod")
    path = folder / "serve.yaml"
    storage.write_atomic(path, CONFIG.format(base=BASE, artifact=base, registry=registry, port=8000))
    written = load_config(path)
    config = Serve.model_validate(written.model_dump() | {"http": {**written.http.model_dump(), "port": _free_port()}})
    with started(config) as url:
        return [_asked(url, question) for question in _questions(folder / "questions.jsonl")]


def table(shown: list[Shown]) -> Table:
    """The questions with their answers side by side."""
    made = Table(box=box.SIMPLE_HEAD, show_lines=True)
    for heading in ("question", "the base", "with the adapter"):
        made.add_column(heading, ratio=1, overflow="fold")
    for one in shown:
        made.add_row(one.question, one.base, one.tuned)
    return made


def as_json(shown: list[Shown]) -> list[dict[str, Any]]:
    """The same as plain values."""
    return [asdict(one) for one in shown]


def _asked(url: str, question: str) -> Shown:
    from openai import OpenAI

    client = OpenAI(base_url=url, api_key="none")

    def answer(model: str) -> str:
        made = client.chat.completions.create(
            model=model, messages=[{"role": "user", "content": question}], temperature=0, max_tokens=MOST_TOKENS
        )
        return " ".join((made.choices[0].message.content or "").split())

    return Shown(question, answer(BASE), answer(ADAPTER))


def _questions(path: Path) -> list[str]:
    """Some of the questions it was trained on, spread over the file."""
    rows = path.read_text(encoding="utf-8").splitlines()
    chosen = [json.loads(rows[at]) for at in range(0, len(rows), len(rows) // QUESTIONS)][:QUESTIONS]
    return [row["messages"][0]["content"] for row in chosen]


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
