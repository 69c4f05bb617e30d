"""Who may ask: API keys, what they may do, and the check of every request.

A key is `ts-ID-SECRET`. It is shown once, when it is made; kept is a salted sha256 of its secret. A slow hash such as
scrypt guards passwords, which people choose and others guess. A secret here is 256 random bits, which nobody guesses at
any speed, so a slow hash would cost every request its time and add nothing.
"""

from __future__ import annotations

import hashlib
import hmac
import re
import secrets
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

from tunesmith.cluster.errors import RegistryError, RequestError, UsageError
from tunesmith.serving.config import NAME, Limits
from tunesmith.serving.statelog import State, StateLog

Scope = Literal["infer", "admin"]

_HEADER = re.compile(r"[Bb]earer +ts-([0-9a-f]{12})-([0-9a-f]{64})")
_NOBODY = {"salt": "", "hash": "0" * 64}  # compared with for an unknown id, so that both take the same time


@dataclass(frozen=True)
class Tenant:
    """Who a request is from, by its key.

    Attributes:
        name: of the tenant; adapters belong to it, and fairness is between tenants.
        key: the key's id; limits are the key's.
        models: names that it may ask for; None is every one that its tenant sees.
        limits: the key's own; None takes the server's.
    """

    name: str
    key: str
    scopes: frozenset[Scope] = frozenset({"infer"})
    models: frozenset[str] | None = None
    limits: Limits | None = None

    def may(self, scope: Scope) -> None:
        """Raises RequestError (403) unless the key has this scope."""
        if scope not in self.scopes:
            has = ", ".join(sorted(self.scopes))
            raise RequestError(f"this key may not {scope}; it may: {has}", status=403, code="insufficient_scope")

    def sees(self, model: str) -> bool:
        """Whether a model exists for this key; where not, the answer is 404, as for one that nobody has."""
        return self.models is None or model in self.models


ANYONE = Tenant("anyone", "", frozenset(get_args(Scope)))
"""Every request under `http.auth: none`."""


class Keys:
    """The keys of one registry.

    `authenticate` reads what `refresh` last read, so that no request waits for storage: a gateway refreshes every few
    seconds, which is how long a revoked key may still work.
    """

    def __init__(self, log: StateLog) -> None:
        self._log = log
        self._keys: Mapping[str, Mapping[str, Any]] = {}

    def refresh(self) -> None:
        """Reads the keys from storage.

        Raises:
            StorageError: they cannot be read; those read before stay.
        """
        self._keys = self._log.read()[1].get("keys", {})

    def create(
        self,
        tenant: str,
        now: float,
        *,
        name: str = "",
        scopes: Collection[Scope] = ("infer",),
        models: Collection[str] | None = None,
        expires: float | None = None,
        limits: Limits | None = None,
    ) -> str:
        """Makes a key and returns it. It is not kept, and cannot be shown again.

        Args:
            name: what people call it.
            expires: seconds since 1970; None never.

        Raises:
            UsageError: a name, scope or expiry is not possible.
        """
        _check(tenant, now, scopes, models, expires)
        id, secret, salt = secrets.token_hex(6), secrets.token_hex(32), secrets.token_hex(16)
        entry = {
            "tenant": tenant,
            "name": name,
            "salt": salt,
            "hash": _hash(salt, secret),
            "scopes": sorted(set(scopes)),
            "models": None if models is None else sorted(set(models)),
            "created": now,
            "expires": expires,
            "revoked": None,
            "limits": None if limits is None else limits.model_dump(mode="json"),
        }
        self._keys = self._log.update(lambda state: _with(state, id, entry))[1]["keys"]
        return f"ts-{id}-{secret}"

    def revoke(self, id: str, now: float) -> None:
        """Ends a key for good; a second time changes nothing.

        Raises:
            RegistryError: there is no such key.
        """

        def change(state: State) -> State:
            entry = state.get("keys", {}).get(id)
            if entry is None:
                raise RegistryError(f"no key has the id {id!r}", "`tunesmith keys list` shows them.")
            return state if entry["revoked"] is not None else _with(state, id, {**entry, "revoked": now})

        self._keys = self._log.update(change)[1]["keys"]

    def entries(self) -> list[dict[str, Any]]:
        """Every key as it was last read, the oldest first, without salts and hashes."""
        shown = [
            {"id": id, **{field: value for field, value in entry.items() if field not in ("salt", "hash")}}
            for id, entry in self._keys.items()
        ]
        return sorted(shown, key=lambda one: (one["created"], one["id"]))

    def authenticate(self, header: str | None, now: float, scope: Scope = "infer") -> Tenant:
        """Whose a request is, by its Authorization header.

        Raises:
            RequestError: 401 where there is no valid key, 403 where the key may not do this.
        """
        if not header:
            raise no_key()
        match = _HEADER.fullmatch(header) if len(header) < 200 else None
        id, secret = match.groups() if match else ("", "")
        entry = self._keys.get(id, _NOBODY)
        if not hmac.compare_digest(_hash(entry["salt"], secret), entry["hash"]):
            raise _stranger("this API key is not known")
        if entry["revoked"] is not None:
            raise _stranger(f"the API key {id} was revoked")
        if entry["expires"] is not None and now >= entry["expires"]:
            raise _stranger(f"the API key {id} expired {now - entry['expires']:.0f} s ago")
        tenant = Tenant(
            entry["tenant"],
            id,
            frozenset(entry["scopes"]),
            None if entry["models"] is None else frozenset(entry["models"]),
            None if entry["limits"] is None else Limits(**entry["limits"]),
        )
        tenant.may(scope)
        return tenant


def _check(
    tenant: str, now: float, scopes: Collection[Scope], models: Collection[str] | None, expires: float | None
) -> None:
    if not re.fullmatch(NAME, tenant):
        raise UsageError(f"{tenant!r} is no name for a tenant: 1 to 64 letters, digits, dots, dashes, underscores")
    if not scopes or not set(scopes) <= set(get_args(Scope)):
        raise UsageError(f"scopes {', '.join(scopes) or 'none'}: there are {', '.join(get_args(Scope))}")
    if models is not None and not models:
        raise UsageError("no model is allowed, so that the key could ask nothing; leave models out for all")
    if expires is not None and expires <= now:
        raise UsageError(f"the key would have expired {now - expires:.0f} s before it was made")


def _with(state: State, id: str, entry: Mapping[str, Any]) -> State:
    return {**state, "keys": {**state.get("keys", {}), id: dict(entry)}}


def _hash(salt: str, secret: str) -> str:
    return hashlib.sha256(f"{salt}:{secret}".encode()).hexdigest()


def no_key() -> RequestError:
    """The answer to a request that brings no key."""
    return _stranger("no API key was given: send the header `Authorization: Bearer ts-…`")


def _stranger(what: str) -> RequestError:
    return RequestError(what, status=401, code="invalid_api_key")
