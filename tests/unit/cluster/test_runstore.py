from __future__ import annotations

import sqlite3
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tunesmith.cluster.errors import StorageError
from tunesmith.cluster.jobs.states import state_of
from tunesmith.cluster.runs import RunFolder
from tunesmith.cluster.runstore import JobRecord, RunStore, keep, record_file
from tunesmith.cluster.storage import commit_folder

WRITERS, WRITES = 16, 4


def record(output: Path, id: str = "bot-1", **fields) -> JobRecord:
    known = {"key": "bot", "number": 1, "run": "bot", "folder": str(output / "bot"), "user": "ann"}
    return JobRecord(id=id, **(known | fields))


@pytest.fixture
def url(tmp_path: Path) -> str:
    return f"sqlite:///{tmp_path / 'jobs.db'}"


def test_a_job_is_added_once_changed_and_remembered(tmp_path: Path, url: str) -> None:
    store = RunStore(url)
    assert store.add(record(tmp_path), "submitted").user == "ann"
    assert store.add(record(tmp_path, user="bob"), "submitted again").user == "ann"
    store.change("bot-1", "waits", state="queued", why="no room")
    store.close()
    again = RunStore(url)
    assert again.jobs() == [record(tmp_path, state="queued", why="no room")]
    assert again.jobs(str(tmp_path / "bot")) == again.jobs()
    assert again.jobs(str(tmp_path / "other")) == []
    assert [text for _, text in again.events("bot-1")] == ["submitted", "waits"]
    with pytest.raises(KeyError):
        again.change("nobody", state="queued")


def test_what_has_ended_does_not_run_again(tmp_path: Path, url: str) -> None:
    store = RunStore(url)
    store.add(record(tmp_path), "submitted")
    store.change("bot-1", state="succeeded")
    assert store.change("bot-1", state="running").state == "succeeded"
    assert store.job("bot-1") == record(tmp_path, state="succeeded")


def test_many_processes_that_begin_at_once_lose_nothing(tmp_path: Path, url: str) -> None:
    """Each makes the store if it is not there, adds the same job and one of its own, and writes events to the shared one."""
    script = (
        "import sys\n"
        "from tunesmith.cluster.runstore import JobRecord, RunStore\n"
        "store, me = RunStore(sys.argv[1]), sys.argv[2]\n"
        "def job(id): return JobRecord(id=id, key=id, number=1, run='bot', folder='/nowhere/bot', user=me)\n"
        "first = store.add(job('shared'), f'added by {me}').user == me\n"
        "store.add(job(f'own-{me}'), 'added')\n"
        f"for turn in range({WRITES}): store.change('shared', f'{{me}} {{turn}}', heard_at=float(turn))\n"
        "print('first' if first else 'later')\n"
    )
    writers = [
        subprocess.Popen(
            [sys.executable, "-c", script, url, str(number)], stdout=subprocess.PIPE, stderr=subprocess.PIPE
        )
        for number in range(WRITERS)
    ]
    said = [writer.communicate(timeout=300) for writer in writers]
    assert [writer.returncode for writer in writers] == [0] * WRITERS, said
    assert sorted(out for out, _ in said) == [b"first\n", *[b"later\n"] * (WRITERS - 1)]
    store = RunStore(url)
    assert len(store.jobs()) == WRITERS + 1
    texts = [text for _, text in store.events("shared")]
    assert sorted(texts[1:]) == sorted(f"{number} {turn}" for number in range(WRITERS) for turn in range(WRITES))


def test_it_is_made_anew_from_what_the_runs_tell(tmp_path: Path, url: str) -> None:
    ended = record(tmp_path, state="stopped", why="stopped by ann")
    keep(ended)
    for number, name in enumerate(("whole", "cut"), 1):
        RunFolder(tmp_path / name).create()
        keep(record(tmp_path, f"{name}-1", run=name, folder=str(tmp_path / name), state="running", submitted_at=number))
    with commit_folder(tmp_path / "whole" / "artifact", {"kind": "artifact"}) as temporary:
        (temporary / "weights").write_bytes(b"1")
    alive = record(
        tmp_path, "alive-1", folder=str(tmp_path / "alive"), state="running", submitted_at=3, heard_at=time.time()
    )
    keep(alive)
    store = RunStore(url)
    assert len(store.rebuild(tmp_path)) == 4
    assert store.rebuild(tmp_path) == []
    stopped, whole, cut, running = store.jobs()
    assert (stopped, running) == (ended, alive)
    assert (whole.state, whole.exit_code) == ("succeeded", 0)
    assert cut.state == "running"  # silence is not an end: the clock may be another machine's
    assert state_of(cut, None, time.time(), "no cluster is named")[0] == "lost"
    assert [text for _, text in store.events("whole-1")] == [f"found in {tmp_path / 'whole'}"]


def test_an_unreadable_record_is_named(tmp_path: Path, url: str) -> None:
    keep(record(tmp_path))
    (tmp_path / "bot" / "jobs" / "bot-1.json").write_text("{")
    with pytest.raises(StorageError, match=r"bot/jobs/bot-1.json: not the record of a job"):
        RunStore(url).rebuild(tmp_path)


def test_a_record_that_cannot_be_read_keeps_nobody_from_the_others(tmp_path: Path, url: str) -> None:
    keep(record(tmp_path))
    record_file(tmp_path / "theirs", "theirs-1").mkdir(parents=True)
    assert [one.id for one in RunStore(url).rebuild(tmp_path)] == ["bot-1"]


def test_a_store_of_another_version_is_refused(tmp_path: Path, url: str) -> None:
    RunStore(url).close()
    with sqlite3.connect(tmp_path / "jobs.db") as connection:
        connection.execute("UPDATE schema_version SET version = 99")
    with pytest.raises(StorageError, match=r"schema 99, this one has 1"):
        RunStore(url)


def test_a_store_that_cannot_be_opened_is_named(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match=r"nowhere/jobs.db.*unable to open"):
        RunStore(f"sqlite:///{tmp_path / 'nowhere' / 'jobs.db'}")
