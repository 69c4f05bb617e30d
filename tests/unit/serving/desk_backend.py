"""The gateway over a real desk in this process, and an engine that says what it is told to."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

from tunesmith.cluster.errors import RequestError
from tunesmith.serving.config import Serve
from tunesmith.serving.desk import Desk, Entry, Route, capacity
from tunesmith.serving.engines.protocol import Ask, Encoded, Piece, Version
from tunesmith.serving.metrics import Report


def desk(folder: Path, base_digest: str, **settings: Any) -> Desk:
    """A desk over the registry in `folder`, serving one base called `tiny`."""
    config = Serve(
        **{"bases": {"tiny": {"path": "x"}}, "registry": str(folder), "http": {"auth": "none"}} | settings  # type: ignore[arg-type]
    )
    return Desk(config, {"tiny": base_digest}, *capacity(config))


class InProcess:
    """A backend without Ray.

    Args:
        words: of every answer, one token each.
        pace: seconds before each.
        dies_after: tokens after which the engine fails.
    """

    def __init__(self, at: Desk, words: int = 3, pace: float = 0.0, dies_after: int | None = None) -> None:
        self.desk, self.words, self.pace, self.dies_after = at, words, pace, dies_after
        self.reports: list[Report] = []
        self.leaving: set[asyncio.Task[None]] = set()

    def begin(self) -> None:
        self.desk.hear("this")

    async def enter(self, entry: Entry) -> Route:
        return await self.desk.enter(entry)

    def leave(self, id: str, report: Report) -> None:
        self.reports.append(report)
        self.leaving.add(asyncio.get_running_loop().create_task(self.desk.leave(id, report)))

    async def generate(self, base: str, ask: Ask) -> AsyncIterator[Piece]:
        for number in range(self.words):
            await asyncio.sleep(self.pace)
            if number == self.dies_after:
                raise RequestError("the engine died while it answered", 503)
            for index in range(ask.n):
                yield Piece(index, f" {number}", 1, 5, "stop" if number + 1 == self.words else None)

    async def encode(self, base: str, prompts: Any, version: Version | None) -> Encoded:
        return Encoded([[1.0] for _ in prompts], len(prompts))

    async def tokenize(self, base: str, ask: Ask) -> list[int]:
        return [1]

    async def models(self, authorization: str | None) -> list[tuple[str, str]]:
        return self.desk.models(authorization)

    async def admin(self, authorization: str | None, change: str, arguments: dict[str, Any]) -> dict[str, Any]:
        return await self.desk.admin(authorization, change, arguments)

    async def metrics(self, authorization: str | None) -> str:
        return self.desk.metrics(authorization)

    async def ready(self) -> bool:
        return True


def samples(text: str, keep: Callable[[str], bool] = lambda name: True) -> dict[tuple[str, ...], float]:
    """Values by sample name and label values in the order base, adapter, version, tenant, and the rest."""
    from prometheus_client.parser import text_string_to_metric_families

    order = ("base", "adapter", "version", "tenant", "outcome", "feature", "against", "le")
    return {
        (one.name, *(one.labels[key] for key in order if key in one.labels)): one.value
        for family in text_string_to_metric_families(text)
        for one in family.samples
        if keep(one.name) and not one.name.endswith("_created")
    }
