"""What becomes of a job's log and record while storage fails. The faults are real: a full device, a file where a folder was."""

from __future__ import annotations

import sqlite3
from pathlib import Path

import pytest

from tunesmith.cluster.errors import OutputError, StorageError
from tunesmith.cluster.jobs.book import Book
from tunesmith.cluster.jobs.views import newest
from tunesmith.cluster.runstore import JobRecord, RunStore, log_file, record_file


@pytest.fixture(autouse=True)
def store_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    url = f"sqlite:///{tmp_path / 'jobs.db'}"
    monkeypatch.setenv("TUNESMITH_STORE", url)
    return url


def record(folder: Path) -> JobRecord:
    return JobRecord(id="bot-1", key="bot", number=1, run="bot", folder=str(folder), user="ann")


def kept(folder: Path) -> JobRecord:
    return JobRecord.model_validate_json(record_file(folder, "bot-1").read_bytes())


def test_a_full_disk_is_owed_what_was_said_and_gets_it_with_the_next_note(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "bot"
    log = log_file(folder, "bot-1")
    log.parent.mkdir(parents=True)
    log.symlink_to("/dev/full")
    book = Book(record(folder))
    book.begin()
    book.note("begins", state="running")
    book.say("one")
    book.note("saves", state="saving")
    assert kept(folder).state == "submitted"
    said = capsys.readouterr().out
    assert said.count("warning: storage fails:") == 1
    assert "bot-1.log: No space left on device" in said
    log.unlink()
    book.note(state="running")
    assert kept(folder).state == "running"
    lines = log.read_text().splitlines()
    assert [line for line in lines if "warning" not in line] == ["job bot-1: begins", "one", "job bot-1: saves"]
    assert log.read_text() == said


def test_storage_that_is_away_ends_nothing_and_is_waited_for_at_the_end(tmp_path: Path) -> None:
    folder, away = tmp_path / "bot", tmp_path / "away"
    book = Book(record(folder))
    book.begin()
    folder.rename(away)
    folder.write_text("")
    book.note("works", state="running")
    noted = RunStore().job("bot-1")
    assert noted is not None
    assert noted.why.startswith("storage fails: ")
    assert newest(record(folder)) == record(folder)
    assert newest(noted) == noted
    book.note("succeeded", state="succeeded")
    book.close(patience_s=0)
    folder.unlink()
    away.rename(folder)
    book.close(patience_s=0)
    assert kept(folder).state == "succeeded"
    assert "job bot-1: works\n" in log_file(folder, "bot-1").read_text()


@pytest.mark.parametrize("folder", ["/proc/none/bot", "file/bot"])
def test_a_folder_that_cannot_be_is_a_plain_error_and_the_store_has_it(folder: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    book = Book(record(tmp_path / folder))
    with pytest.raises(OutputError, match=rf"{folder}: cannot be written by the job's driver: \w+") as refused:
        book.begin()
    assert "output.dir" in refused.value.fix
    book.note("failed: no folder", state="failed", why=refused.value.what)
    book.close()
    known = RunStore().job("bot-1")
    assert known is not None
    assert (known.state, known.why) == ("failed", refused.value.what)


def test_a_record_that_cannot_be_kept_is_named(tmp_path: Path) -> None:
    (tmp_path / "bot" / "jobs" / "bot-1.json").mkdir(parents=True)  # no file replaces a folder
    with pytest.raises(StorageError, match=r"bot-1.json.*: Is a directory"):
        Book(record(tmp_path / "bot")).begin(patience_s=0)


def test_a_log_that_stayed_empty_does_not_hide_what_ray_has(tmp_path: Path) -> None:
    log = log_file(tmp_path / "bot", "bot-1")
    log.parent.mkdir(parents=True)
    log.symlink_to("/dev/full")
    book = Book(record(tmp_path / "bot"))
    book.begin()
    book.say("one")
    book.close(patience_s=0)
    assert not log.is_symlink()


def test_a_store_that_fails_or_was_deleted_is_warned_of_once_and_told_all_when_it_works_again(
    tmp_path: Path, store_of_its_own: str, capsys: pytest.CaptureFixture[str]
) -> None:
    book = Book(record(tmp_path / "bot"))
    book.begin()
    book.note("begins", state="running")
    with sqlite3.connect(tmp_path / "jobs.db") as database:
        database.executescript("DROP TABLE events; DROP TABLE jobs")
    book.note("goes on")
    book.note("still goes on")
    assert capsys.readouterr().out.count("warning: the run store is not written") == 1
    book.note("saves", state="saving")
    known = RunStore(store_of_its_own).job("bot-1")
    assert known is not None
    assert known.state == "saving"
    assert kept(tmp_path / "bot").state == "saving"
