"""The desk as drivers meet it: a real actor on a real Ray, whose CPUs are what is waited for."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from typing import Any

import pytest
import ray

from tunesmith.cluster.jobs import desk as jobs_desk
from tunesmith.cluster.jobs.desk import Answer, Desk
from tunesmith.cluster.queue.state import Job
from tunesmith.cluster.resources import Need
from tunesmith.cluster.session import RaySession, live_nodes
from tunesmith.serving import service

LEASE_S = 4.0
PATIENCE_S = 60.0


class Drivers:
    """Asks a desk on behalf of several jobs that each want every CPU there is."""

    def __init__(self, desk: Any) -> None:
        self.desk = desk
        (node,) = live_nodes()
        self.need = Need(1, node.cpus)
        self.holding: set[str] = set()

    def ask(self, id: str, priority: int = 0, user: str = "ann") -> Answer:
        job = Job(id, user, self.need, priority=priority)
        answer = ray.get(self.desk.ask.remote(job, 0.0, id in self.holding, None))
        if answer.act == "start":
            self.holding.add(id)
        return answer

    def until(self, id: str, act: str, priority: int = 0) -> Answer:
        """Asks as a driver does until it is told this."""
        deadline = time.monotonic() + PATIENCE_S
        while (answer := self.ask(id, priority)).act != act:
            assert time.monotonic() < deadline, answer
            time.sleep(0.2)
        return answer

    def leave(self, id: str) -> None:
        self.holding.discard(id)
        ray.get(self.desk.leave.remote(id))


@pytest.fixture
def drivers(ray_session: RaySession) -> Iterator[Drivers]:
    desk = ray.remote(Desk).options(num_cpus=0, max_restarts=1, max_task_retries=-1).remote(lease_s=LEASE_S)
    yield Drivers(desk)
    ray.kill(desk)


def test_one_holds_the_workers_the_others_are_told_why_they_wait(drivers: Drivers) -> None:
    drivers.until("a", "start")
    assert drivers.ask("a").act == "go on"
    time.sleep(0.6)
    assert drivers.ask("b").why.startswith("next in line: 0 of 1 worker")
    assert "with the end of a" in drivers.ask("b").why
    drivers.leave("a")
    drivers.until("b", "start")


def test_a_start_that_was_not_heard_is_said_again(drivers: Drivers) -> None:
    drivers.until("a", "start")
    drivers.holding.clear()
    assert drivers.ask("a").act == "start"


def test_a_higher_priority_makes_the_holder_save_and_is_next(drivers: Drivers) -> None:
    drivers.until("low", "start")
    drivers.until("high", "wait", priority=3)
    assert drivers.until("low", "save").why == "makes room for high"
    drivers.leave("low")
    drivers.until("low", "wait")
    drivers.until("high", "start", priority=3)
    assert drivers.ask("low").act == "wait"


def test_who_is_not_heard_of_has_gone(drivers: Drivers) -> None:
    drivers.until("silent", "start")
    began = time.monotonic()
    drivers.until("next", "start")
    assert time.monotonic() - began >= LEASE_S - 1


def test_a_desk_that_was_restarted_listens_before_it_lets_anybody_start(drivers: Drivers) -> None:
    drivers.until("a", "start")
    pid = ray.get(drivers.desk.__ray_call__.remote(lambda _: os.getpid()))
    os.kill(pid, 9)
    assert "the queue was restarted and listens" in drivers.until("b", "wait").why
    assert drivers.ask("a").act == "go on"
    time.sleep(LEASE_S / 2)
    drivers.ask("a")
    time.sleep(LEASE_S / 2 + 1)
    drivers.ask("a")
    assert drivers.ask("b").act == "wait"
    assert drivers.ask("a").act == "go on"
    drivers.leave("a")
    drivers.until("b", "start")


def test_a_service_on_the_same_cluster_has_a_desk_of_another_name() -> None:
    """Both are detached actors, and a service that starts ends the one of its name."""
    assert (jobs_desk.NAMESPACE, jobs_desk.NAME) != (service.NAMESPACE, service.DESK)
