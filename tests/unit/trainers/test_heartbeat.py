"""What a worker says of itself while it works, waits, and is given up."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from tunesmith.cluster.runs import RunFolder
from tunesmith.trainers.heartbeat import Beat, Heartbeat, interval, read_beat

STALL_S = 0.8
PATIENCE_S = 20.0


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    folder = RunFolder(tmp_path / "run")
    folder.create()
    return folder


def wait_for(run: RunFolder, count: int) -> Beat:
    deadline = time.monotonic() + PATIENCE_S
    while time.monotonic() < deadline:
        beat = read_beat(run, 0)
        if beat is not None and beat.count >= count:
            return beat
        time.sleep(0.01)
    raise AssertionError(f"no beat {count}")


def test_it_tells_where_the_thread_stands_and_for_how_long(run: RunFolder):
    heartbeat = Heartbeat(run, 3, 0, STALL_S)
    heartbeat.start()
    first = wait_for(run, 2)
    assert (first.attempt, first.has_left) == (3, False)
    time.sleep(5 * interval(STALL_S))  # at one place, as in a collective that nobody joins
    still = read_beat(run, 0)
    assert still is not None
    assert still.still_s >= 3 * interval(STALL_S)
    assert still.stack[-1].endswith("test_it_tells_where_the_thread_stands_and_for_how_long")
    heartbeat.leave()
    last = read_beat(run, 0)
    assert last is not None
    assert last.has_left


def test_work_in_one_line_is_no_standstill(run: RunFolder):
    heartbeat = Heartbeat(run, 1, 0, STALL_S)
    heartbeat.start()
    deadline = time.monotonic() + 10 * interval(STALL_S)
    while time.monotonic() < deadline:
        time.sleep(interval(STALL_S) / 4)
        heartbeat.moved()
    beat = read_beat(run, 0)
    heartbeat.leave()
    assert beat is not None
    assert beat.still_s < 3 * interval(STALL_S)


def test_the_last_beat_stays_the_last(run: RunFolder, monkeypatch: pytest.MonkeyPatch):
    heartbeat = Heartbeat(run, 1, 0, STALL_S)
    write, writing, go_on = heartbeat._write, threading.Event(), threading.Event()

    def slowly(beat: Beat) -> None:
        if threading.current_thread() is heartbeat:
            writing.set()
            assert go_on.wait(PATIENCE_S)
        write(beat)

    monkeypatch.setattr(heartbeat, "_write", slowly)
    heartbeat.start()
    assert writing.wait(PATIENCE_S)
    threading.Timer(0.2, go_on.set).start()
    heartbeat.leave()
    heartbeat.join()
    last = read_beat(run, 0)
    assert last is not None
    assert last.has_left


def test_storage_that_fails_for_a_while_does_not_end_the_beats(run: RunFolder, monkeypatch: pytest.MonkeyPatch):
    heartbeat = Heartbeat(run, 1, 0, STALL_S)
    with monkeypatch.context() as patch:

        def fails(path: Path) -> bool:
            raise OSError(errno.ESTALE, os.strerror(errno.ESTALE), path)

        patch.setattr(Path, "exists", fails)
        heartbeat.start()
        first = wait_for(run, 2)
    assert wait_for(run, first.count + 2).count > first.count
    heartbeat.leave()


def test_a_worker_that_is_given_up_leaves_its_stacks_and_ends(run: RunFolder):
    waits = (
        "import sys, time; from pathlib import Path; from tunesmith.cluster.runs import RunFolder\n"
        "from tunesmith.trainers.heartbeat import Heartbeat\n"
        f"Heartbeat(RunFolder(Path(sys.argv[1])), 1, 0, {STALL_S}).start()\n"
        "def wait_for_ever(): time.sleep(600)\n"
        "wait_for_ever()\n"
    )
    command = [sys.executable, "-c", waits, str(run.root)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        wait_for(run, 1)
        run.abort_file(1).touch()
        said, _ = process.communicate(timeout=PATIENCE_S)
    finally:
        process.kill()
    assert process.returncode == 1
    assert "rank 0" in said
    assert "wait_for_ever" in said
