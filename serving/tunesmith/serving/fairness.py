"""Who is next when more is asked than can be done: a bounded queue that is fair between tenants.

Start-time fair queueing (Goyal, Vin, Cheng, SIGCOMM 1996): every tenant has a tag, which its requests move on by their
tokens; the smallest tag is next. A tenant that has waited nowhere starts at the tag of the last served, so that being
idle earns nothing. `FairQueue` decides; `Gate` makes coroutines wait by it.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections import deque
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field

from tunesmith.cluster.errors import RequestError


@dataclass(eq=False)
class Ticket:
    """A request that waits, or is at work.

    Attributes:
        cost: tokens that it is expected to take; set it to what it took before `release`.
        deadline: when it stops waiting.
        began: when it began to be worked on; None while it waits.
    """

    tenant: str
    cost: int
    deadline: float
    began: float | None = None
    charged: int = 0


@dataclass
class _Line:
    tag: float
    waiting: deque[Ticket] = field(default_factory=deque)


class FairQueue:
    """Requests that wait for one of a number of slots.

    Args:
        slots: requests at work at once.
        capacity: requests that may wait, of all tenants together.

    Memory is bounded by the capacity and one tag for each tenant, which are as many as have keys.
    """

    def __init__(self, slots: int, capacity: int) -> None:
        self.slots, self.capacity = slots, capacity
        self.at_work = 0
        self._lines: dict[str, _Line] = {}
        self._waiting = 0
        self._served_tag = 0.0
        self._seconds = 1.0  # that a request takes, as a moving mean

    @property
    def waiting(self) -> int:
        """Requests that wait."""
        return self._waiting

    def offer(self, tenant: str, cost: int, deadline: float) -> tuple[Ticket, Ticket | None]:
        """Puts a request in line.

        When the queue is full, the newest request of the tenant with the longest line makes room for a tenant whose
        line is shorter by two or more: one tenant's flood keeps nobody else out.

        Returns:
            Its ticket, and the one that lost its place to it, if any.

        Raises:
            RequestError: 503, there is no room.
        """
        if not self.at_work and not self._waiting:
            self._lines.clear()  # nobody is ahead of anybody
            self._served_tag = 0.0
        mine = len(self._lines[tenant].waiting) if tenant in self._lines else 0
        outed = None
        if self._waiting >= self.capacity and (self.at_work >= self.slots or self._waiting):
            longest = max(self._lines.values(), key=lambda line: len(line.waiting), default=None)
            if longest is None or len(longest.waiting) < mine + 2:
                raise self.overloaded()
            outed = longest.waiting.pop()
            self._waiting -= 1
        if len(self._lines) > 2 * (self.capacity + self.slots):
            self._forget_even()
        ticket = Ticket(tenant, max(1, cost), deadline)
        line = self._lines.setdefault(tenant, _Line(self._served_tag))
        if not line.waiting:
            line.tag = max(line.tag, self._served_tag)
        line.waiting.append(ticket)
        self._waiting += 1
        return ticket, outed

    def next(self, now: float) -> Ticket | None:
        """The request to begin now; None when no slot is free or nobody waits. Late ones are passed over."""
        self.expire(now)
        if self.at_work >= self.slots or not self._waiting:
            return None
        line = min((one for one in self._lines.values() if one.waiting), key=lambda one: one.tag)
        ticket = line.waiting.popleft()
        self._waiting -= 1
        self.at_work += 1
        ticket.began, ticket.charged = now, ticket.cost
        self._served_tag = max(self._served_tag, line.tag)
        line.tag += ticket.cost
        return ticket

    def release(self, ticket: Ticket, now: float) -> None:
        """Frees the slot of a request that was at work, and charges its tenant what it took."""
        assert ticket.began is not None, "only a request that has begun has a slot"
        self.at_work -= 1
        self._seconds += 0.1 * (now - ticket.began - self._seconds)
        if line := self._lines.get(ticket.tenant):
            line.tag += ticket.cost - ticket.charged

    def cancel(self, ticket: Ticket) -> bool:
        """Takes a waiting request out of line; False when it is not in line any more."""
        line = self._lines.get(ticket.tenant)
        if line is None or ticket not in line.waiting:
            return False
        line.waiting.remove(ticket)
        self._waiting -= 1
        return True

    def expire(self, now: float) -> list[Ticket]:
        """Takes out of line what has waited past its deadline."""
        late = [ticket for line in self._lines.values() for ticket in line.waiting if ticket.deadline <= now]
        for ticket in late:
            self.cancel(ticket)
        return late

    def overloaded(self) -> RequestError:
        """The refusal of a request for which there is no room or no time, with when there may be."""
        wait = max(1.0, self._seconds * (self._waiting + 1) / self.slots)
        return RequestError(
            f"the server is at work on {self.at_work} requests and {self._waiting} wait; {self.capacity} may",
            status=503,
            code="overloaded",
            retry_after=min(60.0, wait),
        )

    def _forget_even(self) -> None:
        """A tenant that is not ahead of the last served would begin where a new one does."""
        self._lines = {
            tenant: line for tenant, line in self._lines.items() if line.waiting or line.tag > self._served_tag
        }


class Gate:
    """Coroutines wait here for their slot. One event loop's.

    Args:
        clock: seconds; the same that deadlines are in.
    """

    def __init__(self, queue: FairQueue, clock: Callable[[], float] = time.monotonic) -> None:
        self.queue = queue
        self._clock = clock
        self._turns: dict[Ticket, asyncio.Future[None]] = {}

    @contextlib.asynccontextmanager
    async def slot(self, tenant: str, cost: int, max_wait_s: float) -> AsyncIterator[Ticket]:
        """Waits for a slot and holds it for the block, which may set the ticket's `cost` to what it took.

        Raises:
            RequestError: 503, the queue is full, or no slot came free in `max_wait_s` seconds.
        """
        ticket, outed = self.queue.offer(tenant, cost, self._clock() + max_wait_s)
        if outed is not None and (turn := self._turns.pop(outed, None)) and not turn.done():
            turn.set_exception(self.queue.overloaded())
        turn = self._turns[ticket] = asyncio.get_running_loop().create_future()
        self._admit()
        try:
            try:
                async with asyncio.timeout(max_wait_s):
                    await turn
            except TimeoutError:
                if ticket.began is None:
                    raise self.queue.overloaded() from None
            yield ticket
        finally:
            self._turns.pop(ticket, None)
            if ticket.began is None:
                self.queue.cancel(ticket)
            else:
                self.queue.release(ticket, self._clock())
            self._admit()

    def _admit(self) -> None:
        while ticket := self.queue.next(self._clock()):
            turn = self._turns.pop(ticket, None)
            if turn is not None and not turn.done():
                turn.set_result(None)
            # a turn that is done was cancelled meanwhile: its coroutine gives the slot back on its way out
