"""A cluster of `tunesmith up` for tests, and the command line against it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import small_runs

from tunesmith.cluster import local
from tunesmith.cluster.runstore import record_file

PATIENCE_S = 600.0


@contextmanager
def cluster_here(state: Path, nodes: int = 2, cpus: int = 1, gpus: int = 0) -> Iterator[local.Local]:
    """Up for the length of the block, with a state folder of its own; ended whatever happens."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_STATE_HOME", str(state))
        for name in ("RAY_ADDRESS", "RAY_API_SERVER_ADDRESS", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH", "RAY_AUTH_MODE"):
            patch.delenv(name, raising=False)
        known = local.up(nodes, cpus, gpus)
        pids = [one.pid for one in known.members]
        pids += [pid for one in known.members for pid in small_runs.processes_below(one.pid)]
        try:
            yield known
        finally:
            local.down()
            small_runs.wait_for_end_of(pids)


def tunesmith(*arguments: str, patience_s: float = PATIENCE_S) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "tunesmith.cluster.main", *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=os.environ, timeout=patience_s)


def told(*arguments: str) -> Any:
    """What a command says with --json; it must have succeeded."""
    done = tunesmith(*arguments, "--json")
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def jobs() -> dict[str, dict[str, Any]]:
    """All jobs by id."""
    return {one["id"]: one for one in told("jobs", "--all")}


def wait_until(condition: Callable[[], Any], what: str) -> Any:
    """What the condition gives, once it is true of anything."""
    deadline = time.monotonic() + PATIENCE_S
    while not (found := condition()):
        assert time.monotonic() < deadline, f"no {what} after {PATIENCE_S} s: {jobs()}"
        time.sleep(0.3)
    return found


def wait_for_state(id: str, *states: str) -> dict[str, Any]:
    return wait_until(lambda: (job := jobs()[id])["state"] in states and job, f"{id} {' or '.join(states)}")


def noted(run: Path, id: str) -> dict[str, Any]:
    """What the job's driver has written into the run's folder; nothing while it has written nothing."""
    record = record_file(run, id)
    return json.loads(record.read_text()) if record.exists() else {"state": "", "why": ""}


def node_ids(here: local.Local) -> list[str]:
    """What Ray calls the nodes."""
    return [json.loads(Path(one.spec.ready).read_text())["node_id"] for one in here.members]


def small_job(folder: Path, base: Path, name: str, workers: int = 2, **train: Any) -> Path:
    """A recipe of a few seconds on CPUs of one core each."""
    rows = folder / "rows.jsonl"
    if not rows.exists():
        small_runs.write_rows(rows)
    recipe = small_runs.small_recipe(name, base, rows, folder / "runs")
    recipe["cluster"] = {"workers": workers, "gpus_per_worker": 0, "cpus_per_worker": 1}
    recipe["train"] |= train
    return small_runs.write_recipe(folder, recipe)
