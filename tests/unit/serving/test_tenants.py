"""Keys: shown once, kept as hashes, refused for every reason there is."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tunesmith.cluster.errors import RegistryError, RequestError, UsageError
from tunesmith.serving.config import Limits
from tunesmith.serving.statelog import StateLog
from tunesmith.serving.tenants import Keys, Tenant

NOW = 1_700_000_000.0


@pytest.fixture
def log(tmp_path: Path) -> StateLog:
    return StateLog(str(tmp_path), "keys")


def refused(keys: Keys, header: str | None, now: float = NOW, scope="infer") -> RequestError:
    with pytest.raises(RequestError) as caught:
        keys.authenticate(header, now, scope)
    return caught.value


def test_a_key_is_its_tenants_with_what_it_was_given(log: StateLog):
    limits = Limits(requests_per_minute=5)
    key = Keys(log).create("acme", NOW, scopes=["infer", "admin"], models=["b", "a"], expires=NOW + 9, limits=limits)
    reader = Keys(log)
    reader.refresh()
    tenant = reader.authenticate(f"Bearer {key}", NOW)
    expected = Tenant("acme", key.split("-")[1], frozenset({"infer", "admin"}), frozenset({"a", "b"}), limits)
    assert tenant == expected
    assert tenant.sees("a")
    assert not tenant.sees("c")
    assert reader.authenticate(f"bearer {key}", NOW).sees("b")


def test_the_secret_is_nowhere_in_the_state_or_the_list(log: StateLog):
    keys = Keys(log)
    key = keys.create("acme", NOW)
    secret = key.split("-")[2]
    assert len(secret) == 64, "256 bits as hex"
    assert secret not in json.dumps(log.read()[1])
    listed = json.dumps(keys.entries())
    assert secret not in listed
    assert log.read()[1]["keys"][key.split("-")[1]]["hash"] not in listed
    assert "salt" not in listed


@pytest.mark.parametrize(
    "header",
    [
        None,
        "",
        "Bearer",
        "Bearer ts-",
        "Basic abc",
        "Bearer sk-0123",
        "Bearer ts-" + "0" * 12 + "-" + "0" * 64,
        "Bearer ts-" + "é" * 12 + "-" + "0" * 64,
        "Bearer \ud800",
        "B" * 10**6,
    ],
)
def test_what_is_no_key_is_401(log: StateLog, header: str | None):
    keys = Keys(log)
    keys.create("acme", NOW)
    assert refused(keys, header).status == 401


def test_every_wrong_secret_of_a_real_id_is_401_and_says_no_more_than_for_an_unknown_id(log: StateLog):
    keys = Keys(log)
    key = keys.create("acme", NOW)
    wrong = key[:-1] + ("0" if key[-1] != "0" else "1")
    unknown = "ts-" + "0" * 12 + "-" + "0" * 64
    assert refused(keys, f"Bearer {wrong}").what == refused(keys, f"Bearer {unknown}").what
    assert refused(keys, f"Bearer {key}x").status == 401
    keys.authenticate(f"Bearer {key}", NOW)


def test_a_key_ends_when_it_expires_or_is_revoked(log: StateLog):
    keys = Keys(log)
    short, long = keys.create("acme", NOW, expires=NOW + 60), keys.create("acme", NOW)
    keys.authenticate(f"Bearer {short}", NOW + 59.9)
    assert "expired" in refused(keys, f"Bearer {short}", NOW + 60).what
    other = Keys(log)
    other.refresh()
    keys.revoke(long.split("-")[1], NOW)
    assert "revoked" in refused(keys, f"Bearer {long}").what
    other.authenticate(f"Bearer {long}", NOW)  # until it looks again
    other.refresh()
    assert refused(other, f"Bearer {long}").status == 401


def test_revoking_twice_keeps_the_first_time_and_an_unknown_id_is_an_error(log: StateLog):
    keys = Keys(log)
    id = keys.create("acme", NOW).split("-")[1]
    keys.revoke(id, NOW + 1)
    keys.revoke(id, NOW + 2)
    assert keys.entries()[0]["revoked"] == NOW + 1
    with pytest.raises(RegistryError, match="'ffff'"):
        keys.revoke("ffff", NOW)


def test_a_key_without_the_scope_is_403(log: StateLog):
    keys = Keys(log)
    key = keys.create("acme", NOW)
    error = refused(keys, f"Bearer {key}", scope="admin")
    assert (error.status, error.code) == (403, "insufficient_scope")


@pytest.mark.parametrize(
    "wrong",
    [
        {"tenant": "../x"},
        {"tenant": ""},
        {"scopes": ["root"]},
        {"scopes": []},
        {"models": []},
        {"expires": NOW},
    ],
)
def test_keys_that_make_no_sense_are_not_made(log: StateLog, wrong: dict):
    arguments = {"tenant": "acme", **wrong}
    with pytest.raises(UsageError):
        Keys(log).create(arguments.pop("tenant"), NOW, **arguments)
    assert log.read()[1] == {}
