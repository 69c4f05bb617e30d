"""A gateway is ready once every base has had a replica, however early it comes up itself."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any

import pytest

from tunesmith.serving import service


def test_a_gateway_waits_for_every_base_and_asks_no_more_then(monkeypatch: pytest.MonkeyPatch) -> None:
    running: dict[str, int] = {}
    asked: list[int] = []

    async def hear(_gateway: str) -> None:
        return

    def status() -> Any:
        asked.append(1)
        there = {f"engine-{name}": SimpleNamespace(replica_states={"RUNNING": n}) for name, n in running.items()}
        return SimpleNamespace(applications={service.APPLICATION: SimpleNamespace(deployments=there)})

    monkeypatch.setattr(service, "desk_of", lambda *_of: SimpleNamespace(hear=SimpleNamespace(remote=hear)))
    monkeypatch.setattr(service.serve, "status", status)
    engines: Any = {"one": None, "two": None}
    backend = service.RayBackend({}, {}, engines, "gateway")
    assert not asyncio.run(backend.ready()), "nothing is deployed yet"
    running.update(one=1, two=0)
    assert not asyncio.run(backend.ready())
    running.update(one=0, two=1)
    assert asyncio.run(backend.ready()), "what was lost since is started again, while the other bases answer"
    count = len(asked)
    assert asyncio.run(backend.ready())
    assert len(asked) == count
