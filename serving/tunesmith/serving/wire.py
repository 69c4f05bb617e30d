"""What goes over the wire: bodies read no further than they may be long, events that end what they hold, merged streams."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator, AsyncIterator, Coroutine
from contextlib import AsyncExitStack, aclosing
from typing import Any

from fastapi import Request
from fastapi.responses import StreamingResponse

from tunesmith.cluster.errors import RequestError
from tunesmith.serving import answers
from tunesmith.serving.engines.protocol import Piece


async def body_of(request: Request, most: int) -> bytes:
    """The body, read no further than it may be long."""
    body = bytearray()
    async for part in request.stream():
        body += part
        if len(body) > most:
            raise RequestError(f"the body is larger than {most:,} bytes", 413, code="body_too_large")
    return bytes(body)


async def object_of(request: Request, most: int, fields: dict[str, type]) -> dict[str, Any]:
    """A small JSON object of an operator; the first field must be there."""
    try:
        sent = json.loads(await body_of(request, most))
    except (ValueError, RecursionError) as error:
        raise RequestError(f"the body is not JSON: {str(error)[:100]}") from error
    if not isinstance(sent, dict) or next(iter(fields)) not in sent:
        raise RequestError(f"the body is a JSON object with {', '.join(fields)}", param=next(iter(fields)))
    for key, value in sent.items():
        if key not in fields:
            raise RequestError(f"unknown field {key[:40]!r}; there are {', '.join(fields)}", param=key[:40])
        if value is not None and (not isinstance(value, fields[key]) or isinstance(value, bool)):
            raise RequestError(f"{key} is no {fields[key].__name__}", param=key)
    weights = sent.get("weights") or {}
    if any(isinstance(w, bool) or not isinstance(w, int | float) for w in weights.values()):
        raise RequestError("weights are numbers by version", param="weights")
    return sent


class Events(StreamingResponse):
    """Server-sent events of a request, which leaves the desk when they end, however they end.

    What fails after the first byte is said in an event, for the status has gone out.
    """

    def __init__(self, events: AsyncIterator[bytes], headers: dict[str, str], held: AsyncExitStack) -> None:
        self._events, self._held = events, held
        super().__init__(self._sent(), media_type="text/event-stream", headers={**headers, "cache-control": "no-cache"})

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        async with self._held:
            await super().__call__(scope, receive, send)

    async def _sent(self) -> AsyncIterator[bytes]:
        async with aclosing(self._events) as events:  # type: ignore[type-var]
            try:
                async for event in events:
                    yield event
            except RequestError as error:
                yield answers.event(answers.error_answer(error))
                return
            yield b"data: [DONE]\n\n"


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


async def merged(streams: list[AsyncIterator[Piece]]) -> AsyncIterator[tuple[int, Piece]]:
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
