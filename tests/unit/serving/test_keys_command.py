"""`tunesmith keys` as a shell sees it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from tunesmith.cluster.errors import UsageError
from tunesmith.cluster.main import app
from tunesmith.serving.keys_command import seconds_of
from tunesmith.serving.statelog import StateLog
from tunesmith.serving.tenants import Keys


def keys(registry: Path, *arguments: str) -> Result:
    return CliRunner().invoke(app, ["keys", *arguments, "--registry", str(registry)])


def test_a_key_is_made_listed_without_its_secret_and_revoked(tmp_path: Path):
    made = keys(tmp_path, "create", "acme", "--name", "ci", "--scope", "infer", "--model", "bot", "--expires", "90d")
    assert made.exit_code == 0, made.output
    key = made.stdout.strip()
    assert key.startswith("ts-"), "standard output carries the key alone"
    id = key.split("-")[1]
    reader = Keys(StateLog(str(tmp_path), "keys"))
    reader.refresh()
    entry = reader.entries()[0]
    assert entry["expires"] - entry["created"] == 90 * 86400
    assert reader.authenticate(f"Bearer {key}", entry["created"]).models == {"bot"}
    listed = keys(tmp_path, "list")
    assert all(part in listed.stdout for part in (id, "acme", "ci", "bot", "valid until"))
    assert key.split("-")[2] not in listed.output
    assert keys(tmp_path, "revoke", id).exit_code == 0
    assert "revoked" in keys(tmp_path, "list").stdout


def test_json_and_a_keys_own_limits(tmp_path: Path):
    arguments = ("create", "acme", "--requests-per-minute", "5", "--scope", "admin", "--json")
    made = json.loads(keys(tmp_path, *arguments).stdout)
    assert made["key"].split("-")[1] == made["id"]
    (entry,) = json.loads(keys(tmp_path, "list", "--json").stdout)["keys"]
    assert entry["limits"]["requests_per_minute"] == 5
    assert (entry["scopes"], entry["models"]) == (["admin"], None)
    assert json.loads(keys(tmp_path, "revoke", made["id"], "--json").stdout) == {"id": made["id"], "revoked": True}


def test_mistakes_are_usage_errors(tmp_path: Path):
    assert isinstance(keys(tmp_path, "create", "../acme").exception, UsageError)
    assert isinstance(keys(tmp_path, "create", "acme", "--scope", "root").exception, UsageError)
    assert isinstance(keys(tmp_path, "revoke", "abc").exception, UsageError)
    with pytest.raises(UsageError, match="such as 90d"):
        seconds_of("soon")
    assert json.loads(keys(tmp_path, "list", "--json").stdout) == {"keys": []}
