from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil
import pytest

from tunesmith.cluster import local
from tunesmith.cluster.errors import UsageError
from tunesmith.cluster.local_node import NodeSpec


@pytest.fixture(autouse=True)
def own_state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"):
        monkeypatch.delenv(name, raising=False)


def a_cluster(tmp_path: Path, pids: list[int]) -> local.Local:
    """The record of a cluster of these processes, as `up` leaves it."""
    root, scratch = local.cluster_folder(), tmp_path / "scratch"
    for folder in (root, scratch):
        folder.mkdir(parents=True)
    spec = NodeSpec("head", True, 1, 0, 1.0, 6379, 8265, str(scratch), str(root / "head.ready"))
    members = [local.Member(spec, pid, psutil.Process(pid).create_time()) for pid in pids]
    known = local.Local(root, str(scratch), members)
    known.token_file.write_text("ours")
    local._save(known)
    return known


def sleeper() -> subprocess.Popen[bytes]:
    return subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"], start_new_session=True)


def test_down_ends_what_was_started_and_no_process_that_has_got_its_number(tmp_path: Path) -> None:
    with sleeper() as ours, sleeper() as other:
        try:
            known = a_cluster(tmp_path, [ours.pid, other.pid])
            known.members[1] = local.Member(known.head, other.pid, born=1.0)
            local._save(known)
            assert [one.alive for one in known.members] == [True, False]
            ended = local.down()
            assert ended is not None
            assert ours.wait(30) == -signal.SIGTERM
            assert other.poll() is None
        finally:
            ours.kill()
            other.kill()
    assert local.find() is None
    assert not known.root.exists()
    assert local.down() is None


def test_a_second_cluster_of_another_shape_is_refused_with_the_first_ones(tmp_path: Path) -> None:
    a_cluster(tmp_path, [os.getpid()])
    with pytest.raises(UsageError, match="is up already: --nodes 1 --cpus-per-node 1 --gpus-per-node 0"):
        local.up(3, 1, 0)


def test_of_two_starts_at_once_the_second_finds_what_the_first_has_started(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    started: list[str] = []

    def start(_: local.Local, spec: NodeSpec) -> local.Member:
        started.append(spec.name)
        time.sleep(0.2)  # the other one is at it meanwhile
        return local.Member(spec, os.getpid(), psutil.Process().create_time())

    monkeypatch.setattr(local, "_start", start)
    with ThreadPoolExecutor(2) as pool:
        first, second = pool.map(lambda _: local.up(2, 1, 0), range(2))
    assert started == ["head", "node-1"]
    assert first == second


def test_the_cluster_of_another_machine_with_the_same_home_is_left_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    known = a_cluster(tmp_path, [os.getpid()])
    monkeypatch.setattr(local.socket, "gethostname", lambda: "another")
    assert local.find() is None
    assert local.down() is None
    assert (known.root / "cluster.json").exists()


def test_a_start_that_is_interrupted_leaves_no_process() -> None:
    before, started = psutil.Process().children(), list[psutil.Process]()
    with pytest.MonkeyPatch.context() as patch:

        def interrupt(_: float) -> None:
            patch.undo()
            started.extend(child for child in psutil.Process().children() if child not in before)
            raise KeyboardInterrupt

        patch.setattr(local.time, "sleep", interrupt)
        with pytest.raises(KeyboardInterrupt):
            local.up(1, 1, 0)
    assert len(started) == 1
    assert psutil.wait_procs(started, timeout=1)[1] == []
    assert local.find() is None


def test_the_token_of_a_cluster_here_goes_to_no_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    known = a_cluster(tmp_path, [os.getpid()])
    assert local.token_for(known.dashboard) == "ours"
    assert local.token_for("http://elsewhere:8265") is None
    (tmp_path / ".ray").mkdir()
    (tmp_path / ".ray" / "auth_token").write_text("ray's\n")
    assert local.token_for("http://elsewhere:8265") == "ray's"
    monkeypatch.setenv("RAY_AUTH_TOKEN", "named")
    assert local.token_for(known.dashboard) == "named"
