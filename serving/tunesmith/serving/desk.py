"""The desk that every request passes: whose it is, whether it may, what its model name means now, and when its turn is.

There is one for each configuration that is at work, so that a moved alias takes effect for all its gateways at the same
instant and limits count everywhere. It lives in a Ray actor, but knows nothing of Ray. It keeps nothing that the registry does not hold: after a
restart only the count of requests at work begins anew.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Mapping
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from typing import Any

from tunesmith.cluster.errors import AdapterError, RegistryError, RequestError, StorageError, UnknownError
from tunesmith.serving.catalog import Catalog, Resolved
from tunesmith.serving.config import Serve
from tunesmith.serving.drift import Drift, Reference
from tunesmith.serving.engines.diary import News
from tunesmith.serving.fairness import FairQueue, Gate, Ticket
from tunesmith.serving.limits import Lease, Meters
from tunesmith.serving.metrics import MIXTURE, NONE, Labels, Metrics, Report, status_of
from tunesmith.serving.registry import Registry
from tunesmith.serving.statelog import StateLog
from tunesmith.serving.tenants import ANYONE, Keys, Scope, Tenant

REFRESH_S = 0.5
"""How often changes that others make to the registry are looked for."""
SILENT_S = 10.0
"""A gateway that has said nothing for so long is gone, and its requests with it."""
LONGEST_WAIT_S = 30.0
"""For a slot; a request that has not begun by then is refused."""

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Route:
    """Where a request goes.

    Attributes:
        base: name of the base that answers; empty for an agent.
        base_digest: of its weights; empty for an agent.
        digest: of the adapter version; None for the base alone and for agents.
        agent: name of a mixture; None for models.
        shadow: digest of a version to ask as well.
    """

    model: str
    base: str = ""
    base_digest: str = ""
    digest: str | None = None
    generation: int = 0
    agent: str | None = None
    shadow: str | None = None
    adapter: str | None = None

    @property
    def fingerprint(self) -> str:
        """For `system_fingerprint`: base, version and generation."""
        return f"{self.base_digest[:12] or self.agent}-{(self.digest or 'base')[:12]}-g{self.generation}"

    def headers(self) -> dict[str, str]:
        """What every answer carries."""
        return {
            "x-tunesmith-base": self.base_digest or "none",
            "x-tunesmith-version": self.digest or "none",
            "x-tunesmith-generation": str(self.generation),
        }


@dataclass(frozen=True)
class Entry:
    """A request at the door.

    Attributes:
        gateway: who will tell how it ended.
        authorization: the header, as it came.
        user: whom to keep on one version of a split alias.
        tokens: estimate of its prompts, and the most that it may be answered.
        within: ticket of the agent's request that this one is part of; limits have been counted there.
        is_shadow: whether nobody waits for it: it begins at once or never.
    """

    id: str
    gateway: str
    authorization: str | None
    model: str
    user: str | None = None
    tokens: int = 0
    within: str | None = None
    is_shadow: bool = False


@dataclass
class _Open:
    gateway: str
    tenant: Tenant
    labels: Labels
    lease: Lease | None
    ticket: Ticket | None
    stack: AsyncExitStack


@dataclass
class Desk:
    """See the module.

    Args:
        digests: base name -> digest of its weights.
        slots: base name -> requests that its replicas work on at once.
        queue: base name -> requests that may wait for one.
        clock: seconds, for turns and limits; `now` is the time of day, for keys.
    """

    config: Serve
    digests: Mapping[str, str]
    slots: Mapping[str, int]
    queue: Mapping[str, int]
    clock: Callable[[], float] = time.monotonic
    now: Callable[[], float] = time.time
    _open: dict[str, _Open] = field(default_factory=dict)
    _entering: dict[str, asyncio.Task[Any] | None] = field(default_factory=dict)
    _heard: dict[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.registry = Registry(self.config.registry)
        self.keys = Keys(StateLog(self.config.registry, "keys"))
        self._meters = Meters()
        self._metrics = Metrics()
        self._drift = Drift()
        self._gates = {name: Gate(FairQueue(n, self.queue[name]), self.clock) for name, n in self.slots.items()}
        self._bases_by_digest = {digest: name for name, digest in self.digests.items()}
        self._generation, self._catalog = 0, Catalog()
        self.look()

    def look(self) -> None:
        """Takes over what the registry holds now."""
        self._take(*self._read())

    def _read(self) -> tuple[int, Catalog]:
        if self.config.http.auth == "keys":
            self.keys.refresh()
        return self.registry.read()

    def _take(self, generation: int, catalog: Catalog) -> None:
        """What a thread has read may have been overtaken: an alias never moves back."""
        own = {*self.digests, *self.config.agents}
        if generation > self._generation and (hidden := sorted(own & catalog.adapters.keys())):
            _log.warning("not served, for a base or a mixture has the name: the adapters %s", ", ".join(hidden))
        if generation >= self._generation:
            self._generation, self._catalog = generation, catalog.without_names(own)

    async def keep_looking(self) -> None:
        """Looks for changes for ever, and lets requests of lost gateways go."""
        while True:
            await asyncio.sleep(REFRESH_S)
            try:
                self._take(*await asyncio.to_thread(self._read))
            except StorageError as error:  # what was read before stays true until it can be read again
                _log.warning("the registry cannot be read: %s", error)
            except Exception:  # noqa: BLE001 - were this to end, keys would stay valid and aliases stand still
                _log.exception("the registry cannot be read")
            await self.drop_silent()

    async def enter(self, entry: Entry) -> Route:
        """Waits until the request may begin. `leave` must follow, whatever becomes of it.

        Raises:
            RequestError: 401, 403, 404, 429 or 503.
        """
        labels, arrived = Labels(), self.clock()
        if earlier := self._entering.get(entry.id):  # sent again after a failure on the way, it may be here already
            earlier.cancel()
            await asyncio.wait({earlier})
        await self.leave(entry.id, Report(status=503))
        try:
            outer = self._open.get(entry.within or "")
            tenant = outer.tenant if outer else self.tenant(entry.authorization)
            labels = Labels(tenant=tenant.name)
            route = self._route(entry, tenant, outer)
            labels = labels_of(route, tenant)
            limits = tenant.limits or self.config.limits
            lease = None if outer else self._meters.enter(tenant.key or tenant.name, limits, entry.tokens, arrived)
            ticket, stack = await self._turn_of(route, tenant, entry, lease)
        except BaseException as error:
            self._metrics.refused(labels, status_of(error), self.clock())
            raise
        self._metrics.began(labels, self.clock() - arrived, self.clock())
        self._open[entry.id] = _Open(entry.gateway, tenant, labels, lease, ticket, stack)
        self._heard.setdefault(entry.gateway, self.clock())
        return route

    def _route(self, entry: Entry, tenant: Tenant, outer: _Open | None) -> Route:
        if entry.within and outer is None:
            raise RequestError("the request that this one is part of has ended", 409)
        if not outer and not tenant.sees(entry.model):
            raise unknown_model(entry.model)
        route = self.resolve(entry.model, tenant, entry.user, entry.id)
        if route.agent and outer:
            raise RequestError(f"{entry.model} is a mixture of agents, which asks no other mixture", 400)
        return route

    async def _turn_of(
        self, route: Route, tenant: Tenant, entry: Entry, lease: Lease | None
    ) -> tuple[Ticket | None, AsyncExitStack]:
        """Waits for a slot, which closing the stack gives back; an agent has none of its own."""
        stack, ticket = AsyncExitStack(), None
        try:
            if not route.agent:
                gate = self._gates[route.base]
                if entry.is_shadow and (gate.queue.waiting or gate.queue.at_work >= gate.queue.slots):
                    raise RequestError("no slot is free for a shadow", 503)
                self._entering[entry.id] = asyncio.current_task()
                ticket = await stack.enter_async_context(gate.slot(tenant.name, max(1, entry.tokens), LONGEST_WAIT_S))
        except BaseException:
            if lease is not None:
                self._meters.leave(lease, 0, self.clock())
            raise
        finally:
            self._entering.pop(entry.id, None)
        return ticket, stack

    async def leave(self, id: str, report: Report) -> None:
        """A request has ended, or does not wait any longer; unknown ones are ignored, as after a restart."""
        request = self._open.pop(id, None)
        if request is None:
            if entering := self._entering.get(id):
                entering.cancel()
            return
        self._metrics.ended(request.labels, report, self.clock())
        if request.lease is not None:
            self._meters.leave(request.lease, report.used, self.clock())
        if request.ticket is not None:
            request.ticket.cost = max(1, report.used)
        await request.stack.aclose()

    def hear(self, gateway: str) -> None:
        """A gateway is alive."""
        self._heard[gateway] = self.clock()

    def read_news(self, base: str, news: News, references: Mapping[str, Reference]) -> None:
        """What a replica of a base's engine has done lately.

        Args:
            references: fingerprints of the versions that have one, by digest.
        """
        now = self.clock()
        names = {
            one.digest: name for name, adapter in sorted(self._catalog.adapters.items()) for one in adapter.versions
        }
        digests = {*news.loads, *news.evictions, *news.sketches}
        labels = {digest: Labels(base, names.get(digest, NONE), digest[:12]) for digest in digests}
        self._metrics.adapters([labels[one] for one in news.loads], [labels[one] for one in news.evictions], now)
        for digest in news.sketches.keys() & references.keys():
            findings = self._drift.add(digest, news.sketches[digest], references[digest], now)
            self._metrics.drifted(labels[digest], findings, now)
            for one in findings:
                if one.is_alarm:
                    _log.warning("the traffic of %s %s drifts: %s", labels[digest].adapter, digest[:12], one)

    async def drop_silent(self) -> None:
        """Lets go of what belongs to gateways that have fallen silent."""
        gone = [name for name, at in self._heard.items() if self.clock() - at > SILENT_S]
        for name in gone:
            del self._heard[name]
            lost = [id for id, request in self._open.items() if request.gateway == name]
            for id in lost:
                await self.leave(id, Report(status=503))
            if lost:
                _log.warning("gateway %s is gone; %d of its requests were let go", name, len(lost))

    def tenant(self, authorization: str | None, scope: Scope = "infer") -> Tenant:
        """Whose a request is.

        Raises:
            RequestError: 401 or 403.
        """
        if self.config.http.auth == "none":
            return ANYONE
        return self.keys.authenticate(authorization, self.now(), scope)

    def resolve(self, model: str, tenant: Tenant, user: str | None, id: str) -> Route:
        """What a model name means now, for a tenant.

        Raises:
            RequestError: 404: there is no such model, or it is another tenant's.
        """
        if model in self.config.agents:
            return Route(model, agent=model, generation=self._generation)
        if model in self.digests:
            return Route(model, model, self.digests[model], None, self._generation)
        adapter = self._catalog.adapters.get(model.partition("@")[0])
        if adapter is None or (tenant is not ANYONE and adapter.owner not in (None, tenant.name)):
            raise unknown_model(model)
        try:
            found = self._catalog.resolve(self._generation, model, user, id)
        except RegistryError as error:
            raise unknown_model(model) from error
        base = self._base_of(found)
        return Route(
            model, base, self.digests[base], found.digest, found.generation, None, found.shadow, found.name
        )  # fmt: skip

    def models(self, authorization: str | None) -> list[tuple[str, str]]:
        """Names that a key may ask for, and whose they are.

        Raises:
            RequestError: 401 or 403.
        """
        tenant = self.tenant(authorization)
        adapters = [
            (f"{name}@{alias}" if alias != "prod" else name, adapter.owner or "tunesmith")
            for name, adapter in self._visible(tenant).adapters.items()
            for alias in adapter.aliases
        ]
        own = [(name, "tunesmith") for name in [*self.digests, *self.config.agents]]
        return [(name, owner) for name, owner in [*own, *adapters] if tenant.sees(name)]

    async def admin(self, authorization: str | None, change: str, arguments: dict[str, Any]) -> dict[str, Any]:
        """Changes the registry for an operator, and takes the change over at once.

        Args:
            change: `move`, `split`, `rollback`, `remove`, or `list`, which changes nothing.

        Raises:
            RequestError: 400, 401, 403, 404, 409 or 503.
        """
        self.tenant(authorization, "admin")
        calls: dict[str, Callable[..., Any]] = {
            "move": self.registry.move,
            "split": self.registry.split,
            "rollback": self.registry.rollback,
            "remove": self.registry.remove,
        }
        try:
            if change != "list":
                await asyncio.to_thread(calls[change], **arguments)
            generation, catalog = await asyncio.to_thread(self._read)
            self._take(generation, catalog)
        except RegistryError as error:
            raise RequestError(str(error), 404 if isinstance(error, UnknownError) else 409) from error
        except AdapterError as error:
            raise RequestError(str(error)) from error
        except StorageError as error:
            raise RequestError(f"the registry cannot be reached: {error.what}", 503, retry_after=5) from error
        return {"generation": generation, "adapters": catalog.model_dump(mode="json")["adapters"]}

    def metrics(self, authorization: str | None) -> str:
        """For Prometheus, to operators.

        Raises:
            RequestError: 401 or 403.
        """
        self.tenant(authorization, "admin")
        open = {base: 0 for base in (*self._gates, *([MIXTURE] if self.config.agents else []))}
        for request in self._open.values():
            open[request.labels.base] += 1
        return self._metrics.text(open, {name: gate.queue.waiting for name, gate in self._gates.items()})

    def _visible(self, tenant: Tenant) -> Catalog:
        return self._catalog if tenant is ANYONE else self._catalog.visible_to(tenant.name)

    def _base_of(self, found: Resolved) -> str:
        if found.base_digest is None and len(self.digests) == 1:
            return next(iter(self.digests))
        base = self._bases_by_digest.get(found.base_digest or "")
        if base is None:
            raise RequestError(
                f"{found.name} was trained on the base {(found.base_digest or 'unknown')[:12]}, which is not served here",
                404,
                "model",
                "base_not_served",
            )
        return base


def labels_of(route: Route, tenant: Tenant) -> Labels:
    """Whom a request is counted under."""
    if route.agent:
        return Labels(MIXTURE, route.agent, NONE, tenant.name)
    return Labels(route.base, route.adapter or NONE, (route.digest or NONE)[:12], tenant.name)


def unknown_model(model: str) -> RequestError:
    """The answer for a model that does not exist, or not for this key."""
    return RequestError(f"the model {model[:80]!r} does not exist", 404, "model", "model_not_found")


def capacity(config: Serve) -> tuple[dict[str, int], dict[str, int]]:
    """Slots and queue lengths of each base, over all its replicas."""
    replicas = {
        name: base.autoscaling.max_replicas if base.autoscaling else base.replicas
        for name, base in config.bases.items()
    }
    slots = {name: base.max_batch * replicas[name] for name, base in config.bases.items()}
    return slots, {name: max(1, base.queue_length * replicas[name]) for name, base in config.bases.items()}
