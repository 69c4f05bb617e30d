"""OpenAI's API over the engines: a request comes in, passes the desk, and its pieces go out as they come."""

from __future__ import annotations

import asyncio
import json
import time
import uuid
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, aclosing, asynccontextmanager
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, PlainTextResponse, Response, StreamingResponse

from tunesmith.cluster.errors import RequestError
from tunesmith.serving import answers
from tunesmith.serving.body import parse_body
from tunesmith.serving.config import Serve
from tunesmith.serving.desk import Entry, Route
from tunesmith.serving.engines.protocol import Ask, Piece, Version
from tunesmith.serving.limits import estimated_tokens
from tunesmith.serving.protocol import ChatRequest, CompletionRequest, EmbeddingRequest, to_ask, to_asks

Sent = TypeVar("Sent", ChatRequest, CompletionRequest, EmbeddingRequest)


class Backend(Protocol):
    """The desk and the engines, wherever they run."""

    async def enter(self, entry: Entry) -> Route: ...
    def leave(self, id: str, used: int) -> None: ...
    def generate(self, base: str, ask: Ask) -> AsyncIterator[Piece]: ...
    async def embed(self, base: str, prompts: Any, version: Version | None) -> list[list[float]]: ...
    async def models(self, authorization: str | None) -> list[tuple[str, str]]: ...
    async def admin(self, authorization: str | None, change: str, arguments: dict[str, Any]) -> dict[str, Any]: ...
    async def metrics(self, authorization: str | None) -> str: ...
    async def ready(self) -> bool: ...


@dataclass
class Turn:
    """A request that is being answered.

    Attributes:
        used: tokens of its prompts and answers so far.
    """

    route: Route
    id: str
    created: int
    used: int = 0

    @property
    def head(self) -> answers.Head:
        return answers.Head(self.id, self.route.model, self.created, self.route.fingerprint)


def build(config: Serve, backend: Backend, gateway: str) -> FastAPI:
    """The application.

    Args:
        gateway: this gateway's own name at the desk.
    """
    app = FastAPI(title="Tunesmith", docs_url=None, redoc_url=None)
    most = round(config.http.max_body_mib * 2**20)

    @app.exception_handler(RequestError)
    async def refused(_request: Request, error: RequestError) -> JSONResponse:
        return JSONResponse(answers.error_answer(error), error.status, answers.error_headers(error))

    @app.exception_handler(404)
    async def no_route(request: Request, _error: Exception) -> JSONResponse:
        error = RequestError(f"there is no {request.url.path}", 404, code="unknown_url")
        return JSONResponse(answers.error_answer(error), 404)

    @app.exception_handler(405)
    async def no_method(request: Request, _error: Exception) -> JSONResponse:
        error = RequestError(f"{request.url.path} takes no {request.method}", 405, code="method_not_allowed")
        return JSONResponse(answers.error_answer(error), 405)

    @asynccontextmanager
    async def turn(request: Request, sent: Any, kind: str, tokens: int) -> AsyncIterator[Turn]:
        id = f"{kind}-{uuid.uuid4().hex}"
        entry = Entry(id, gateway, request.headers.get("authorization"), sent.model, sent.user, tokens)
        taken = Turn(await backend.enter(entry), id, int(time.time()))
        try:
            yield taken
        finally:
            backend.leave(id, taken.used)

    async def pieces(taken: Turn, ask: Ask) -> AsyncIterator[Piece]:
        begun: set[int] = set()
        async with aclosing(backend.generate(taken.route.base, ask)) as stream:  # type: ignore[type-var]
            async for piece in stream:
                taken.used += piece.tokens + (0 if begun else piece.prompt_tokens)
                begun.add(piece.index)
                yield piece

    @app.post("/v1/chat/completions", openapi_extra=_body(ChatRequest))
    async def chat(request: Request) -> Response:
        sent = await _read(request, ChatRequest, most)
        tokens = estimated_tokens(sent.conversation) + sent.answers * (
            sent.max_completion_tokens or sent.max_tokens or 0
        )
        async with AsyncExitStack() as stack:
            taken = await stack.enter_async_context(turn(request, sent, "chatcmpl", tokens))
            ask = to_ask(sent, taken.id, _version(taken.route))
            if not sent.stream:
                answer = answers.collect([piece async for piece in pieces(taken, ask)], ask.n)
                return _json(answers.chat_answer(taken.head, answer, bool(sent.logprobs)), taken)
            stream = answers.ChatStream(taken.head, bool(sent.logprobs), sent.usage_streamed)

            async def events() -> AsyncIterator[bytes]:
                async for piece in pieces(taken, ask):
                    for chunk in stream.chunks(piece):
                        yield answers.event(chunk)
                for chunk in stream.end():
                    yield answers.event(chunk)

            return _Events(events(), taken, stack.pop_all())

    @app.post("/v1/completions", openapi_extra=_body(CompletionRequest))
    async def complete(request: Request) -> Response:
        sent = await _read(request, CompletionRequest, most)
        tokens = sum(estimated_tokens(prompt) + sent.answers * (sent.max_tokens or 16) for prompt in sent.prompts)
        async with AsyncExitStack() as stack:
            taken = await stack.enter_async_context(turn(request, sent, "cmpl", tokens))
            asks = to_asks(sent, taken.id, _version(taken.route))
            logprobs, echo = sent.logprobs is not None, bool(sent.echo)
            if not sent.stream:
                made = await _all([_whole(pieces(taken, ask), ask.n) for ask in asks])
                answer = answers.completion_answer(
                    taken.head,
                    made,
                    logprobs=logprobs,
                    echo=echo,
                    scores_only=sent.scores_only,
                    prompts=sent.prompts,
                )
                return _json(answer, taken)
            stream = answers.CompletionStream(
                taken.head,
                sent.answers,
                logprobs,
                sent.usage_streamed,
                sent.prompts if echo else None,
                sent.scores_only,
            )

            async def events() -> AsyncIterator[bytes]:
                async for index, piece in _merged([pieces(taken, ask) for ask in asks]):
                    for chunk in stream.chunks(index, piece):
                        yield answers.event(chunk)
                for chunk in stream.end():
                    yield answers.event(chunk)

            return _Events(events(), taken, stack.pop_all())

    @app.post("/v1/embeddings", openapi_extra=_body(EmbeddingRequest))
    async def embed(request: Request) -> Response:
        sent = await _read(request, EmbeddingRequest, most)
        tokens = sum(map(estimated_tokens, sent.prompts))
        async with turn(request, sent, "embd", tokens) as taken:
            vectors = await backend.embed(taken.route.base, sent.prompts, _version(taken.route))
            taken.used = tokens
            return _json(answers.embedding_answer(sent.model, vectors, tokens, sent.encoding_format), taken)

    @app.get("/v1/models")
    async def models(request: Request) -> Response:
        listed = await backend.models(request.headers.get("authorization"))
        return JSONResponse(answers.models_answer([answers.model_answer(name, 0, owner) for name, owner in listed]))

    @app.get("/v1/models/{model:path}")
    async def model(request: Request, model: str) -> Response:
        listed = dict(await backend.models(request.headers.get("authorization")))
        if model not in listed:
            raise RequestError(f"the model {model[:80]!r} does not exist", 404, "model", "model_not_found")
        return JSONResponse(answers.model_answer(model, 0, listed[model]))

    @app.get("/healthz")
    async def healthz() -> Response:
        return PlainTextResponse("ok")

    @app.get("/readyz")
    async def readyz() -> Response:
        is_ready = await backend.ready()
        return PlainTextResponse("ready" if is_ready else "not ready", 200 if is_ready else 503)

    @app.get("/metrics")
    async def metrics(request: Request) -> Response:
        text = await backend.metrics(request.headers.get("authorization"))
        return PlainTextResponse(text, media_type="text/plain; version=0.0.4")

    _admin(app, backend, most)
    return app


def _admin(app: FastAPI, backend: Backend, most: int) -> None:
    """The operators' routes."""

    async def call(request: Request, change: str, arguments: dict[str, Any]) -> Response:
        return JSONResponse(await backend.admin(request.headers.get("authorization"), change, arguments))

    @app.get("/admin/adapters")
    async def listed(request: Request) -> Response:
        return await call(request, "list", {})

    @app.put("/admin/adapters/{name}/aliases/{alias}")
    async def move(request: Request, name: str, alias: str) -> Response:
        sent = await _object(request, most, {"version": str, "generation": int})
        arguments = {"name": name, "alias": alias, "version": sent["version"], "expected": sent.get("generation")}
        return await call(request, "move", arguments)

    @app.put("/admin/adapters/{name}/aliases/{alias}/split")
    async def split(request: Request, name: str, alias: str) -> Response:
        sent = await _object(request, most, {"weights": dict, "shadow": str, "generation": int})
        arguments = {"name": name, "alias": alias, "weights": sent["weights"], "shadow": sent.get("shadow")}
        return await call(request, "split", {**arguments, "expected": sent.get("generation")})

    @app.post("/admin/adapters/{name}/aliases/{alias}/rollback")
    async def rollback(request: Request, name: str, alias: str) -> Response:
        return await call(request, "rollback", {"name": name, "alias": alias})

    @app.delete("/admin/adapters/{name}/{what}")
    async def remove(request: Request, name: str, what: str) -> Response:
        return await call(request, "remove", {"name": name, "what": what})


async def _object(request: Request, most: int, fields: dict[str, type]) -> dict[str, Any]:
    """A small JSON object of an operator; the first field must be there."""
    try:
        sent = json.loads(await _bytes(request, most))
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


async def _read(request: Request, kind: type[Sent], most: int) -> Sent:
    return parse_body(await _bytes(request, most), kind, most)


async def _bytes(request: Request, most: int) -> bytes:
    """The body, read no further than it may be long."""
    body = bytearray()
    async for part in request.stream():
        body += part
        if len(body) > most:
            raise RequestError(f"the body is larger than {most:,} bytes", 413, code="body_too_large")
    return bytes(body)


class _Events(StreamingResponse):
    """Server-sent events of a request, which leaves the desk when they end, however they end.

    What fails after the first byte is said in an event, for the status has gone out.
    """

    def __init__(self, events: AsyncIterator[bytes], taken: Turn, held: AsyncExitStack) -> None:
        self._events, self._held = events, held
        headers = {**taken.route.headers(), "x-request-id": taken.id, "cache-control": "no-cache"}
        super().__init__(self._sent(), media_type="text/event-stream", headers=headers)

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


def _json(answer: dict[str, Any], taken: Turn) -> JSONResponse:
    return JSONResponse(answer, headers={**taken.route.headers(), "x-request-id": taken.id})


def _version(route: Route) -> Version | None:
    return Version(route.digest, "") if route.digest else None


async def _whole(pieces: AsyncIterator[Piece], n: int) -> list[answers.Answer]:
    return answers.collect([piece async for piece in pieces], n)


async def _all(works: list[Coroutine[Any, Any, Any]]) -> list[Any]:
    """Every result; the first error ends the others."""
    tasks = [asyncio.create_task(work) for work in works]
    try:
        return await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()


async def _merged(streams: list[AsyncIterator[Piece]]) -> AsyncIterator[tuple[int, Piece]]:
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


def _body(kind: type[Any]) -> dict[str, Any]:
    """A request's schema for the OpenAPI document; bodies are parsed by ourselves."""
    schema = kind.model_json_schema(ref_template="#/components/schemas/{model}")
    schema.pop("$defs", None)
    return {"requestBody": {"required": True, "content": {"application/json": {"schema": schema}}}}
