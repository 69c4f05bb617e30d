"""The queue is bounded, fair and never forgets; coroutines that wait by it can leave at any time."""

from __future__ import annotations

import asyncio
import random
from collections import Counter

import pytest

from tunesmith.cluster.errors import RequestError
from tunesmith.serving.fairness import FairQueue, Gate

NEVER = float("inf")


def test_tenants_that_always_ask_share_tokens_within_5_percent_whatever_their_requests_sizes():
    dice = random.Random(1)
    sizes = {"small": (10, 50), "large": (2000, 5000), "mixed": (1, 4000), "many": (10, 50)}
    lines = {"small": 5, "large": 5, "mixed": 5, "many": 50}
    queue, served, running = FairQueue(8, 200), Counter(), []
    for now in range(60_000):
        for tenant, (low, high) in sizes.items():
            while len(queue._lines[tenant].waiting if tenant in queue._lines else ()) < lines[tenant]:
                queue.offer(tenant, dice.randrange(low, high), NEVER)
        while ticket := queue.next(now):
            running.append(ticket)
        ended = running.pop(dice.randrange(len(running)))
        served[ended.tenant] += ended.cost
        queue.release(ended, now)
    share = sum(served.values()) / len(sizes)
    for tenant in sizes:
        assert abs(served[tenant] / share - 1) < 0.05, served


def test_shares_follow_what_was_used_and_not_what_was_estimated():
    queue, served = FairQueue(1, 20), Counter()
    for now in range(8000):
        for tenant in ("honest", "modest"):
            if tenant not in queue._lines or not queue._lines[tenant].waiting:
                queue.offer(tenant, 100 if tenant == "honest" else 10, NEVER)
        ticket = queue.next(now)
        assert ticket
        ticket.cost = 100  # both answer as much
        served[ticket.tenant] += 100
        queue.release(ticket, now)
    assert abs(served["honest"] / served["modest"] - 1) < 0.05, served


def test_a_newcomer_is_next_however_long_another_has_queued():
    queue = FairQueue(1, 100)
    for _ in range(100):
        queue.offer("flood", 100, NEVER)
    for now in range(10):
        queue.release(queue.next(now), now)  # type: ignore[arg-type]
    queue.offer("newcomer", 5000, NEVER)
    waited = 0
    while (ticket := queue.next(0)) and ticket.tenant != "newcomer":
        queue.release(ticket, 0)
        waited += 1
    assert waited <= 1


def test_being_idle_earns_nothing():
    queue = FairQueue(1, 100)
    for tenant in ("a", "b"):
        queue.offer(tenant, 100, NEVER)
    order = []
    for now in range(50):
        queue.offer("a", 100, NEVER)
        ticket = queue.next(now)
        assert ticket
        queue.release(ticket, now)
    for _ in range(20):  # b was idle for 48 requests of a, and now comes with twenty
        queue.offer("b", 100, NEVER)
        queue.offer("a", 100, NEVER)
    for now in range(20):
        ticket = queue.next(now)
        assert ticket
        order.append(ticket.tenant)
        queue.release(ticket, now)
    assert 9 <= order.count("b") <= 11, order


def test_a_full_queue_takes_a_place_from_the_longest_line_and_never_grows():
    queue = FairQueue(1, 10)
    flood = [queue.offer("flood", 1, NEVER)[0] for _ in range(10)]
    with pytest.raises(RequestError) as caught:
        queue.offer("flood", 1, NEVER)
    assert (caught.value.status, caught.value.code) == (503, "overloaded")
    assert caught.value.retry_after
    assert caught.value.retry_after >= 1
    outed = [queue.offer(f"t{index}", 1, NEVER)[1] for index in range(8)]
    assert outed == flood[:1:-1], "the newest first"
    with pytest.raises(RequestError):
        queue.offer("t7", 1, NEVER)  # nobody's line is longer than its own would be
    assert queue.waiting == 10


def test_late_and_cancelled_requests_leave_the_line():
    queue = FairQueue(1, 10)
    late, _ = queue.offer("a", 1, 5.0)
    gone, _ = queue.offer("a", 1, NEVER)
    last, _ = queue.offer("a", 1, NEVER)
    assert queue.cancel(gone)
    assert not queue.cancel(gone)
    assert queue.expire(4.9) == []
    assert queue.next(5.0) is last
    assert not queue.cancel(late)
    assert queue.waiting == 0


@pytest.mark.parametrize("seed", range(5))
def test_whatever_happens_counts_hold_and_memory_is_bounded(seed: int):
    dice = random.Random(seed)
    queue, tickets, running = FairQueue(3, 20), [], []
    for step in range(5000):
        what = dice.randrange(5)
        try:
            if what <= 1:
                ticket, outed = queue.offer(f"t{dice.randrange(60)}", dice.randrange(1, 99), step + 50)
                tickets = [one for one in tickets if one is not outed] + [ticket]
            elif what == 2 and tickets:
                queue.cancel(tickets.pop(dice.randrange(len(tickets))))
            elif what == 3 and (ticket := queue.next(step)):
                running.append(ticket)
            elif what == 4 and running:
                queue.release(running.pop(), step)
        except RequestError:
            assert queue.waiting == 20
        assert 0 <= queue.waiting <= 20
        assert queue.at_work == len(running) <= 3
        assert queue.waiting == sum(len(line.waiting) for line in queue._lines.values())
        assert len(queue._lines) <= 60
    while (ticket := queue.next(10**6 - 1)) or running:
        queue.release(ticket or running.pop(), 10**6)
    queue.offer("new", 1, NEVER)
    assert queue.at_work == 0
    assert list(queue._lines) == ["new"]


def test_without_places_to_wait_a_free_slot_is_still_given():
    queue = FairQueue(1, 0)
    queue.offer("a", 1, NEVER)
    assert queue.next(0)
    with pytest.raises(RequestError):
        queue.offer("a", 1, NEVER)


def test_coroutines_hold_slots_wait_leave_and_time_out():
    async def run() -> None:
        gate, began, done = Gate(FairQueue(2, 4)), [], asyncio.Event()

        async def ask(tenant: str, wait: float = 5.0) -> None:
            async with gate.slot(tenant, 10, wait):
                began.append(tenant)
                await done.wait()

        tasks = [asyncio.create_task(ask("a")) for _ in range(6)]
        await asyncio.sleep(0.01)
        assert began == ["a", "a"]
        with pytest.raises(RequestError):
            await ask("a")
        newcomer = asyncio.create_task(ask("b"))
        await asyncio.sleep(0.01)
        with pytest.raises(RequestError):
            await tasks.pop()  # its place went to the newcomer
        impatient = asyncio.create_task(ask("c", wait=0.02))
        await asyncio.sleep(0.01)
        with pytest.raises(RequestError):
            await tasks.pop()
        with pytest.raises(RequestError) as caught:
            await impatient
        assert caught.value.status == 503
        tasks[2].cancel()  # it waits
        tasks[0].cancel()  # it is at work; the slot is the newcomer's
        await asyncio.sleep(0.01)
        assert began == ["a", "a", "b"]
        assert gate.queue.waiting == len(tasks) - 3
        done.set()
        await asyncio.gather(*tasks, newcomer, return_exceptions=True)
        assert (gate.queue.at_work, gate.queue.waiting, gate._turns) == (0, 0, {})

    asyncio.run(run())


@pytest.mark.parametrize("seed", range(3))
def test_a_storm_of_cancelled_coroutines_leaks_no_slot(seed: int):
    async def run() -> None:
        dice, gate = random.Random(seed), Gate(FairQueue(3, 50))

        async def ask(tenant: str) -> None:
            async with gate.slot(tenant, 10, dice.choice([0.0, 0.001, 1.0])):
                assert gate.queue.at_work <= 3
                await asyncio.sleep(dice.choice([0, 0, 0.001]))

        tasks = []
        for index in range(600):
            tasks.append(asyncio.create_task(ask(f"t{index % 7}")))
            if dice.random() < 0.3:
                dice.choice(tasks).cancel()
            if dice.random() < 0.3:
                await asyncio.sleep(0)
        ended = await asyncio.gather(*tasks, return_exceptions=True)
        assert {type(one) for one in ended} <= {type(None), RequestError, asyncio.CancelledError}
        assert ended.count(None) > 50
        assert (gate.queue.at_work, gate.queue.waiting, gate._turns) == (0, 0, {})

    asyncio.run(run())
