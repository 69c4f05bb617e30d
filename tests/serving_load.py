"""Clients that stream chats from a service at once, and what became of each request."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from threading import Event, Thread
from typing import Any

import httpx
from serving_service import QUESTION, Service


@dataclass
class Outcome:
    """One request.

    Attributes:
        sent, headed, ended: seconds of `time.monotonic`: when it was sent, when its status came, when it was over.
        status: of HTTP; 0 when the connection broke before it came.
        failure: how it broke off, empty when it did not.
    """

    sent: float
    headed: float = 0.0
    ended: float = 0.0
    status: int = 0
    text: str = ""
    version: str = ""
    generation: int = -1
    retry_after: str | None = None
    failure: str = ""

    @property
    def is_whole(self) -> bool:
        return self.status == 200 and not self.failure

    @property
    def seconds(self) -> float:
        return self.ended - self.sent


async def ask(client: httpx.AsyncClient, service: Service, model: str, **settings: Any) -> Outcome:
    """Streams one greedy chat to its end."""
    outcome = Outcome(time.monotonic())
    body = {"model": model, "messages": QUESTION, "temperature": 0, "stream": True, "max_tokens": 16, **settings}
    is_done = False
    try:
        async with client.stream("POST", f"{service.url}/chat/completions", json=body) as answer:
            outcome.headed, outcome.status = time.monotonic(), answer.status_code
            outcome.retry_after = answer.headers.get("retry-after")
            outcome.version = answer.headers.get("x-tunesmith-version", "")
            outcome.generation = int(answer.headers.get("x-tunesmith-generation", -1))
            async for line in answer.aiter_lines():
                if line == "data: [DONE]":
                    is_done = True
                elif line.startswith("data: "):
                    chunk = json.loads(line[6:])
                    if "error" in chunk:
                        outcome.failure = chunk["error"]["message"]
                    else:
                        outcome.text += "".join(one["delta"].get("content") or "" for one in chunk["choices"])
                elif outcome.status != 200:
                    outcome.failure += line
    except httpx.HTTPError as error:
        outcome.failure = f"{type(error).__name__}: {error}"
    outcome.ended = time.monotonic()
    if outcome.status == 200 and not is_done and not outcome.failure:
        outcome.failure = "it ended without [DONE]"
    return outcome


@dataclass
class Load:
    """What clients have seen so far."""

    outcomes: list[Outcome] = field(default_factory=list)

    @property
    def broken(self) -> list[Outcome]:
        return [one for one in self.outcomes if not one.is_whole]


@contextmanager
def streaming(service: Service, clients: int, model: str, **settings: Any) -> Iterator[Load]:
    """Clients that each ask again as soon as they have been answered, within the block; they end what they began."""
    load, stop = Load(), Event()

    async def one_client(client: httpx.AsyncClient) -> None:
        while not stop.is_set():
            load.outcomes.append(await ask(client, service, model, **settings))

    async def all_clients() -> None:
        async with a_client(service, clients) as client:
            await asyncio.gather(*(one_client(client) for _ in range(clients)))

    thread = Thread(target=lambda: asyncio.run(all_clients()))
    thread.start()
    try:
        yield load
    finally:
        stop.set()
        thread.join(120)
    assert not thread.is_alive(), "a client is still waiting for its answer"


def a_client(service: Service, connections: int) -> httpx.AsyncClient:
    limits = httpx.Limits(max_connections=connections, max_keepalive_connections=connections)
    return httpx.AsyncClient(headers=service.headers(), timeout=90, limits=limits)


async def arriving(service: Service, model: str, per_second: float, seconds: float, **settings: Any) -> list[Outcome]:
    """Requests that arrive evenly, whatever has become of those before them."""
    async with a_client(service, 2000) as client:
        tasks = []
        began = time.monotonic()
        for index in range(round(per_second * seconds)):
            await asyncio.sleep(max(0.0, began + index / per_second - time.monotonic()))
            tasks.append(asyncio.create_task(ask(client, service, model, **settings)))
        return await asyncio.gather(*tasks)


def percentile(values: list[float], share: float) -> float:
    """The smallest value that this share of them do not exceed."""
    return sorted(values)[max(0, -(-int(len(values) * share * 1000) // 1000) - 1)]
