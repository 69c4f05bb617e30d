"""A request between its arrival and its end: what it comes to, for its answer and for the desk."""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator, AsyncIterator, Iterator
from contextlib import aclosing, contextmanager
from dataclasses import dataclass, field
from typing import Any

from tunesmith.serving.answers import Head
from tunesmith.serving.desk import Route
from tunesmith.serving.engines.protocol import Piece
from tunesmith.serving.metrics import LEFT, Report, status_of


@dataclass
class Turn:
    """A request that is being answered.

    Attributes:
        arrived: by the monotonic clock.
        prompt_tokens: of all its prompts so far.
        completion_tokens: of all its answers so far.
        answers: that it wants.
        first: when the first token of a stream came.
        status: what it comes to; the first failure stays.
        unended: its parts that have begun and not come to their end.
        extra: further keys of the answer.
    """

    route: Route
    id: str
    created: int
    arrived: float = field(default_factory=time.monotonic)
    prompt_tokens: int = 0
    completion_tokens: int = 0
    answers: int = 0
    first: float | None = None
    status: int = 200
    unended: int = 0
    extra: dict[str, Any] | None = None

    async def counting(self, pieces: AsyncIterator[Piece]) -> AsyncGenerator[Piece, None]:
        """The pieces of one ask, whose tokens count as they come."""
        is_first = True
        async with aclosing(pieces):  # type: ignore[type-var]
            async for piece in pieces:
                if is_first:
                    self.prompt_tokens += piece.prompt_tokens
                    is_first = False
                self.completion_tokens += piece.tokens
                yield piece

    @contextmanager
    def judged(self) -> Iterator[None]:
        """Notes whether the block ends, and what it fails with."""
        self.unended += 1
        try:
            yield
            self.unended -= 1
        except BaseException as error:
            self.status = status_of(error) if self.status == 200 else self.status
            raise

    def report(self) -> Report:
        """For the desk, now that it has ended."""
        first = None if self.first is None else self.first - self.arrived
        total = time.monotonic() - self.arrived
        # a stream whose client leaves while a chunk is being sent is only closed after the request has left
        status = LEFT if self.status == 200 and self.unended else self.status
        return Report(self.prompt_tokens, self.completion_tokens, max(1, self.answers), first, total, status)

    @property
    def headers(self) -> dict[str, str]:
        return {**self.route.headers(), "x-request-id": self.id}

    @property
    def head(self) -> Head:
        return Head(self.id, self.route.model, self.created, self.route.fingerprint)
