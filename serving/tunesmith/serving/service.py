"""The parts of the service on Ray: its configuration's desk, an engine deployment for each base, and the gateways before them."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import json
import logging
import os
import threading
import time
import uuid
from collections.abc import AsyncIterator, Callable
from dataclasses import replace
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import ray
from ray import serve
from ray.exceptions import ActorDiedError, ActorUnavailableError, RayError, RayTaskError
from ray.serve.exceptions import DeploymentUnavailableError
from ray.serve.handle import DeploymentHandle

from tunesmith.cluster.base import BaseRef
from tunesmith.cluster.errors import AdapterError, RequestError, StorageError
from tunesmith.cluster.imports import uncollected
from tunesmith.cluster.jobs.versions import code_digest
from tunesmith.serving.bases import writes_text
from tunesmith.serving.config import Base, Serve
from tunesmith.serving.copies import Copies
from tunesmith.serving.desk import Desk, Entry, Route, capacity
from tunesmith.serving.drift import Reference, read_reference
from tunesmith.serving.engines.diary import News
from tunesmith.serving.engines.protocol import Ask, Encoded, Piece, Version
from tunesmith.serving.gateway import Gateway
from tunesmith.serving.metrics import Report
from tunesmith.serving.registry import Registry

APPLICATION = "tunesmith"
DESK, NAMESPACE = "tunesmith-serving-desk-", "tunesmith"
"""What the names of all desks begin with, and where they are names."""
HEARTBEAT_S = 2.0
DESERTED_S = 300.0
"""A desk that has heard no gateway for so long ends."""
NEWS_S = 5.0
"""How often an engine's replica tells the desk what it has done."""
DESK_PATIENCE_S = 15.0
"""How long requests wait for a desk that is being restarted."""
SPARE = 64
"""Requests that a gateway takes beyond those that bases work on or let wait: mixtures, lists, and what is refused."""
DEAD = (ActorDiedError, ActorUnavailableError, DeploymentUnavailableError)
TRIES = 3
"""Of a request that has brought nothing yet, on a replica that died under it."""


_log = logging.getLogger(__name__)


def engine_class(base: Base, folder: str) -> type[Any]:
    """The engine for a base: what the config says, or by what the model is and what is installed."""
    kind = base.engine
    if kind == "auto" and not writes_text(Path(folder)):
        kind = "encoder"
    if kind == "auto":
        kind = "vllm" if find_spec("vllm") and base.quantization is None else "transformers"
    if kind == "vllm":
        from tunesmith.serving.engines.vllm import VllmEngine

        return VllmEngine
    if kind == "encoder":
        from tunesmith.serving.engines.encoder import EncoderEngine

        return EncoderEngine
    from tunesmith.serving.engines.transformers import TransformersEngine

    return TransformersEngine


class EngineReplica:
    """One copy of an engine, in a process of its own."""

    async def __init__(self, name: str, ref: BaseRef, settings: dict[str, Any], registry: str) -> None:  # type: ignore[misc]
        """Serve waits for it: a replica takes requests once its engine has started."""
        base = Base(**settings)
        with uncollected():
            engine = engine_class(base, ref.path)
        self._engine: Any = engine(name, ref, base)
        cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "tunesmith" / "adapters"
        self._copies = Copies(Registry(registry), cache, base.disk_cache_gib * 2**30)
        await self._engine.start()
        self._references: dict[str, Reference | None] = {}
        self._telling = asyncio.create_task(self._tell(name))

    async def check_health(self) -> None:
        """Raises when the engine has died."""
        if hasattr(self._engine, "check_health"):
            await self._engine.check_health()

    async def generate(self, ask: Ask) -> AsyncIterator[Piece]:
        """See `Engine.generate`; the version's folder is this machine's own copy."""
        async with (
            self._copies.of(ask.version) as version,
            contextlib.aclosing(self._engine.generate(replace(ask, version=version))) as pieces,
        ):
            async for piece in pieces:
                yield piece

    async def tokenize(self, ask: Ask) -> list[int]:
        """See `Engine.tokenize`."""
        async with self._copies.of(ask.version) as version:
            return await self._engine.tokenize(replace(ask, version=version))

    async def encode(self, prompts: Any, version: Version | None) -> Encoded:
        """See `Engine.encode`."""
        async with self._copies.of(version) as local:
            return await self._engine.encode(prompts, local)

    async def _tell(self, base: str) -> None:
        """Tells every desk for ever what the engine does."""
        while True:
            await asyncio.sleep(NEWS_S)
            try:
                await self._tell_news(base)
            except Exception:  # noqa: BLE001 - were this to end, loads, evictions and drift would fall silent
                _log.exception("the desks were not told what the engine of %s does", base)

    async def _tell_news(self, base: str) -> None:
        if news := await self._engine.news():
            found = {digest: await self._reference(digest) for digest in news.sketches}
            known = {digest: one for digest, one in found.items() if one}
            for desk in await asyncio.to_thread(desks):
                desk.read_news.remote(base, news, known)

    async def _reference(self, digest: str) -> Reference | None:
        if digest not in self._references:
            try:
                async with self._copies.of(Version(digest, "")) as copy:
                    assert copy is not None, "a version has a copy"
                    self._references[digest] = await asyncio.to_thread(read_reference, Path(copy.folder))
            except (AdapterError, RequestError, OSError) as error:
                _log.warning("version %s is not watched for drift: %s", digest[:12], error)
                self._references[digest] = None
        return self._references[digest]


def desk_of(config: dict[str, Any], digests: dict[str, str]) -> Any:
    """The desk of a configuration; begins it where there is none.

    Each configuration, and each version of our code, has its own: while another one is rolled out in place, the gateways of both
    are at work, and each keep to the rules that they were started with.

    Args:
        digests: base name -> digest of its weights.
    """
    written = json.dumps([config, digests, code_digest()], sort_keys=True)
    name = DESK + hashlib.sha256(written.encode()).hexdigest()[:16]
    actor: Any = ray.remote(DeskActor)
    return actor.options(
        name=name, namespace=NAMESPACE, get_if_exists=True, lifetime="detached",
        max_restarts=-1, max_concurrency=10_000, num_cpus=0,
    ).remote(config, digests)  # fmt: skip


def desks() -> list[Any]:
    """All that there are."""
    found = []
    everywhere: Any = ray.util.list_named_actors(all_namespaces=True)  # its type says names alone
    for one in everywhere:
        if one["namespace"] == NAMESPACE and one["name"].startswith(DESK):
            with contextlib.suppress(ValueError):  # it has ended since
                found.append(ray.get_actor(one["name"], NAMESPACE))
    return found


class DeskActor:
    """The desk in an actor of its own. It ends once its gateways have been gone for long."""

    def __init__(
        self, config: dict[str, Any], digests: dict[str, str], clock: Callable[[], float] = time.monotonic
    ) -> None:
        checked, self._clock = Serve(**config), clock
        while True:  # Ray does not begin anew an actor whose constructor fails
            try:
                self._desk = Desk(checked, digests, *capacity(checked))
                break
            except StorageError as error:
                _log.warning("the registry cannot be read, and is tried again: %s", error)
                time.sleep(2)
        self._looking: asyncio.Task[None] | None = None
        self._heard = clock()
        threading.Thread(
            target=self._end_deserted, args=(ray.get_runtime_context().current_actor,), daemon=True
        ).start()

    async def enter(self, entry: Entry) -> Route | RequestError:
        """See `Desk.enter`; a refusal is an answer: of what an actor raises, Ray spells out the traceback each time."""
        try:
            return await self._awake.enter(entry)
        except RequestError as refusal:
            return refusal.with_traceback(None)

    async def leave(self, id: str, report: Report) -> None:
        """See `Desk.leave`."""
        await self._awake.leave(id, report)

    async def read_news(self, base: str, news: News, references: dict[str, Reference]) -> None:
        """See `Desk.read_news`."""
        self._awake.read_news(base, news, references)

    async def hear(self, gateway: str) -> None:
        """See `Desk.hear`."""
        self._heard = self._clock()
        self._awake.hear(gateway)

    async def models(self, authorization: str | None) -> list[tuple[str, str]]:
        """See `Desk.models`."""
        return self._awake.models(authorization)

    async def admin(self, authorization: str | None, change: str, arguments: dict[str, Any]) -> dict[str, Any]:
        """See `Desk.admin`."""
        return await self._awake.admin(authorization, change, arguments)

    async def metrics(self, authorization: str | None) -> str:
        """For Prometheus."""
        return self._awake.metrics(authorization)

    @property
    def _awake(self) -> Desk:
        """The desk, which looks for changes from its first call on: an actor's constructor has no event loop."""
        if self._looking is None:
            self._looking = asyncio.create_task(self._desk.keep_looking())
        return self._desk

    def _end_deserted(self, me: Any) -> None:
        while self._clock() - self._heard < DESERTED_S:
            time.sleep(HEARTBEAT_S)
        ray.kill(me)


class RayBackend:
    """The desk and the engines, as a gateway reaches them."""

    def __init__(
        self, config: dict[str, Any], digests: dict[str, str], engines: dict[str, DeploymentHandle], gateway: str
    ) -> None:
        self._engines, self._gateway = engines, gateway
        self._awaited = set(engines)
        self._find_desk = partial(desk_of, config, digests)
        self._desk = self._find_desk()
        self._beating: asyncio.Task[None] | None = None

    def begin(self) -> None:
        """Lets the desk hear this gateway from now on."""
        self._beating = asyncio.create_task(self._beat())

    async def enter(self, entry: Entry) -> Route:
        """See `Desk.enter`."""
        route = await self._at_desk("enter", entry)
        if isinstance(route, RequestError):
            raise route
        return route

    def leave(self, id: str, report: Report) -> None:
        """See `Desk.leave`; not waited for."""
        self._desk.leave.remote(id, report)

    async def models(self, authorization: str | None) -> list[tuple[str, str]]:
        """See `Desk.models`."""
        return await self._at_desk("models", authorization)

    async def admin(self, authorization: str | None, change: str, arguments: dict[str, Any]) -> dict[str, Any]:
        """See `Desk.admin`."""
        return await self._at_desk("admin", authorization, change, arguments)

    async def metrics(self, authorization: str | None) -> str:
        """See `Desk.metrics`."""
        return await self._at_desk("metrics", authorization)

    async def ready(self) -> bool:
        """Whether the desk answers, and every base has had a replica: gateways come up before the engines have loaded."""
        try:
            async with asyncio.timeout(5):
                await self._desk.hear.remote(self._gateway)
                if self._awaited:
                    there: Any = (await asyncio.to_thread(serve.status)).applications[APPLICATION].deployments
                    self._awaited -= {n for n in self._awaited if there[f"engine-{n}"].replica_states.get("RUNNING")}
        except (TimeoutError, RayError, KeyError):
            return False
        return not self._awaited

    async def generate(self, base: str, ask: Ask) -> AsyncIterator[Piece]:
        """Pieces from any replica; one that dies before its first piece is replaced by another.

        Raises:
            RequestError: 503, no replica is left or its queue is full.
        """
        for attempt in range(TRIES):
            stream: Any = self._engines[base].options(stream=True).generate.remote(ask)
            has_begun = False
            try:
                async for piece in stream:
                    has_begun = True
                    yield piece
            except DEAD as error:
                if has_begun or attempt + 1 == TRIES:
                    raise as_request_error(error) from error
            except Exception as error:
                raise as_request_error(error) from error
            else:
                return
            finally:
                stream.cancel()  # a client that has left gives its slot back at once

    async def tokenize(self, base: str, ask: Ask) -> list[int]:
        """See `Engine.tokenize`."""
        try:
            return await self._engines[base].tokenize.remote(ask)
        except Exception as error:
            raise as_request_error(error) from error

    async def encode(self, base: str, prompts: Any, version: Version | None) -> Encoded:
        """See `Engine.encode`."""
        try:
            return await self._engines[base].encode.remote(prompts, version)
        except Exception as error:
            raise as_request_error(error) from error

    async def _at_desk(self, method: str, *arguments: Any) -> Any:
        longest = None if method == "enter" else DESK_PATIENCE_S  # a turn may take longer; the desk itself bounds it
        give_up: float | None = None
        while True:
            try:
                async with asyncio.timeout(longest):
                    return await getattr(self._desk, method).remote(*arguments)
            except (ActorDiedError, ActorUnavailableError) as error:  # it is being restarted
                give_up = give_up or time.monotonic() + DESK_PATIENCE_S
                if time.monotonic() > give_up:
                    raise RequestError("the service is restarting", 503, retry_after=5) from error
                await asyncio.sleep(0.2)
            except TimeoutError as error:
                raise RequestError("the service is restarting", 503, retry_after=5) from error
            except RayTaskError as error:
                raise as_request_error(error) from error

    async def _beat(self) -> None:
        while True:
            try:
                await self._hear()
            except RayError as error:  # a desk that restarts hears the next beat
                _log.info("the desk did not hear this gateway: %s", error)
            except Exception:  # noqa: BLE001 - were this to end, the desk would let this gateway's requests go
                _log.exception("the desk is not found")
            await asyncio.sleep(HEARTBEAT_S)

    async def _hear(self) -> None:
        try:
            await self._desk.hear.remote(self._gateway)
        except ActorDiedError:  # it may have ended, having heard nobody for long
            self._desk = await asyncio.to_thread(self._find_desk)
            await self._desk.hear.remote(self._gateway)


def as_request_error(error: BaseException) -> RequestError:
    """What a client is told of an error from another process."""
    cause: BaseException = error.cause if isinstance(error, RayTaskError) else error  # type: ignore[assignment]
    if isinstance(cause, RequestError):
        return RequestError(*cause.args)
    if isinstance(cause, AdapterError):
        return RequestError(str(cause), 422, "model", "adapter_not_served")
    if isinstance(cause, DEAD):
        return RequestError("the engine died while it answered", 503, retry_after=5)
    return RequestError(f"the engine failed: {type(cause).__name__}", 500, code="engine_error")


@serve.ingress()
class GatewayReplica:
    """One gateway, in a process of its own."""

    def __init__(self, config: dict[str, Any], digests: dict[str, str], engines: dict[str, DeploymentHandle]) -> None:
        self._config = Serve(**config)
        self._name = uuid.uuid4().hex
        self._backend = RayBackend(config, digests, engines, self._name)

    def __serve_build_asgi_app__(self) -> Any:
        return Gateway(self._config, self._backend, self._name).app()
