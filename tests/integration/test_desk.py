"""The desk as drivers meet it: a real actor on a real Ray, whose CPUs are what is waited for."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import pytest
import ray
from ray._private.ray_constants import AUTOSCALER_RESOURCE_REQUEST_CHANNEL
from ray.experimental.internal_kv import _internal_kv_get

from tunesmith.cluster.jobs.desk import Answer, Desk
from tunesmith.cluster.queue.state import Job
from tunesmith.cluster.ray_nodes import ray_nodes
from tunesmith.cluster.resources import Need
from tunesmith.cluster.session import RaySession

SHORT_LEASE_S = 8.0
LONG_LEASE_S = 600.0
"""Longer than any test: whoever is silent has not gone."""
PATIENCE_S = 60.0


class Drivers:
    """Asks a desk on behalf of several jobs that each want every CPU there is."""

    def __init__(self, desk: Any) -> None:
        self.desk = desk
        (node,) = ray_nodes()
        self.need = Need(1, node.total["CPU"])
        self.expected_s: float | None = None
        self.holding: dict[str, Mapping[str, int]] = {}

    def ask(self, id: str, priority: int = 0, user: str = "ann") -> Answer:
        job = Job(id, user, self.need, priority=priority, expected_s=self.expected_s)
        answer = ray.get(self.desk.ask.remote(job, 0.0, self.holding.get(id), None))
        if answer.act == "start":
            self.holding[id] = answer.placed
        return answer

    def until(self, id: str, act: str, why: str = "", priority: int = 0) -> Answer:
        """Asks as a driver does until it is told this, and why; those who hold workers go on asking."""
        deadline = time.monotonic() + PATIENCE_S
        while (answer := self.ask(id, priority)).act != act or why not in answer.why:
            assert time.monotonic() < deadline, answer
            time.sleep(0.2)
            for other in self.holding.keys() - {id}:
                self.ask(other)
        return answer

    def leave(self, id: str) -> None:
        self.holding.pop(id, None)
        ray.get(self.desk.leave.remote(id))


@pytest.fixture(params=[LONG_LEASE_S])
def drivers(ray_session: RaySession, request: pytest.FixtureRequest) -> Iterator[Drivers]:
    ray_session.nodes()  # other tests may have closed it
    desk = ray.remote(Desk).options(num_cpus=0, max_restarts=1, max_task_retries=-1).remote(lease_s=request.param)
    yield Drivers(desk)
    ray.kill(desk)


short_lease = pytest.mark.parametrize("drivers", [SHORT_LEASE_S], indirect=True)


def test_one_holds_the_workers_the_others_are_told_why_they_wait(drivers: Drivers) -> None:
    drivers.until("a", "start")
    assert drivers.ask("a").act == "go on"
    why = drivers.until("b", "wait", "with the end of a").why
    assert why.startswith("next in line: 0 of 1 worker")
    assert "room comes at an unknown time" in why
    drivers.leave("a")
    drivers.until("b", "start")


def test_until_a_run_knows_when_it_ends_what_its_submitter_expects_counts(drivers: Drivers) -> None:
    drivers.expected_s = 7200.0
    drivers.until("a", "start")
    assert drivers.ask("a").act == "go on"
    assert "room comes in about" in drivers.until("b", "wait", "with the end of a").why


def test_who_the_cluster_is_too_small_for_waits_and_an_autoscaler_is_asked_for_machines(drivers: Drivers) -> None:
    drivers.need = replace(drivers.need, workers=2)
    why = drivers.until("large", "wait", "when it is empty").why
    assert "asks for 2 workers" in why
    assert "the cluster holds 1 of these" in why
    drivers.need = replace(drivers.need, workers=1)
    drivers.until("small", "start")
    assert machines_asked_for() == [drivers.need.ray_resources()] * 3  # for both at once
    drivers.until("large", "wait", "with the end of small")  # it has become smaller, or the cluster larger
    drivers.leave("large")
    drivers.leave("small")


def machines_asked_for() -> list[dict[str, float]]:
    asked = _internal_kv_get(AUTOSCALER_RESOURCE_REQUEST_CHANNEL)
    return json.loads(asked or b"[]")


def test_a_start_that_was_not_heard_is_said_again(drivers: Drivers) -> None:
    drivers.until("a", "start")
    drivers.holding.clear()
    again = drivers.ask("a")
    assert again.act == "start"
    assert sum(again.placed.values()) == 1


def test_a_higher_priority_makes_the_holder_save_and_is_next(drivers: Drivers) -> None:
    drivers.until("low", "start")
    drivers.until("high", "wait", priority=3)
    assert drivers.until("low", "save").why == "makes room for high"
    drivers.leave("low")
    drivers.until("low", "wait")
    drivers.until("high", "start", priority=3)
    assert drivers.ask("low").act == "wait"


@short_lease
def test_who_is_not_heard_of_has_gone(drivers: Drivers) -> None:
    drivers.until("silent", "start")
    began = time.monotonic()
    drivers.ask("silent")
    drivers.holding.clear()
    drivers.until("next", "start")
    assert time.monotonic() - began >= SHORT_LEASE_S


@short_lease
def test_a_desk_that_was_restarted_listens_before_it_lets_anybody_start(drivers: Drivers) -> None:
    drivers.until("a", "start")
    pid = ray.get(drivers.desk.__ray_call__.remote(lambda _: os.getpid()))
    os.kill(pid, 9)
    drivers.until("b", "wait", "the queue was restarted and listens")
    assert drivers.ask("a").act == "go on"
    drivers.until("b", "wait", "next in line: 0 of 1 worker")  # it has listened, and a holds what it held
    assert drivers.ask("a").act == "go on"
    drivers.leave("a")
    drivers.until("b", "start")
