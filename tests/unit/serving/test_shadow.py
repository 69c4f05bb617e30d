"""A shadow is asked what its alias is asked, in its own version's name; nobody sees, waits for or pays for its answer."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import httpx
import pytest
import tiny_adapters
from desk_backend import InProcess, desk

from tunesmith.cluster.errors import RequestError
from tunesmith.serving.engines.protocol import Ask, Piece
from tunesmith.serving.gateway import Gateway


class Watched(InProcess):
    """Notes which version every ask was for; the shadow may fail."""

    asked: list[tuple[str, str]]
    failing = ""

    async def generate(self, base: str, ask: Ask) -> AsyncIterator[Piece]:
        digest = ask.version.digest if ask.version else ""
        self.asked.append((ask.id, digest))
        if digest == self.failing:
            raise RequestError("the engine died", 503)
        async for piece in super().generate(base, ask):
            yield piece


@pytest.mark.parametrize("fails", [False, True])
def test_a_shadow_is_asked_and_its_answer_or_failure_stays_unseen(tmp_path: Path, fails: bool) -> None:
    made = desk(tmp_path / "registry", tiny_adapters.BASE_DIGEST)
    seen, hidden = (
        made.registry.add("bot", tiny_adapters.artifact(tmp_path / str(seed), seed)).digest for seed in (1, 2)
    )
    made.registry.split("bot", "prod", {seen: 1.0}, shadow=hidden)
    made.look()
    backend = Watched(made)
    backend.asked, backend.failing = [], hidden if fails else ""
    app = Gateway(made.config, backend, "gateway").app()

    async def work() -> httpx.Response:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://x") as client:
            body = {"model": "bot", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 5}
            answer = await client.post("/v1/chat/completions", json=body)
        while len(backend.reports) < 2:
            await asyncio.sleep(0.01)
        await asyncio.gather(*backend.leaving)
        return answer

    answer = asyncio.run(asyncio.wait_for(work(), 10))
    assert answer.status_code == 200
    assert answer.headers["x-tunesmith-version"] == seen
    assert answer.json()["usage"]["completion_tokens"] == 3
    id = answer.json()["id"]
    assert sorted(backend.asked) == [(id, seen), (f"{id}-shadow", hidden)]
    assert sorted(report.status for report in backend.reports) == ([200, 503] if fails else [200, 200])
    assert made._open == {}
