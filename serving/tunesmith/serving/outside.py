"""Asks OpenAI-compatible servers outside, of the configuration's allow-list, for a mixture's proposals.

What they send is not trusted: no redirect is followed, no proxy or netrc of the environment is used, compressed answers
are refused (a small one may hold a huge one), and lines and answers are bounded.
"""

from __future__ import annotations

import json
from collections.abc import AsyncGenerator, AsyncIterator, Mapping
from dataclasses import dataclass
from typing import Any

import httpx

from tunesmith.cluster.errors import RequestError, ServeConfigError
from tunesmith.serving.config import Endpoint
from tunesmith.serving.engines.protocol import Finish, Message, Piece, Sampling

MOST_BYTES, LONGEST_LINE = 8 * 2**20, 2**18
"""Of a streamed answer, and of one event in it."""

TIMEOUT = httpx.Timeout(connect=5.0, read=60.0, write=10.0, pool=5.0)
"""Seconds; a mixture's own deadline is usually shorter."""

_FINISHES: dict[str, Finish] = {"stop": "stop", "length": "length", "content_filter": "stop"}


class Outside:
    """A client of the endpoints.

    Args:
        endpoints: the allow-list, by name.
        environ: where their keys are.
        transport: another way to the network, for tests.

    Raises:
        ServeConfigError: an endpoint's key is not in the environment.
    """

    def __init__(
        self,
        endpoints: Mapping[str, Endpoint],
        environ: Mapping[str, str],
        transport: httpx.AsyncBaseTransport | None = None,
    ) -> None:
        self._endpoints = dict(endpoints)
        self._headers = headers_of(endpoints, environ)
        self._client = httpx.AsyncClient(
            timeout=TIMEOUT,
            follow_redirects=False,
            trust_env=False,
            transport=transport,
            limits=httpx.Limits(max_connections=128, max_keepalive_connections=32),
        )

    async def close(self) -> None:
        """Closes the connections."""
        await self._client.aclose()

    async def generate(
        self, endpoint: str, model: str, messages: list[Message], sampling: Sampling
    ) -> AsyncGenerator[Piece, None]:
        """One streamed answer. Closing the generator closes the connection.

        Raises:
            RequestError: 502, the endpoint does not answer as it should; 504, it does not answer.
        """
        url = f"{self._endpoints[endpoint].url.rstrip('/')}/chat/completions"
        body = _body(model, messages, sampling)
        answer = _Answer()
        try:
            async with self._client.stream("POST", url, json=body, headers=self._headers[endpoint]) as response:
                _check(response)
                async for line in _lines(response.aiter_raw()):
                    if piece := answer.take(line):
                        yield piece
                    if answer.ended:
                        break
        except httpx.TimeoutException as error:
            raise _wrong(endpoint, f"does not answer ({type(error).__name__})", 504) from error
        except httpx.HTTPError as error:
            raise _wrong(endpoint, f"cannot be reached or broke off ({type(error).__name__})") from error
        except _Unusable as error:
            raise _wrong(endpoint, str(error)) from error
        if answer.finish is None:
            raise _wrong(endpoint, "ended its answer without saying why")
        yield answer.last()


def headers_of(endpoints: Mapping[str, Endpoint], environ: Mapping[str, str]) -> dict[str, dict[str, str]]:
    """What requests to each endpoint carry, its key among them.

    Raises:
        ServeConfigError: an endpoint's key is not in the environment.
    """
    return {name: _headers(name, one, environ) for name, one in endpoints.items()}


class _Unusable(Exception):
    """What came is no answer."""


@dataclass
class _Answer:
    finish: Finish | None = None
    ended: bool = False
    chunks: int = 0
    prompt_tokens: int = 0
    completion_tokens: int | None = None

    def take(self, line: bytes) -> Piece | None:
        """The text of an event, if it has some; counts one token for it until the usage says better."""
        if not line.startswith(b"data:"):
            return None
        data = line[5:].strip()
        if data == b"[DONE]":
            self.ended = True
            return None
        try:
            return self._of_chunk(json.loads(data))
        except (ValueError, KeyError, TypeError, AttributeError, IndexError, RecursionError) as error:
            raise _Unusable(f"sent an event that is no chunk of a chat ({type(error).__name__})") from error

    def last(self) -> Piece:
        """The finish, with what the usage has beyond the tokens counted."""
        total = self.chunks if self.completion_tokens is None else self.completion_tokens
        return Piece(0, "", max(0, total - self.chunks), self.prompt_tokens, self.finish)

    def _of_chunk(self, chunk: dict[str, Any]) -> Piece | None:
        if chunk.get("error"):
            raise _Unusable("sent an error in the middle of its answer")
        if usage := chunk.get("usage"):
            self.prompt_tokens, self.completion_tokens = (
                _count(usage["prompt_tokens"]),
                _count(usage["completion_tokens"]),
            )
        if not chunk["choices"]:
            return None
        choice = chunk["choices"][0]
        if finish := choice.get("finish_reason"):
            self.finish = _FINISHES[finish]
        text = choice["delta"].get("content") or ""
        if not text:
            return None
        text.encode()  # half of a surrogate pair is no text
        self.chunks += 1
        return Piece(0, text, 1, self.prompt_tokens)


def _count(value: Any) -> int:
    if not isinstance(value, int) or not 0 <= value < 2**31:
        raise ValueError("no count of tokens")
    return value


async def _lines(blocks: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
    total, rest = 0, bytearray()
    async for block in blocks:
        total += len(block)
        if total > MOST_BYTES:
            raise _Unusable(f"sent more than {MOST_BYTES} bytes")
        rest += block  # in place: blocks may be of one byte each
        whole: list[bytearray] = []
        if b"\n" in block:
            *whole, rest = rest.split(b"\n")
        if len(rest) > LONGEST_LINE:
            raise _Unusable(f"sent a line of more than {LONGEST_LINE} bytes")
        for line in whole:
            yield bytes(line)
    yield bytes(rest)


def _check(response: httpx.Response) -> None:
    if response.status_code != 200:
        raise _Unusable(f"answered with status {response.status_code}")
    kind = response.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "text/event-stream":
        raise _Unusable(f"answered with {kind[:40] or 'no content type'} instead of a stream")
    if response.headers.get("content-encoding", "identity") != "identity":
        raise _Unusable("compressed its answer although it was asked not to")


def _body(model: str, messages: list[Message], sampling: Sampling) -> dict[str, Any]:
    """Only what differs from OpenAI's defaults: some servers refuse what they do not know."""
    asked: dict[str, Any] = {
        "model": model,
        "messages": messages,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    defaults = Sampling()
    for key in ("max_tokens", "temperature", "top_p", "frequency_penalty", "presence_penalty", "seed"):
        if (value := getattr(sampling, key)) != getattr(defaults, key):
            asked[key] = value
    if sampling.stop:
        asked["stop"] = list(sampling.stop)
    if sampling.schema is not None:
        wanted = {"type": "json_schema", "json_schema": {"name": "answer", "schema": sampling.schema}}
        asked["response_format"] = wanted if sampling.schema else {"type": "json_object"}
    return asked


def _headers(name: str, endpoint: Endpoint, environ: Mapping[str, str]) -> dict[str, str]:
    headers = {"Accept": "text/event-stream", "Accept-Encoding": "identity"}
    if endpoint.api_key_env is None:
        return headers
    key = environ.get(endpoint.api_key_env, "").strip()
    if not key:
        raise ServeConfigError(
            f"endpoints.{name}: the environment variable {endpoint.api_key_env} is not set",
            "Set it to the endpoint's key where the gateway runs.",
        )
    return headers | {"Authorization": f"Bearer {key}"}


def _wrong(endpoint: str, what: str, status: int = 502) -> RequestError:
    return RequestError(f"the endpoint {endpoint} {what}", status=status, code="endpoint_failed")
