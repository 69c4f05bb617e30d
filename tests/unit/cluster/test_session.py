"""Which Ray a run uses, and how soon it learns that a cluster is not there."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time

import pytest
from ray._private import services

from tunesmith.cluster.errors import ResourceError
from tunesmith.cluster.session import RaySession, cluster_address, require_answer, require_cluster


def test_the_recipes_address_comes_before_the_environments(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    assert cluster_address(None) is None
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")
    assert cluster_address(None) == "10.0.0.1:6379"
    assert cluster_address("10.0.0.2:6379") == "10.0.0.2:6379"


def test_a_cluster_that_is_not_there_is_said_at_once():
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{closed.getsockname()[1]}"
        began = time.monotonic()
        with RaySession(address) as session, pytest.raises(ResourceError, match=f"nothing answers at {address}"):
            session.nodes()
    assert time.monotonic() - began < 20  # most of it importing Ray


def test_what_a_ray_that_has_ended_has_left_behind_is_no_cluster(monkeypatch: pytest.MonkeyPatch):
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        port = closed.getsockname()[1]
        monkeypatch.delenv("RAY_ADDRESS", raising=False)
        monkeypatch.setattr(services, "find_gcs_addresses", set)
        monkeypatch.setattr(services, "find_bootstrap_address", lambda _: f"localhost:{port}")
        with pytest.raises(ConnectionError, match=f"nothing answers at .*:{port}"):
            require_cluster("auto")


@pytest.mark.parametrize("address", ["ray://head:10001", "head", "head:port"])
def test_an_address_of_another_kind_is_refused(address: str):
    with pytest.raises(ConnectionError, match="host:port"):
        require_answer(address)


def test_whatever_a_session_put_into_the_environment_is_taken_back(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("RAY_TRAIN_METRICS_ENABLED", raising=False)
    session = RaySession("head")  # refused, so no Ray is started
    session.start()
    assert os.environ["RAY_TRAIN_METRICS_ENABLED"] == "0"
    session.close()
    assert "RAY_TRAIN_METRICS_ENABLED" not in os.environ


def test_sigterm_stays_ours_when_ray_has_started_and_none_starts_unasked_afterwards():
    told = """
import os, signal, threading
from tunesmith.cluster.session import RaySession

handled = threading.Event()
signal.signal(signal.SIGTERM, lambda *_: handled.set())
with RaySession() as session:
    session.nodes()
    os.kill(os.getpid(), signal.SIGTERM)
    assert handled.wait(10)
    import ray
try:
    ray.put(1)
except Exception as refused:
    print("handled,", refused)
"""
    environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    ended = subprocess.run(
        [sys.executable, "-c", told], env=environment, capture_output=True, text=True, check=False, timeout=120
    )
    assert (ended.returncode, ended.stderr) == (0, "")
    assert ended.stdout.startswith("handled, ")
    assert "Ray has not been started" in ended.stdout
