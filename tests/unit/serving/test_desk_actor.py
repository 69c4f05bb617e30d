"""A configuration's desk begins with its gateways, and ends when they have been gone for long."""

from __future__ import annotations

import asyncio
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tunesmith.serving import service


@pytest.fixture
def killed(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Actors that were ended; a gateway falls silent after 0.3 s."""
    found: list[str] = []
    monkeypatch.setattr(service, "HEARTBEAT_S", 0.02)
    monkeypatch.setattr(service, "DESERTED_S", 0.3)
    monkeypatch.setattr(service.ray, "kill", found.append)
    monkeypatch.setattr(service.ray, "get_runtime_context", lambda: SimpleNamespace(current_actor="this one"))
    return found


def desk(tmp_path: Path) -> service.DeskActor:
    config = {"bases": {"tiny": {"path": "tiny"}}, "registry": str(tmp_path / "registry")}
    return service.DeskActor(config, {"tiny": "0" * 64})


def test_a_desk_without_gateways_ends_and_one_with_gateways_does_not(killed: list[str], tmp_path: Path) -> None:
    async def heard_for(seconds: float) -> None:
        actor = desk(tmp_path)
        for _ in range(round(seconds / 0.05)):
            await actor.hear("gateway")
            await asyncio.sleep(0.05)
        assert killed == []
        await asyncio.sleep(0.5)

    asyncio.run(heard_for(0.8))
    assert killed == ["this one"]


def test_each_configuration_has_a_desk_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[dict[str, Any]] = []

    class Remote:
        def options(self, **settings: Any) -> Remote:
            asked.append(settings)
            return self

        def remote(self, *_arguments: Any) -> str:
            return asked[-1]["name"]

    monkeypatch.setattr(service.ray, "remote", lambda _actor: Remote())
    plain = {"bases": {"tiny": {"path": "a"}}, "limits": {"concurrency": 4}}
    first = service.desk_of(plain, {"tiny": "1"})
    assert service.desk_of({"limits": {"concurrency": 4}, "bases": {"tiny": {"path": "a"}}}, {"tiny": "1"}) == first
    others = [service.desk_of({**plain, "limits": {}}, {"tiny": "1"}), service.desk_of(plain, {"tiny": "2"})]
    assert len({first, *others}) == 3
    assert all(one.startswith(service.DESK) for one in (first, *others))
    assert all(settings["get_if_exists"] and settings["lifetime"] == "detached" for settings in asked)
