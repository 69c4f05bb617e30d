"""OpenAI's API over the engines: a request comes in, passes the desk, and its pieces go out as they come."""

from __future__ import annotations

import asyncio
import json
import time
import uuid
from collections.abc import AsyncIterator, Coroutine
from contextlib import AsyncExitStack, aclosing, asynccontextmanager
from dataclasses import dataclass
from typing import Any, Protocol

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, PlainTextResponse, Response, StreamingResponse

from tunesmith.cluster.errors import RequestError
from tunesmith.serving import answers
from tunesmith.serving.body import parse_body
from tunesmith.serving.config import Serve
from tunesmith.serving.desk import Entry, Route, unknown_model
from tunesmith.serving.engines.protocol import Ask, Piece, Version
from tunesmith.serving.limits import estimated_tokens
from tunesmith.serving.protocol import ChatRequest, CompletionRequest, EmbeddingRequest, to_ask, to_asks


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


class Gateway:
    """The routes.

    Args:
        name: this gateway's own name at the desk.
    """

    def __init__(self, config: Serve, backend: Backend, name: str) -> None:
        self._backend, self._name = backend, name
        self._most = round(config.http.max_body_mib * 2**20)

    def app(self) -> FastAPI:
        """The application."""
        app = FastAPI(title="Tunesmith", docs_url=None, redoc_url=None)
        app.exception_handler(RequestError)(_refused)
        app.exception_handler(404)(_no_route)
        app.exception_handler(405)(_no_method)
        app.post("/v1/chat/completions", openapi_extra=_body(ChatRequest))(self.chat)
        app.post("/v1/completions", openapi_extra=_body(CompletionRequest))(self.complete)
        app.post("/v1/embeddings", openapi_extra=_body(EmbeddingRequest))(self.embed)
        app.get("/v1/models")(self.models)
        app.get("/v1/models/{model:path}")(self.model)
        app.get("/healthz")(self.healthz)
        app.get("/readyz")(self.readyz)
        app.get("/metrics")(self.metrics)
        app.get("/admin/adapters")(self.listed)
        app.put("/admin/adapters/{name}/aliases/{alias}")(self.move)
        app.put("/admin/adapters/{name}/aliases/{alias}/split")(self.split)
        app.post("/admin/adapters/{name}/aliases/{alias}/rollback")(self.rollback)
        app.delete("/admin/adapters/{name}/{what}")(self.remove)
        return app

    async def chat(self, request: Request) -> Response:
        """A conversation goes on."""
        sent = parse_body(await _bytes(request, self._most), ChatRequest, self._most)
        most = sent.max_completion_tokens or sent.max_tokens or 0
        tokens = estimated_tokens(sent.conversation) + sent.answers * most
        async with AsyncExitStack() as stack:
            turn = await stack.enter_async_context(self._turn(request, sent, "chatcmpl", tokens))
            ask = to_ask(sent, turn.id, _version(turn.route))
            if not sent.stream:
                answer = await _whole(self._pieces(turn, ask), ask.n)
                return _json(answers.chat_answer(turn.head, answer, bool(sent.logprobs)), turn)
            stream = answers.ChatStream(turn.head, bool(sent.logprobs), sent.usage_streamed)

            async def events() -> AsyncIterator[bytes]:
                async for piece in self._pieces(turn, ask):
                    for chunk in stream.chunks(piece):
                        yield answers.event(chunk)
                for chunk in stream.end():
                    yield answers.event(chunk)

            return _Events(events(), turn, stack.pop_all())

    async def complete(self, request: Request) -> Response:
        """Texts go on, or are scored."""
        sent = parse_body(await _bytes(request, self._most), CompletionRequest, self._most)
        tokens = sum(estimated_tokens(prompt) + sent.answers * (sent.max_tokens or 16) for prompt in sent.prompts)
        logprobs, echo = sent.logprobs is not None, bool(sent.echo)
        async with AsyncExitStack() as stack:
            turn = await stack.enter_async_context(self._turn(request, sent, "cmpl", tokens))
            asks = to_asks(sent, turn.id, _version(turn.route))
            if not sent.stream:
                made = await _all([_whole(self._pieces(turn, ask), ask.n) for ask in asks])
                answer = answers.completion_answer(
                    turn.head,
                    made,
                    logprobs=logprobs,
                    echo=echo,
                    scores_only=sent.scores_only,
                    prompts=sent.prompts,
                )
                return _json(answer, turn)
            stream = answers.CompletionStream(
                turn.head, sent.answers, logprobs, sent.usage_streamed, sent.prompts if echo else None, sent.scores_only
            )

            async def events() -> AsyncIterator[bytes]:
                async for index, piece in _merged([self._pieces(turn, ask) for ask in asks]):
                    for chunk in stream.chunks(index, piece):
                        yield answers.event(chunk)
                for chunk in stream.end():
                    yield answers.event(chunk)

            return _Events(events(), turn, stack.pop_all())

    async def embed(self, request: Request) -> Response:
        """A vector for each text."""
        sent = parse_body(await _bytes(request, self._most), EmbeddingRequest, self._most)
        tokens = sum(map(estimated_tokens, sent.prompts))
        async with self._turn(request, sent, "embd", tokens) as turn:
            vectors = await self._backend.embed(turn.route.base, sent.prompts, _version(turn.route))
            turn.used = tokens
            return _json(answers.embedding_answer(sent.model, vectors, tokens, sent.encoding_format), turn)

    async def models(self, request: Request) -> Response:
        """What the key may ask for."""
        listed = await self._backend.models(_key(request))
        return JSONResponse(answers.models_answer([answers.model_answer(name, 0, owner) for name, owner in listed]))

    async def model(self, request: Request, model: str) -> Response:
        """One of them."""
        listed = dict(await self._backend.models(_key(request)))
        if model not in listed:
            raise unknown_model(model)
        return JSONResponse(answers.model_answer(model, 0, listed[model]))

    async def healthz(self) -> Response:
        """Whether this gateway lives."""
        return PlainTextResponse("ok")

    async def readyz(self) -> Response:
        """Whether requests would be answered."""
        is_ready = await self._backend.ready()
        return PlainTextResponse("ready" if is_ready else "not ready", 200 if is_ready else 503)

    async def metrics(self, request: Request) -> Response:
        """For Prometheus."""
        return PlainTextResponse(await self._backend.metrics(_key(request)), media_type="text/plain; version=0.0.4")

    async def listed(self, request: Request) -> Response:
        """Operators: every adapter."""
        return await self._change(request, "list")

    async def move(self, request: Request, name: str, alias: str) -> Response:
        """Operators: makes an alias lead to a version."""
        sent = await _object(request, self._most, {"version": str, "generation": int})
        return await self._change(
            request, "move", name=name, alias=alias, version=sent["version"], expected=sent.get("generation")
        )

    async def split(self, request: Request, name: str, alias: str) -> Response:
        """Operators: splits an alias between versions."""
        sent = await _object(request, self._most, {"weights": dict, "shadow": str, "generation": int})
        expected, shadow = sent.get("generation"), sent.get("shadow")
        return await self._change(
            request, "split", name=name, alias=alias, weights=sent["weights"], shadow=shadow, expected=expected
        )

    async def rollback(self, request: Request, name: str, alias: str) -> Response:
        """Operators: makes an alias lead where it led before."""
        return await self._change(request, "rollback", name=name, alias=alias)

    async def remove(self, request: Request, name: str, what: str) -> Response:
        """Operators: takes out a version or an alias."""
        return await self._change(request, "remove", name=name, what=what)

    async def _change(self, request: Request, change: str, **arguments: Any) -> Response:
        return JSONResponse(await self._backend.admin(_key(request), change, arguments))

    @asynccontextmanager
    async def _turn(self, request: Request, sent: Any, kind: str, tokens: int) -> AsyncIterator[Turn]:
        id = f"{kind}-{uuid.uuid4().hex}"
        entry = Entry(id, self._name, _key(request), sent.model, sent.user, tokens)
        turn = Turn(await self._backend.enter(entry), id, int(time.time()))
        try:
            yield turn
        finally:
            self._backend.leave(id, turn.used)

    async def _pieces(self, turn: Turn, ask: Ask) -> AsyncIterator[Piece]:
        is_first = True
        async with aclosing(self._backend.generate(turn.route.base, ask)) as stream:  # type: ignore[type-var]
            async for piece in stream:
                turn.used += piece.tokens + (piece.prompt_tokens if is_first else 0)
                is_first = False
                yield piece


async def _refused(_request: Request, error: Any) -> JSONResponse:
    return JSONResponse(answers.error_answer(error), error.status, answers.error_headers(error))


async def _no_route(request: Request, _error: Exception) -> JSONResponse:
    return await _refused(request, RequestError(f"there is no {request.url.path[:200]}", 404, code="unknown_url"))


async def _no_method(request: Request, _error: Exception) -> JSONResponse:
    what = f"{request.url.path[:200]} takes no {request.method}"
    return await _refused(request, RequestError(what, 405, code="method_not_allowed"))


def _key(request: Request) -> str | None:
    return request.headers.get("authorization")


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
