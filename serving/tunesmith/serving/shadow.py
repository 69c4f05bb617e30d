"""Shadow traffic: an alias may name a version that is asked whatever its route is asked, and whose answers nobody sees.

What it takes shows in the metrics under its own version. It never holds up a request: one is begun only while a
slot is free, and at most `MOST` at once.
"""

from __future__ import annotations

import asyncio
import logging
import time
from contextlib import aclosing
from dataclasses import replace
from typing import Any

from tunesmith.cluster.errors import RequestError
from tunesmith.serving.desk import Entry, Route
from tunesmith.serving.engines.protocol import Ask, Version
from tunesmith.serving.metrics import Report, status_of

MOST = 32
"""Shadows of one gateway at once."""
_log = logging.getLogger("ray.serve.tunesmith")


class Shadows:
    """One gateway's.

    Args:
        backend: the desk and the engines.
        gateway: its name at the desk.
    """

    def __init__(self, backend: Any, gateway: str) -> None:
        self._backend, self._gateway = backend, gateway
        self._tasks: set[asyncio.Task[None]] = set()

    def begin(self, route: Route, ask: Ask, within: str) -> None:
        """Asks the route's shadow too, if it has one; returns at once.

        Args:
            within: id of the request, whose key's limits have counted it already.
        """
        if route.shadow is None or len(self._tasks) >= MOST:
            return
        task = asyncio.create_task(self._ask(f"{route.adapter}@{route.shadow}", route.shadow, ask, within))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _ask(self, model: str, digest: str, ask: Ask, within: str) -> None:
        id, began, prompt, completion, status = f"{ask.id}-shadow", time.monotonic(), 0, 0, 200
        try:
            route = await self._backend.enter(Entry(id, self._gateway, None, model, within=within, is_shadow=True))
        except RequestError as error:
            _log.info("shadow %s was not asked: %s", digest[:12], error)
            return
        try:
            pieces = self._backend.generate(route.base, replace(ask, id=id, version=Version(digest, ""), stream=False))
            async with aclosing(pieces):
                async for piece in pieces:
                    prompt, completion = piece.prompt_tokens, completion + piece.tokens
        except RequestError as error:
            status = status_of(error)
            _log.warning("shadow %s did not answer: %s", digest[:12], error)
        finally:
            report = Report(prompt, completion, ask.n, None, time.monotonic() - began, status)
            self._backend.leave(id, report)
