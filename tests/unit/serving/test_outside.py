"""Endpoints outside, over real sockets: what they send is bounded and checked, and leaving closes the connection."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path

import pytest
from desk_backend import InProcess, desk

from tunesmith.cluster.errors import RequestError, ServeConfigError
from tunesmith.serving.config import Endpoint
from tunesmith.serving.engines.protocol import Piece, Sampling
from tunesmith.serving.gateway import Gateway
from tunesmith.serving.outside import LONGEST_LINE, MOST_BYTES, Outside

TALK = [{"role": "user", "content": "hi"}]
Answer = Callable[[asyncio.StreamWriter], Awaitable[None]]
OK = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream; charset=utf-8\r\nConnection: close\r\n\r\n"


class Server:
    """One raw HTTP server that answers every request alike and keeps what it was sent."""

    def __init__(self, answer: Answer) -> None:
        self.answer, self.requests, self.left = answer, [], asyncio.Event()

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = await reader.readuntil(b"\r\n\r\n")
        size = next(int(line[15:]) for line in head.split(b"\r\n") if line.lower().startswith(b"content-length:"))
        self.requests.append((head.decode(), json.loads(await reader.readexactly(size))))
        gone = asyncio.create_task(reader.read())
        with contextlib.suppress(ConnectionError):
            await self.answer(writer)
            await writer.drain()
        if not gone.done() and self.answer is forever:
            await gone
        self.left.set()
        gone.cancel()
        writer.close()


@contextlib.asynccontextmanager
async def outside(answer: Answer) -> AsyncIterator[tuple[Outside, Server]]:
    server = Server(answer)
    listening = await asyncio.start_server(server.serve, "127.0.0.1", 0)
    port = listening.sockets[0].getsockname()[1]
    endpoint = Endpoint(url=f"http://127.0.0.1:{port}/v1/", api_key_env="KEY")
    client = Outside({"peer": endpoint}, {"KEY": "secret"})
    try:
        yield client, server
    finally:
        await client.close()
        listening.close()


def test_connections_end_with_the_gateway(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    closed: list[Outside] = []

    async def close(client: Outside) -> None:
        closed.append(client)

    async def live() -> None:
        at = desk(tmp_path, "ba5e" * 16)
        app = Gateway(at.config, InProcess(at), "gateway").app()
        async with app.router.lifespan_context(app):
            assert closed == []
        assert len(closed) == 1

    monkeypatch.setattr(Outside, "close", close)
    asyncio.run(live())


def sends(raw: bytes) -> Answer:
    async def answer(writer: asyncio.StreamWriter) -> None:
        writer.write(raw)

    return answer


async def forever(writer: asyncio.StreamWriter) -> None:
    writer.write(OK + chunk("one"))
    await writer.drain()


def chunk(text: str | None = None, finish: str | None = None, **more) -> bytes:
    choices = (
        [] if text is None and finish is None else [{"index": 0, "delta": {"content": text}, "finish_reason": finish}]
    )
    return b"data: " + json.dumps({"choices": choices, **more}).encode() + b"\r\n\r\n"


USAGE = chunk(usage={"prompt_tokens": 5, "completion_tokens": 9})
WHOLE = OK + b": hello\n\n" + chunk("Par") + chunk("is") + chunk(None, "stop") + USAGE + b"data: [DONE]\n\n"


def asked(answer: Answer, sampling: Sampling | None = None) -> tuple[list[Piece], Server]:
    async def ask() -> tuple[list[Piece], Server]:
        async with outside(answer) as (client, server):
            pieces = client.generate("peer", "big", TALK, sampling or Sampling())
            return [piece async for piece in pieces], server

    return asyncio.run(ask())


def test_a_streamed_answer_comes_in_pieces_with_its_usage_at_the_end():
    pieces, _ = asked(sends(WHOLE))
    assert [piece.text for piece in pieces] == ["Par", "is", ""]
    assert sum(piece.tokens for piece in pieces) == 9
    assert (pieces[-1].finish, pieces[-1].prompt_tokens) == ("stop", 5)


def test_the_request_has_the_key_and_only_what_differs_from_defaults():
    _, server = asked(sends(WHOLE))
    head, body = server.requests[0]
    assert head.startswith("POST /v1/chat/completions ")
    assert "authorization: bearer secret" in head.lower()
    assert "accept-encoding: identity" in head.lower()
    assert body == {"model": "big", "messages": TALK, "stream": True, "stream_options": {"include_usage": True}}
    sampling = Sampling(max_tokens=4, temperature=0, seed=1, stop=("x",), schema={"type": "object"})
    body = asked(sends(WHOLE), sampling)[1].requests[0][1]
    assert (body["max_tokens"], body["temperature"], body["seed"], body["stop"]) == (4, 0, 1, ["x"])
    assert body["response_format"]["json_schema"]["schema"] == {"type": "object"}


def status(line: str, *headers: str, body: bytes = b"") -> bytes:
    lines = [f"HTTP/1.1 {line}", *headers, f"Content-Length: {len(body)}", "Connection: close"]
    return "\r\n".join(lines).encode() + b"\r\n\r\n" + body


@pytest.mark.parametrize(
    ("raw", "said"),
    [
        (status("500 Oops", body=b"secret trace"), "status 500"),
        (status("302 Found", "Location: http://169.254.169.254/latest/"), "status 302"),
        (status("200 OK", "Content-Type: application/json", body=b"{}"), "application/json"),
        (status("200 OK", body=b"{}"), "no content type"),
        (OK.replace(b"\r\nConn", b"\r\nContent-Encoding: gzip\r\nConn") + b"\x1f\x8b", "compressed"),
        (OK + b"data: {nonsense}\n\n", "no chunk of a chat"),
        (OK + b"data: []\n\n", "no chunk of a chat"),
        (OK + b"data: {}\n\n", "no chunk of a chat"),
        (OK + b"data: " + b"[" * 100_000 + b"\n\n", "no chunk of a chat"),
        (OK + b'data: {"choices": [{"delta": {"content": "\\ud800"}}]}\n\n', "no chunk of a chat"),
        (
            OK + b'data: {"choices": [], "usage": {"prompt_tokens": -5, "completion_tokens": 1}}\n\n',
            "no chunk of a chat",
        ),
        (OK + chunk("x", "tool_calls"), "no chunk of a chat"),
        (OK + b'data: {"error": {"message": "overloaded"}}\n\n', "error in the middle"),
        (OK + b"data: " + b"x" * (LONGEST_LINE + 1000), "a line of more than"),
        (OK + (b": padding" * 1000 + b"\n") * (MOST_BYTES // 9000 + 1), "sent more than"),
        (OK + chunk("half"), "without saying why"),
        (OK + chunk("half") + b"data: [DONE]\n\n", "without saying why"),
        (
            b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nContent-Length: 999\r\n\r\n" + chunk("x"),
            "broke off",
        ),
        (b"SSH-2.0-OpenSSH\r\n", "broke off"),
        (b"", "broke off"),
    ],
)
def test_what_is_no_proper_answer_is_refused_without_its_contents(raw: bytes, said: str):
    with pytest.raises(RequestError) as caught:
        asked(sends(raw))
    assert caught.value.status == 502
    assert said in caught.value.what
    assert "the endpoint peer" in caught.value.what
    assert "secret" not in caught.value.what


def test_an_endpoint_that_is_not_there_is_refused():
    async def ask() -> None:
        client = Outside({"peer": Endpoint(url="http://127.0.0.1:9/v1")}, {})
        try:
            async for _ in client.generate("peer", "m", TALK, Sampling()):
                pass
        finally:
            await client.close()

    with pytest.raises(RequestError, match="cannot be reached"):
        asyncio.run(ask())


def test_leaving_closes_the_connection():
    async def leave() -> None:
        async with outside(forever) as (client, server):
            pieces = client.generate("peer", "m", TALK, Sampling())
            assert (await anext(pieces)).text == "one"
            assert not server.left.is_set()
            await pieces.aclose()
            await asyncio.wait_for(server.left.wait(), 5)

    asyncio.run(leave())


def test_a_key_that_is_not_in_the_environment_is_a_mistake_of_the_configuration():
    with pytest.raises(ServeConfigError, match="the environment variable KEY is not set"):
        Outside({"peer": Endpoint(url="http://x/v1", api_key_env="KEY")}, {"KEY": " "})
