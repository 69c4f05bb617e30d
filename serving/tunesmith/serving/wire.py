"""What goes over the wire: bodies read no further than they may be long, events that end what they hold, merged streams."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Coroutine, Sequence
from contextlib import AsyncExitStack, aclosing
from typing import Any, TypeVar

from fastapi import Request
from fastapi.responses import StreamingResponse
from pydantic import BaseModel

from tunesmith.cluster.errors import RequestError
from tunesmith.serving import answers
from tunesmith.serving.body import parse_body
from tunesmith.serving.engines.protocol import Piece

BODY_S = 20.0
"""Seconds that a body may take to come."""
SMALL = 65_536
"""Bytes of a body that is parsed at once; larger ones would keep others waiting, and go to a thread."""

Sent = TypeVar("Sent", bound=BaseModel)


async def sent(request: Request, kind: type[Sent], most: int) -> Sent:
    """What a client has sent, checked.

    Raises:
        RequestError: 408, 413, or 400 naming the parameter that is wrong.
    """
    body = await body_of(request, most)
    if len(body) < SMALL:
        return parse_body(body, kind, most)
    return await asyncio.to_thread(parse_body, body, kind, most)


async def body_of(request: Request, most: int) -> bytes:
    """The body, read no further than it may be long, and waited for no longer than it may take.

    Raises:
        RequestError: 408 or 413.
    """
    body = bytearray()
    try:
        async with asyncio.timeout(BODY_S):
            async for part in request.stream():
                body += part
                if len(body) > most:
                    raise RequestError(f"the body is larger than {most:,} bytes", 413, code="body_too_large")
    except TimeoutError as error:
        what = f"{len(body):,} bytes of the body came in {BODY_S:g} s, and not its end"
        raise RequestError(what, 408, code="body_too_slow") from error
    return bytes(body)


class Events(StreamingResponse):
    """Server-sent events of a request, which leaves the desk when they end, however they end.

    What fails after the first byte is said in an event, for the status has gone out.
    """

    def __init__(
        self, first: bytes | None, events: AsyncGenerator[bytes, None], headers: dict[str, str], held: AsyncExitStack
    ) -> None:
        self._first, self._events, self._held = first, events, held
        super().__init__(self._sent(), media_type="text/event-stream", headers={**headers, "cache-control": "no-cache"})

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        async with self._held, aclosing(self._events):
            await super().__call__(scope, receive, send)

    async def _sent(self) -> AsyncIterator[bytes]:
        try:
            if self._first is not None:
                yield self._first
            async for event in self._events:
                yield event
        except RequestError as error:
            yield answers.event(answers.error_answer(error))
            return
        yield answers.DONE


async def streamed(events: AsyncGenerator[bytes, None], headers: dict[str, str], stack: AsyncExitStack) -> Events:
    """The events, once the first has come, so that what fails before it is answered with a status of its own.

    Args:
        stack: what the request holds, which the response takes over.

    Raises:
        RequestError: the request failed before its first event.
    """
    first = await anext(events, None)
    return Events(first, events, headers, stack.pop_all())


async def whole(
    pieces: AsyncGenerator[Piece | None, None] | AsyncGenerator[Piece, None], n: int
) -> list[answers.Answer]:
    async with aclosing(pieces) as open_pieces:
        return answers.collect([piece async for piece in open_pieces if piece is not None], n)


async def every(works: list[Coroutine[Any, Any, Any]]) -> list[Any]:
    """Every result; the first error ends the others."""
    tasks = [asyncio.create_task(work) for work in works]
    try:
        return await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def merged(streams: Sequence[AsyncIterator[Piece]]) -> AsyncGenerator[tuple[int, Piece], None]:
    """Pieces of several streams as they come, each with its stream's number."""
    queue: asyncio.Queue[tuple[int, Piece] | BaseException | None] = asyncio.Queue(64)

    async def pump(index: int, stream: AsyncIterator[Piece]) -> None:
        try:
            async with aclosing(stream) as pieces:  # type: ignore[type-var]
                async for piece in pieces:
                    await queue.put((index, piece))
            await queue.put(None)
        except Exception as error:  # noqa: BLE001 - it is raised again where the pieces are taken
            await queue.put(error)

    tasks = [asyncio.create_task(pump(index, stream)) for index, stream in enumerate(streams)]
    try:
        left = len(tasks)
        while left:
            got = await queue.get()
            if isinstance(got, BaseException):
                raise got
            if got is None:
                left -= 1
            else:
                yield got
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
