"""`tunesmith keys`: make, list and revoke API keys."""

from __future__ import annotations

import re
import time
from collections.abc import Collection
from datetime import UTC, datetime
from typing import Any, cast

from tunesmith.cluster.console import print_json, say, stderr, stdout
from tunesmith.cluster.errors import UsageError
from tunesmith.serving.config import Limits
from tunesmith.serving.statelog import StateLog
from tunesmith.serving.tenants import Keys, Scope

KEYS = "keys"
"""Name of the state that keys live in, below the registry."""

_UNITS = {"s": 1, "m": 60, "h": 3600, "d": 86400, "w": 604800}


def create(
    registry: str,
    tenant: str,
    name: str,
    scopes: Collection[str],
    models: Collection[str],
    expires: str | None,
    limits: dict[str, int | None],
    as_json: bool,
) -> None:
    """Makes a key and prints it on standard output, alone.

    Args:
        models: the key's; none are all that the tenant sees.
        expires: such as 90d; None never.
        limits: the key's own, by the names of `Limits`; where all are None the server's hold.
    """
    now = time.time()
    own = Limits(**limits) if any(limit is not None for limit in limits.values()) else None
    keys = Keys(StateLog(registry, KEYS))
    key = keys.create(
        tenant,
        now,
        name=name,
        scopes=cast("Collection[Scope]", scopes),
        models=models or None,
        expires=None if expires is None else now + seconds_of(expires),
        limits=own,
    )
    id = key.split("-")[1]
    if as_json:
        print_json({"id": id, "tenant": tenant, "key": key})
        return
    say(stderr(), f"key {id} of {tenant}; it is shown this once and not kept:")
    say(stdout(), key)


def show(registry: str, as_json: bool) -> None:
    """Prints every key without its secret."""
    keys = Keys(StateLog(registry, KEYS))
    keys.refresh()
    entries = keys.entries()
    if as_json:
        print_json({"keys": entries})
        return
    for entry in entries:
        say(stdout(), _line(entry, time.time()))
    if not entries:
        say(stderr(), f"{registry} has no keys; `tunesmith keys create TENANT` makes one")


def revoke(registry: str, id: str, as_json: bool) -> None:
    """Ends a key for good."""
    Keys(StateLog(registry, KEYS)).revoke(id, time.time())
    if as_json:
        print_json({"id": id, "revoked": True})
    else:
        say(stderr(), f"key {id} is revoked; running gateways refuse it within seconds")


def seconds_of(written: str) -> float:
    """A time span such as 90d, 12h or 30m in seconds.

    Raises:
        UsageError: it is none.
    """
    match = re.fullmatch(r"(\d{1,6})([smhdw])", written)
    if match is None:
        raise UsageError(f"--expires {written}: a number with s, m, h, d or w, such as 90d")
    return int(match[1]) * _UNITS[match[2]]


def _line(entry: dict[str, Any], now: float) -> str:
    state = "valid"
    if entry["revoked"] is not None:
        state = f"revoked {_day(entry['revoked'])}"
    elif entry["expires"] is not None:
        state = f"{'expired' if entry['expires'] <= now else 'valid until'} {_day(entry['expires'])}"
    models = "all models" if entry["models"] is None else ", ".join(entry["models"])
    parts = [entry["id"], entry["tenant"], entry["name"], "+".join(entry["scopes"]), models, state]
    return "  ".join(part for part in parts if part)


def _day(at: float) -> str:
    return datetime.fromtimestamp(at, UTC).strftime("%Y-%m-%d %H:%M UTC")
