"""OpenAI's API over the engines: a request comes in, passes the desk, and its pieces go out as they come."""

from __future__ import annotations

import asyncio
import logging
import os
import time
import uuid
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import AsyncExitStack, aclosing, asynccontextmanager, nullcontext
from typing import Any, Protocol

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, PlainTextResponse, Response
from pydantic import BaseModel

from tunesmith.cluster.errors import RequestError
from tunesmith.serving import answers, mixture, wire
from tunesmith.serving.config import Agent, Proposer, Serve
from tunesmith.serving.desk import Entry, Route, unknown_model
from tunesmith.serving.engines.protocol import Ask, Encoded, Message, Piece, Sampling, Version
from tunesmith.serving.limits import estimated_tokens
from tunesmith.serving.metrics import Report
from tunesmith.serving.openapi import describe
from tunesmith.serving.outside import Outside
from tunesmith.serving.protocol import (
    DEFAULT_COMPLETION_TOKENS,
    ChatRequest,
    CompletionRequest,
    to_ask,
    to_asks,
)
from tunesmith.serving.protocol_inputs import (
    ClassifyRequest,
    EmbeddingRequest,
    MoveRequest,
    SplitRequest,
    TokenizeRequest,
)
from tunesmith.serving.shadow import Shadows
from tunesmith.serving.tenants import no_key
from tunesmith.serving.turn import Turn
from tunesmith.serving.wire import Sent, every, merged, streamed, whole

BODIES: dict[str, type[BaseModel]] = {
    "/v1/chat/completions": ChatRequest,
    "/v1/completions": CompletionRequest,
    "/v1/embeddings": EmbeddingRequest,
    "/classify": ClassifyRequest,
    "/tokenize": TokenizeRequest,
    "/admin/adapters/{name}/aliases/{alias}": MoveRequest,
    "/admin/adapters/{name}/aliases/{alias}/split": SplitRequest,
}
"""What each path takes."""

_log = logging.getLogger("ray.serve.tunesmith")
"""Below the logger that Serve gives its replicas a file and a level."""


class Backend(Protocol):
    """The desk and the engines, wherever they run."""

    def begin(self) -> None: ...
    async def enter(self, entry: Entry) -> Route: ...
    def leave(self, id: str, report: Report) -> None: ...
    def generate(self, base: str, ask: Ask) -> AsyncIterator[Piece]: ...
    async def tokenize(self, base: str, ask: Ask) -> list[int]: ...
    async def encode(self, base: str, prompts: Any, version: Version | None) -> Encoded: ...
    async def models(self, authorization: str | None) -> list[tuple[str, str]]: ...
    async def admin(self, authorization: str | None, change: str, arguments: dict[str, Any]) -> dict[str, Any]: ...
    async def metrics(self, authorization: str | None) -> str: ...
    async def ready(self) -> bool: ...


class Gateway:
    """The routes.

    Args:
        name: this gateway's own name at the desk.
    """

    def __init__(self, config: Serve, backend: Backend, name: str) -> None:
        self._config, self._backend, self._name = config, backend, name
        self._outside = Outside(config.endpoints, os.environ)
        self._shadows = Shadows(backend, name)
        self._most = round(config.http.max_body_mib * 2**20)

    def app(self) -> FastAPI:
        """The application."""
        app = FastAPI(title="Tunesmith", docs_url=None, redoc_url=None, lifespan=self._living)
        app.exception_handler(RequestError)(_refused)
        app.exception_handler(Exception)(_failed)
        app.exception_handler(404)(_no_route)
        app.exception_handler(405)(_no_method)
        app.post("/v1/chat/completions")(self.chat)
        app.post("/v1/completions")(self.complete)
        app.post("/v1/embeddings")(self.embed)
        app.post("/classify")(self.classify)
        app.post("/tokenize")(self.tokenize)
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
        describe(app, BODIES)
        return app

    @asynccontextmanager
    async def _living(self, _app: FastAPI) -> AsyncIterator[None]:
        self._backend.begin()
        yield
        await self._outside.close()

    async def chat(self, request: Request) -> Response:
        """A conversation goes on."""
        sent = await self._sent(request, ChatRequest)
        most = sent.max_completion_tokens or sent.max_tokens or 0
        tokens = estimated_tokens(sent.conversation) + sent.answers * most
        async with AsyncExitStack() as stack:
            turn = await stack.enter_async_context(self._turn(request, sent, "chatcmpl", tokens))
            ask = to_ask(sent, turn.id, _version(turn.route))
            if turn.route.agent is not None:
                mixture.check_request(sent)
                pieces = self._mixed(turn, self._config.agents[turn.route.agent], ask)
            else:
                pieces = self._pieces(turn, ask)
            if not sent.stream:
                answer, extra = await whole(pieces, ask.n), turn.extra
                return _json(answers.chat_answer(turn.head, answer, bool(sent.logprobs), extra), turn)
            stream = answers.ChatStream(turn.head, bool(sent.logprobs), sent.usage_streamed)

            async def events() -> AsyncGenerator[bytes, None]:
                async with aclosing(pieces) as open_pieces:
                    async for piece in open_pieces:
                        if piece is None:
                            yield answers.KEEP_ALIVE
                            continue
                        for chunk in stream.chunks(piece, turn.extra if piece.finish else None):
                            yield answers.event(chunk)
                for chunk in stream.end():
                    yield answers.event(chunk)

            return await streamed(events(), turn.headers, stack)

    async def complete(self, request: Request) -> Response:
        """Texts go on, or are scored."""
        sent = await self._sent(request, CompletionRequest)
        most = DEFAULT_COMPLETION_TOKENS if sent.max_tokens is None else sent.max_tokens
        tokens = sum(estimated_tokens(prompt) + sent.answers * most for prompt in sent.prompts)
        logprobs, echo = sent.logprobs is not None, bool(sent.echo)
        async with AsyncExitStack() as stack:
            turn = await stack.enter_async_context(self._turn(request, sent, "cmpl", tokens))
            if turn.route.agent is not None:
                raise RequestError("a mixture of agents takes conversations: ask /v1/chat/completions", param="model")
            asks = to_asks(sent, turn.id, _version(turn.route))
            # a list of prompts has one slot at the desk: it may not flood the replicas' queues
            room = asyncio.Semaphore(self._config.bases[turn.route.base].max_batch)
            if not sent.stream:
                made = await every([whole(self._pieces(turn, ask, room), ask.n) for ask in asks])
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

            async def events() -> AsyncGenerator[bytes, None]:
                async with aclosing(merged([self._pieces(turn, ask, room) for ask in asks])) as pieces:
                    async for index, piece in pieces:
                        for chunk in stream.chunks(index, piece):
                            yield answers.event(chunk)
                for chunk in stream.end():
                    yield answers.event(chunk)

            return await streamed(events(), turn.headers, stack)

    async def embed(self, request: Request) -> Response:
        """A vector for each text."""
        sent = await self._sent(request, EmbeddingRequest)
        tokens = sum(map(estimated_tokens, sent.prompts))
        async with self._turn(request, sent, "embd", tokens) as turn:
            made = await self._encoded(turn, sent.prompts)
            if made.labels:
                raise RequestError(f"{sent.model} gives classes: ask /classify", 404, param="model")
            return _json(answers.embedding_answer(sent.model, made.vectors, made.tokens, sent.encoding_format), turn)

    async def classify(self, request: Request) -> Response:
        """A class for each text; vLLM has this route too."""
        sent = await self._sent(request, ClassifyRequest)
        async with self._turn(request, sent, "classify", sum(map(estimated_tokens, sent.prompts))) as turn:
            made = await self._encoded(turn, sent.prompts)
            if not made.labels:
                raise RequestError(f"{sent.model} gives embeddings: ask /v1/embeddings", 404, param="model")
            return _json(answers.classes_answer(turn.head, made), turn)

    async def _encoded(self, turn: Turn, prompts: list[str] | list[list[int]]) -> Encoded:
        if turn.route.agent is not None:
            raise RequestError("a mixture of agents gives text alone", param="model")
        made = await self._backend.encode(turn.route.base, prompts, _version(turn.route))
        turn.prompt_tokens = made.tokens
        return made

    async def tokenize(self, request: Request) -> Response:
        """The tokens that a text or a conversation becomes for a model; vLLM has this route too."""
        sent = await self._sent(request, TokenizeRequest)
        async with self._turn(request, sent, "tokenize", 0) as turn:
            if turn.route.agent is not None:
                raise RequestError("a mixture of agents has no tokens of its own", param="model")
            ask = Ask(turn.id, sent.asked, _version(turn.route), sampling=Sampling(max_tokens=0))
            tokens = await self._backend.tokenize(turn.route.base, ask)
            return _json({"count": len(tokens), "tokens": tokens}, turn)

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
        sent = await self._sent(request, MoveRequest)
        return await self._change(
            request, "move", name=name, alias=alias, version=sent.version, expected=sent.generation
        )

    async def split(self, request: Request, name: str, alias: str) -> Response:
        """Operators: splits an alias between versions."""
        sent = await self._sent(request, SplitRequest)
        changed = {"weights": sent.weights, "shadow": sent.shadow, "expected": sent.generation}
        return await self._change(request, "split", name=name, alias=alias, **changed)

    async def rollback(self, request: Request, name: str, alias: str) -> Response:
        """Operators: makes an alias lead where it led before."""
        return await self._change(request, "rollback", name=name, alias=alias)

    async def remove(self, request: Request, name: str, what: str) -> Response:
        """Operators: takes out a version or an alias."""
        return await self._change(request, "remove", name=name, what=what)

    async def _change(self, request: Request, change: str, **arguments: Any) -> Response:
        return JSONResponse(await self._backend.admin(_key(request), change, arguments))

    async def _sent(self, request: Request, kind: type[Sent]) -> Sent:
        """See `wire.sent`; what a client without any key sends is not read."""
        if self._config.http.auth == "keys" and not _key(request):
            raise no_key()
        return await wire.sent(request, kind, self._most)

    @asynccontextmanager
    async def _turn(self, request: Request, sent: Any, kind: str, tokens: int) -> AsyncIterator[Turn]:
        id = f"{kind}-{uuid.uuid4().hex}"
        entry = Entry(id, self._name, _key(request), sent.model, sent.user, tokens)
        created, arrived = int(time.time()), time.monotonic()
        turn = Turn(await self._entered(entry), id, created, arrived)
        try:
            if self._config.http.log_prompts:
                _log.info("%s: %s", id, sent.model_dump_json(exclude_unset=True))
            with turn.judged():
                yield turn
        finally:
            self._backend.leave(id, turn.report())

    async def _entered(self, entry: Entry) -> Route:
        try:
            return await self._backend.enter(entry)
        except asyncio.CancelledError:  # the client has left while it waited, or will never know that its turn came
            self._backend.leave(entry.id, Report())
            raise

    async def _mixed(self, turn: Turn, agent: Agent, ask: Ask) -> AsyncGenerator[Piece | None, None]:
        """A mixture's answer; None to say that it lives. What became of its members is left in `turn.extra`."""
        assert isinstance(ask.prompt, list), "a chat is a conversation"
        conversation: Any = ask.prompt
        events = mixture.run(agent, conversation, self._member(turn), ask.sampling, turn.id)
        with turn.judged():
            async with aclosing(events):
                async for event in events:
                    if isinstance(event, mixture.Done):
                        turn.extra = {"mixture": event.as_json()}
                        turn.prompt_tokens, turn.completion_tokens = event.prompt_tokens, event.completion_tokens
                        yield Piece(0, "", event.completion_tokens, event.prompt_tokens, event.finish)
                    elif isinstance(event, mixture.KeepAlive):
                        yield None
                    else:
                        turn.first = turn.first or (time.monotonic() if ask.stream else None)
                        yield Piece(0, event.text, 0, 0)

    def _member(self, turn: Turn) -> mixture.AskMember:
        """How a mixture's members are asked: this server's own pass the desk again, for their turn and their version."""

        async def ask(
            proposer: Proposer, messages: list[Message], sampling: Sampling, id: str
        ) -> AsyncGenerator[Piece, None]:
            if proposer.endpoint is not None:
                pieces = self._outside.generate(proposer.endpoint, proposer.model, messages, sampling)
                async with aclosing(turn.counting(pieces)) as counted:
                    async for piece in counted:
                        yield piece
                return
            arrived, tokens = time.monotonic(), estimated_tokens(messages) + (sampling.max_tokens or 0)
            route = await self._entered(Entry(id, self._name, None, proposer.model, None, tokens, turn.id))
            member = Turn(route, id, turn.created, arrived)
            try:
                pieces = self._pieces(member, Ask(id, messages, _version(route), 1, sampling))
                async with aclosing(turn.counting(pieces)) as counted:  # a client that leaves early pays for them too
                    async for piece in counted:
                        yield piece
            finally:
                self._backend.leave(id, member.report())

        return ask

    async def _pieces(self, turn: Turn, ask: Ask, room: asyncio.Semaphore | None = None) -> AsyncGenerator[Piece, None]:
        turn.answers += ask.n
        self._shadows.begin(turn.route, ask, turn.id)
        async with room or nullcontext():
            stream: Any = turn.counting(self._backend.generate(turn.route.base, ask))
            with turn.judged():
                async with aclosing(stream):
                    async for piece in stream:
                        if turn.first is None and piece.tokens and ask.stream:
                            turn.first = time.monotonic()
                        yield piece


async def _refused(_request: Request, error: Any) -> JSONResponse:
    return JSONResponse(answers.error_answer(error), error.status, answers.error_headers(error))


async def _failed(request: Request, error: Exception) -> JSONResponse:
    """A mistake of ours; the server logs it with its traceback."""
    return await _refused(request, RequestError(f"the server failed: {type(error).__name__}", 500, code="internal"))


async def _no_route(request: Request, _error: Exception) -> JSONResponse:
    return await _refused(request, RequestError(f"there is no {request.url.path[:200]}", 404, code="unknown_url"))


async def _no_method(request: Request, _error: Exception) -> JSONResponse:
    what = f"{request.url.path[:200]} takes no {request.method}"
    return await _refused(request, RequestError(what, 405, code="method_not_allowed"))


def _key(request: Request) -> str | None:
    return request.headers.get("authorization")


def _json(answer: dict[str, Any], taken: Turn) -> JSONResponse:
    return JSONResponse(answer, headers=taken.headers)


def _version(route: Route) -> Version | None:
    return Version(route.digest, "") if route.digest else None
