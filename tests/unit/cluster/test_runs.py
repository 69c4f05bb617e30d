from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from tunesmith.cluster.errors import FencedError, OutputError, RunBusyError
from tunesmith.cluster.metrics import MetricsLog
from tunesmith.cluster.runs import RunFolder


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    folder = RunFolder(tmp_path / "runs" / "bot")
    folder.create()
    return folder


def test_a_second_command_is_told_who_is_at_work(run: RunFolder) -> None:
    script = (
        "import time; from pathlib import Path; from tunesmith.cluster.runs import RunFolder\n"
        f"with RunFolder(Path({str(run.root)!r})).lock():\n    print('locked', flush=True); time.sleep(60)\n"
    )
    with subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True) as holder:
        try:
            assert holder.stdout is not None
            holder.stdout.readline()
            with pytest.raises(RunBusyError, match=rf"run bot .* process {holder.pid} on .* since 20"), run.lock():
                pass
        finally:
            holder.kill()
    with run.lock():
        pass


def test_a_lock_on_a_discarded_folder_holds_nothing(run: RunFolder) -> None:
    with run.lock():
        assert run.discard_if_unused()
        run.create()
        with RunFolder(run.root).lock():
            pass


def test_a_newer_attempt_fences_the_older(run: RunFolder) -> None:
    first = run.begin_attempt()
    run.check_fence(first)
    second = RunFolder(run.root).begin_attempt()
    assert (first, second) == (1, 2)
    with pytest.raises(FencedError, match="attempt 1 may not write, attempt 2 has taken over"):
        run.check_fence(first)


def test_a_request_to_stop_is_seen_until_it_is_taken_back(run: RunFolder) -> None:
    assert not run.stop_requested(1)
    run.request_stop()
    assert RunFolder(run.root).stop_requested(1)
    assert run.why_stopped(1) == ""
    run.clear_stop()
    assert not run.stop_requested(1)
    run.clear_stop()


def test_one_attempt_may_be_asked_to_stop_and_the_first_reason_stays(run: RunFolder) -> None:
    run.request_stop()  # makes the folder, as the first beat of a worker does
    run.clear_stop()
    run.request_stop_of(2, "its machine is drained")
    run.request_stop_of(2, "another reason")
    assert run.why_stopped(2) == " because its machine is drained"
    assert [run.stop_requested(attempt) for attempt in (1, 2, 3)] == [False, True, False]


def test_a_folder_in_which_nothing_was_trained_is_discarded_with_the_parents_it_brought(tmp_path: Path) -> None:
    run = RunFolder(tmp_path / "a" / "b" / "bot")
    run.create()
    run.recipe.write_text("name: bot")
    assert run.discard_if_unused()
    assert list(tmp_path.iterdir()) == []


def test_a_worker_that_still_beats_neither_hinders_discarding_nor_brings_the_folder_back(tmp_path: Path) -> None:
    runs = [RunFolder(tmp_path / str(number)) for number in range(20)]
    for run in runs:
        run.create()
        run.request_stop()
    beating, discarded = threading.Event(), threading.Event()

    def beat() -> None:
        while not discarded.is_set():
            for run in runs:
                for rank in range(8):
                    with contextlib.suppress(OSError):
                        part = run.stop_file.parent / f"rank-{rank}.part"
                        part.write_text("beat")
                        part.replace(part.with_suffix(".json"))
            beating.set()

    worker = threading.Thread(target=beat)
    worker.start()
    try:
        assert beating.wait(30)
        assert all(run.discard_if_unused() for run in runs)
    finally:
        discarded.set()
        worker.join()
    assert list(tmp_path.iterdir()) == []


def test_a_folder_of_an_earlier_command_is_never_discarded(run: RunFolder) -> None:
    later = RunFolder(run.root)
    later.create()
    assert not later.discard_if_unused()
    assert run.root.exists()


def test_a_folder_in_which_something_was_trained_is_kept(run: RunFolder) -> None:
    MetricsLog(run.metrics).append({"step": 1})
    assert not run.discard_if_unused()


def test_a_discarded_run_leaves_its_neighbours_alone(run: RunFolder) -> None:
    other = RunFolder(run.root.parent / "other")
    other.create()
    assert run.discard_if_unused()
    assert other.root.exists()


def test_an_output_folder_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(OutputError, match=r"file/bot: cannot be written"):
        RunFolder(tmp_path / "file" / "bot").create()


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_an_output_folder_that_may_not_be_written_is_named(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(OutputError, match="Permission denied"):
        RunFolder(tmp_path / "bot").create()
