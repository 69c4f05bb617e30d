"""A configuration's desk begins with its gateways, and ends when they have been gone for long."""

from __future__ import annotations

import asyncio
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tunesmith.serving import service


def test_a_desk_ends_once_no_gateway_was_heard_for_long(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    looked, now, killed = threading.Semaphore(0), [0.0], threading.Event()

    def sleep(_seconds: float) -> None:
        """Each look at the clock waits for the test."""
        looked.release()
        going_on.acquire(timeout=30)

    going_on = threading.Semaphore(0)
    monkeypatch.setattr(service.time, "sleep", sleep)
    monkeypatch.setattr(service.ray, "kill", lambda actor: killed.set() if actor == "this one" else None)
    monkeypatch.setattr(service.ray, "get_runtime_context", lambda: SimpleNamespace(current_actor="this one"))
    config = {"bases": {"tiny": {"path": "tiny"}}, "registry": str(tmp_path / "registry")}
    actor = service.DeskActor(config, {"tiny": "0" * 64}, clock=lambda: now[0])
    for at, heard in ((service.DESERTED_S - 1, True), (2 * service.DESERTED_S - 2, False)):
        assert looked.acquire(timeout=30)
        now[0] = at
        if heard:
            asyncio.run(actor.hear("gateway"))
        going_on.release()
    assert looked.acquire(timeout=30), "it was heard at last"
    now[0] = 2 * service.DESERTED_S
    assert not killed.is_set()
    going_on.release()
    assert killed.wait(30)


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
