"""Slots come back whatever becomes of those who wait for them, and aliases never move back."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

import pytest
import tiny_adapters

from tunesmith.cluster.errors import RequestError
from tunesmith.serving.config import Serve
from tunesmith.serving.desk import Desk, Entry, capacity
from tunesmith.serving.metrics import Report


@pytest.fixture
def desk(tmp_path: Path) -> Desk:
    """Of one base with one slot, over a registry where `bot@prod` may lead to two versions."""
    bases = {"tiny": {"path": "anywhere", "max_batch": 1}}
    config = Serve.model_validate({"bases": bases, "registry": str(tmp_path / "registry"), "http": {"auth": "none"}})
    made = Desk(config, {"tiny": tiny_adapters.BASE_DIGEST}, *capacity(config))
    for seed in (1, 2):
        made.registry.add("bot", tiny_adapters.artifact(tmp_path / str(seed), seed))
    made.look()
    return made


def entry(id: str) -> Entry:
    return Entry(id, "gateway", None, "bot")


def within_seconds(work: Callable[[], Coroutine[Any, Any, None]]) -> None:
    asyncio.run(asyncio.wait_for(work(), 10))


def test_one_that_leaves_while_it_waits_is_never_given_the_slot(desk: Desk) -> None:
    async def work() -> None:
        await desk.enter(entry("first"))
        waiting = asyncio.create_task(desk.enter(entry("second")))
        await asyncio.sleep(0)
        await desk.leave("second", Report())
        await asyncio.wait({waiting}, timeout=1)
        assert waiting.cancelled()
        await desk.leave("first", Report())
        await desk.enter(entry("third"))
        await desk.leave("third", Report())
        assert (desk._open, desk._gates["tiny"].queue.waiting) == ({}, 0)

    within_seconds(work)


def test_a_queue_is_as_long_as_what_is_worked_on(desk: Desk) -> None:
    async def work() -> None:
        await desk.enter(entry("at work"))
        waiting = asyncio.create_task(desk.enter(entry("waiting")))
        await asyncio.sleep(0)
        with pytest.raises(RequestError) as refused:
            await desk.enter(entry("too many"))
        assert refused.value.status == 503
        assert refused.value.retry_after
        await desk.leave("at work", Report())
        await waiting

    within_seconds(work)


def test_a_slow_look_at_the_registry_does_not_bring_back_what_a_move_has_changed(desk: Desk) -> None:
    first, second = (one.digest for one in desk.registry.read()[1].adapter("bot").versions)
    assert (await_route(desk)).digest == first
    read, has_read, may_go_on = desk.registry.read, threading.Event(), threading.Event()

    def slowly() -> Any:
        found = read()
        has_read.set()
        assert may_go_on.wait(10)
        return found

    async def work() -> None:
        desk.registry.read = slowly  # type: ignore[method-assign]
        looking = asyncio.create_task(desk.keep_looking())
        await asyncio.to_thread(has_read.wait, 10)
        desk.registry.read = read  # type: ignore[method-assign]
        await desk.admin(None, "move", {"name": "bot", "alias": "prod", "version": second})
        may_go_on.set()
        await asyncio.sleep(0.2)
        looking.cancel()
        assert (await desk.enter(entry("after"))).digest == second

    within_seconds(work)


def await_route(desk: Desk) -> Any:
    async def work() -> Any:
        route = await desk.enter(entry("before"))
        await desk.leave("before", Report())
        return route

    return asyncio.run(work())


def test_a_request_that_is_sent_again_holds_one_slot_and_one_place(desk: Desk) -> None:
    """A gateway sends it again when the desk did not answer, though it may have come."""

    async def work() -> None:
        await desk.enter(entry("first"))
        await desk.enter(entry("first"))
        waiting = asyncio.create_task(desk.enter(entry("second")))
        await asyncio.sleep(0)
        again = asyncio.create_task(desk.enter(entry("second")))
        await asyncio.wait({waiting}, timeout=1)
        assert waiting.cancelled()
        await desk.leave("first", Report())
        await again
        await desk.leave("second", Report())
        assert (desk._open, desk._gates["tiny"].queue.at_work, desk._gates["tiny"].queue.waiting) == ({}, 0, 0)

    within_seconds(work)


def test_a_shadow_begins_at_once_or_never(desk: Desk) -> None:
    async def work() -> None:
        await desk.enter(entry("first"))
        shadow = Entry("shadow", "gateway", None, "bot", within="first", is_shadow=True)
        with pytest.raises(RequestError, match="no slot is free for a shadow"):
            await desk.enter(shadow)
        assert desk._gates["tiny"].queue.waiting == 0

    within_seconds(work)


def test_a_tenant_is_charged_what_its_request_took(desk: Desk) -> None:
    async def work() -> None:
        await desk.enter(entry("first"))
        ticket = desk._open["first"].ticket
        assert ticket is not None
        assert ticket.cost == 1, "it did not say how long its answer may be"
        line = desk._gates["tiny"].queue._lines[ticket.tenant]
        before = line.tag
        await desk.leave("first", Report(prompt_tokens=100, completion_tokens=900))
        assert line.tag == before + 999

    within_seconds(work)


def test_a_base_wins_over_an_adapter_of_its_name(desk: Desk, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    async def work() -> None:
        desk.registry.add("tiny", tiny_adapters.artifact(tmp_path / "tiny", 3), alias="canary")
        desk.look()
        assert [name for name, _ in desk.models(None)] == ["tiny", "bot"]
        assert "not served, for a base or a mixture has the name: the adapters tiny" in caplog.text
        assert (await desk.enter(Entry("a", "gateway", None, "tiny"))).digest is None
        await desk.leave("a", Report())
        with pytest.raises(RequestError, match="'tiny@canary' does not exist"):
            await desk.enter(Entry("b", "gateway", None, "tiny@canary"))
        listed = await desk.admin(None, "list", {})
        assert sorted(listed["adapters"]) == ["bot", "tiny"]  # operators see it, to take it out

    within_seconds(work)
