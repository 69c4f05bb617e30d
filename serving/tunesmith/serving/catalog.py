"""What the registry knows of names: their versions, and where each alias leads. Pure: a catalog in, a catalog out.

A client's model name is `NAME`, which means `NAME@prod`, or `NAME@ALIAS`, or `NAME@DIGEST` with 12 digits or more.
"""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from tunesmith.cluster.errors import AdapterError, RegistryError, UnknownError
from tunesmith.serving.config import NAME
from tunesmith.serving.rollout import Route, choose, sticky_key

PROD = "prod"
SHORTEST_PIN = 12
"""Digits of a digest that a client must give, so that a later version hardly ever makes it ambiguous."""
_SHORTEST_PREFIX = 4
_FORMER = 20
_RESERVED = ("all", "base", "false", "latest", "none", "null", "true")
_HEX = re.compile(r"[0-9a-f]+")


class _Entry(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)


class Version(_Entry):
    """One version of an adapter."""

    digest: str
    """Hex sha256 of its content."""
    added: str
    """When, as ISO 8601 in UTC."""
    base_digest: str | None
    """Of the base it was trained on; None when the operator vouched for it unseen."""
    peft_type: str
    """As PEFT names it."""
    rank: int | None
    """Largest LoRA rank; None for other kinds."""
    size: int
    """Bytes of its files."""


class Target(_Entry):
    """Where an alias leads."""

    routes: list[Route]
    """Versions with their weights."""
    shadow: str | None = None
    """Digest of a version that is asked too, and whose answers nobody sees."""


class Alias(Target):
    """Where an alias leads, and led."""

    previous: list[Target] = Field(default_factory=list)
    """Former targets, the newest last."""


class Adapter(_Entry):
    """One name."""

    owner: str | None = None
    """Tenant that alone sees it; None is for all."""
    versions: list[Version] = Field(default_factory=list)
    """In the order in which they were added."""
    aliases: dict[str, Alias] = Field(default_factory=dict)
    """By name."""


@dataclass(frozen=True)
class Resolved:
    """What a model name means for one request.

    Attributes:
        alias: None when the client named the version itself.
        generation: of the registry when it was looked up.
        shadow: digest of the version to ask as well; None for none.
    """

    name: str
    alias: str | None
    digest: str
    generation: int
    shadow: str | None
    owner: str | None
    base_digest: str | None


class Catalog(_Entry):
    """Every adapter by its name."""

    adapters: dict[str, Adapter] = Field(default_factory=dict)
    """By name."""

    def visible_to(self, tenant: str | None) -> Catalog:
        """What a tenant may know of: its own adapters and those that nobody owns."""
        return Catalog(adapters={name: one for name, one in self.adapters.items() if one.owner in (None, tenant)})

    def without_names(self, taken: Collection[str]) -> Catalog:
        """What a service can serve that has bases and mixtures of these names: they win."""
        return Catalog(adapters={name: one for name, one in self.adapters.items() if name not in taken})

    def adapter(self, name: str) -> Adapter:
        """An adapter by its name.

        Raises:
            RegistryError: there is none, with the nearest names.
        """
        if name not in self.adapters:
            raise _unknown("adapter", name, self.adapters)
        return self.adapters[name]

    def version(self, name: str, prefix: str) -> Version:
        """A version by the beginning of its digest.

        Raises:
            RegistryError: none or several begin like that.
        """
        versions = self.adapter(name).versions
        found = [version for version in versions if version.digest.startswith(prefix)]
        if len(prefix) < _SHORTEST_PREFIX or not _HEX.fullmatch(prefix) or not found:
            raise _unknown(f"version of {name}", prefix, [version.digest[:SHORTEST_PIN] for version in versions])
        if len(found) > 1:
            raise RegistryError(
                f"{len(found)} versions of {name} begin with {prefix}: {', '.join(one.digest[:16] for one in found)}",
                "Give more digits.",
            )
        return found[0]

    def alias(self, name: str, alias: str) -> Alias:
        """An alias of an adapter.

        Raises:
            RegistryError: there is none, with the nearest names.
        """
        aliases = self.adapter(name).aliases
        if alias not in aliases:
            raise _unknown(f"alias of {name}", alias, aliases)
        return aliases[alias]

    def resolve(self, generation: int, model: str, user: str | None, request: str) -> Resolved:
        """The version that answers a request.

        Args:
            generation: of the registry that this catalog is.
            model: `NAME`, `NAME@ALIAS` or `NAME@DIGEST`.
            user: whom to keep on one version of a split alias; None draws by `request`, the request's id.

        Raises:
            RegistryError: there is no such adapter, alias or version.
        """
        name, at, tag = model.partition("@")
        tag = tag if at else PROD
        adapter = self.adapter(name)
        alias = None
        if tag in adapter.aliases or not _is_pin(tag):
            alias, target = tag, self.alias(name, tag)
            digest, shadow = choose(target.routes, name, tag, sticky_key(user, request)), target.shadow
        else:
            digest, shadow = self.version(name, tag).digest, None
        base_digest = self.version(name, digest).base_digest
        return Resolved(name, alias, digest, generation, shadow, adapter.owner, base_digest)

    def with_version(self, name: str, version: Version, owner: str | None, alias: str | None) -> Catalog:
        """With a version added to a name, which may be new; its first one becomes `prod`.

        Args:
            owner: of a new name; for a known one None keeps the owner.
            alias: moved to the version too.

        Raises:
            AdapterError, RegistryError: a name may not be given, or belongs to somebody else.
        """
        check_name("adapter", name)
        known = self.adapters.get(name)
        if known is not None and owner is not None and known.owner != owner:
            raise RegistryError(f"{name} belongs to {known.owner or 'nobody'}, not to {owner}", "Take another name.")
        adapter = known or Adapter(owner=owner)
        same = next((one for one in adapter.versions if one.digest == version.digest), None)
        if same is not None and same.base_digest != version.base_digest:
            raise RegistryError(
                f"{name}: version {version.digest[:SHORTEST_PIN]} was added for base {_short(same.base_digest)}, and "
                f"now for {_short(version.base_digest)}",
                "Remove it first if the base was wrong.",
            )
        versions = adapter.versions if same else [*adapter.versions, version]
        made = self._with(name, adapter.model_copy(update={"versions": versions}))
        if not adapter.versions:
            made = made.moved(name, PROD, version.digest)
        return made.moved(name, alias, version.digest) if alias else made

    def moved(self, name: str, alias: str, version: str) -> Catalog:
        """With an alias, which may be new, that leads to one version.

        Raises:
            AdapterError, RegistryError: the alias may not be called that, or there is no such version.
        """
        return self.split(name, alias, {version: 1})

    def split(self, name: str, alias: str, weights: Mapping[str, float], shadow: str | None = None) -> Catalog:
        """With an alias that leads to several versions by weight.

        Args:
            weights: by version, as a digest or its beginning; only their ratio counts.
            shadow: a version that is asked too.

        Raises:
            AdapterError, RegistryError: the alias may not be called that, a version is unknown or named twice, or a
                weight is not above 0.
        """
        check_name("alias", alias)
        if wrong := [f"{version}={weight:g}" for version, weight in weights.items() if not 0 < weight < math.inf]:
            raise RegistryError(f"{name}@{alias}: {', '.join(wrong)}: a weight is above 0", "Leave the version out.")
        if not weights:
            raise RegistryError(f"{name}@{alias}: no version given", "Give at least one, such as 3f2a9c41d0e7=100.")
        routes = [Route(self.version(name, version).digest, weight) for version, weight in weights.items()]
        if len({route.digest for route in routes}) < len(routes):
            raise RegistryError(f"{name}@{alias}: {', '.join(weights)}: one version is named twice")
        shadow = self.version(name, shadow).digest if shadow else None
        return self._led(name, alias, Target(routes=routes, shadow=shadow))

    def rolled_back(self, name: str, alias: str) -> Catalog:
        """With an alias that leads where it led before its last move.

        Raises:
            RegistryError: there is no such alias, or it has never been moved.
        """
        now = self.alias(name, alias)
        if not now.previous:
            raise RegistryError(
                f"{name}@{alias} has led nowhere else, or only to versions that were removed", "Nothing was changed."
            )
        back = now.previous[-1]
        made = Alias(routes=back.routes, shadow=back.shadow, previous=now.previous[:-1])
        return self._with_alias(name, alias, made)

    def without(self, name: str, what: str) -> Catalog:
        """Without an alias, or without a version; a name goes with its last version.

        Args:
            what: an alias, or the beginning of a version's digest.

        Raises:
            RegistryError: there is neither, or an alias leads to the version.
        """
        adapter = self.adapter(name)
        if what in adapter.aliases:
            left = {alias: target for alias, target in adapter.aliases.items() if alias != what}
            return self._with(name, adapter.model_copy(update={"aliases": left}))
        if not _HEX.fullmatch(what):
            raise _unknown(f"alias or version of {name}", what, [*adapter.aliases, *_shown(adapter)])
        digest = self.version(name, what).digest
        if leading := [alias for alias, target in adapter.aliases.items() if digest in _digests(target)]:
            raise RegistryError(
                f"{name}: version {digest[:SHORTEST_PIN]} is where {', '.join(leading)} leads",
                "Move the alias elsewhere first, or remove it.",
            )
        versions = [version for version in adapter.versions if version.digest != digest]
        if not versions:
            return Catalog(adapters={other: one for other, one in self.adapters.items() if other != name})
        aliases = {
            alias: target.model_copy(
                update={"previous": [one for one in target.previous if digest not in _digests(one)]}
            )
            for alias, target in adapter.aliases.items()
        }
        return self._with(name, adapter.model_copy(update={"versions": versions, "aliases": aliases}))

    def uses(self, digest: str) -> bool:
        """Whether any name has a version."""
        return any(version.digest == digest for one in self.adapters.values() for version in one.versions)

    def _led(self, name: str, alias: str, target: Target) -> Catalog:
        now = self.adapter(name).aliases.get(alias)
        if now is not None and (now.routes, now.shadow) == (target.routes, target.shadow):
            return self
        former = [] if now is None else [*now.previous, Target(routes=now.routes, shadow=now.shadow)]
        return self._with_alias(
            name, alias, Alias(routes=target.routes, shadow=target.shadow, previous=former[-_FORMER:])
        )

    def _with_alias(self, name: str, alias: str, target: Alias) -> Catalog:
        adapter = self.adapter(name)
        return self._with(name, adapter.model_copy(update={"aliases": {**adapter.aliases, alias: target}}))

    def _with(self, name: str, adapter: Adapter) -> Catalog:
        return Catalog(adapters={**self.adapters, name: adapter})


def check_name(kind: str, name: str) -> None:
    """Refuses a name of an adapter or alias that a path, a header or a digest could be taken for.

    Raises:
        AdapterError: says what names are made of.
    """
    if not re.fullmatch(NAME, name):
        raise AdapterError(
            f"{kind} {name[:80]!r}{f'… ({len(name)} characters)' if len(name) > 80 else ''}: no such name is given",
            "Up to 64 of A-Z a-z 0-9 . _ -, beginning with a letter or digit.",
        )
    if name.lower() in _RESERVED or (kind == "alias" and _is_pin(name)):
        raise AdapterError(
            f"{kind} {name!r}: this word is reserved", f"So are {', '.join(_RESERVED)}, and for aliases digests."
        )


def _is_pin(tag: str) -> bool:
    return len(tag) >= SHORTEST_PIN and bool(_HEX.fullmatch(tag))


def _digests(target: Target) -> set[str | None]:
    return {*(route.digest for route in target.routes), target.shadow}


def _shown(adapter: Adapter) -> list[str]:
    return [version.digest[:SHORTEST_PIN] for version in adapter.versions]


def _short(digest: str | None) -> str:
    return f"{digest[:SHORTEST_PIN]}…" if digest else "(unknown)"


def _unknown(kind: str, name: str, known: Iterable[str]) -> UnknownError:
    names = list(known)
    near = difflib.get_close_matches(name, names, 3, 0.5)
    fix = f"Did you mean {' or '.join(near)}?" if near else f"There are: {', '.join(names[-8:]) or 'none'}."
    return UnknownError(f"there is no {kind} {name[:80]!r}", fix)


def as_state(catalog: Catalog) -> dict[str, Any]:
    """The catalog as plain JSON types."""
    return catalog.model_dump(mode="json")
