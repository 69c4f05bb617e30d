"""A state that many write: nothing lost, nothing half, nothing believed that did not happen."""

from __future__ import annotations

import contextlib
import json
import logging
import multiprocessing
import os
import subprocess
import sys
import threading
import uuid
from pathlib import Path
from typing import Any

import pytest

from tunesmith.cluster.errors import MovedError, RegistryError, StorageError
from tunesmith.serving import statelog, store
from tunesmith.serving.statelog import KEPT, StateLog


@pytest.fixture(params=["folder", "memory"])
def root(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    return str(tmp_path / "registry") if request.param == "folder" else f"memory://{uuid.uuid4().hex}"


def _count(state: dict[str, Any]) -> dict[str, Any]:
    return {"n": state.get("n", 0) + 1}


def _fill(log: StateLog, times: int) -> None:
    for _ in range(times):
        log.update(_count)


def test_before_the_first_write_the_state_is_empty(root: str) -> None:
    assert StateLog(root, "state").read() == (0, {})


def test_a_write_is_read_by_whoever_opens_the_same_root(root: str) -> None:
    assert StateLog(root, "state").write(0, {"a": [1, {"ü": None}]}) == 1
    assert StateLog(root, "state").read() == (1, {"a": [1, {"ü": None}]})
    assert StateLog(root, "keys").read() == (0, {}), "states of other names are apart"


def test_of_two_writers_from_one_generation_the_second_is_told(root: str) -> None:
    log = StateLog(root, "state")
    log.write(0, {"by": "first"})
    with pytest.raises(MovedError, match="generation 0 was expected, and 1 is there"):
        log.write(0, {"by": "second"})
    assert log.read() == (1, {"by": "first"})


def test_a_writer_that_looked_before_another_wrote_loses(root: str, monkeypatch: pytest.MonkeyPatch) -> None:
    slow, fast = StateLog(root, "state"), StateLog(root, "state")
    fast.write(0, {"n": 1})
    create = slow._store.create

    def late(path: str, data: bytes) -> None:
        fast.write(1, {"n": "fast"})
        create(path, data)

    monkeypatch.setattr(slow._store, "create", late)
    with pytest.raises(MovedError):
        slow.write(1, {"n": "slow"})
    assert fast.read() == (2, {"n": "fast"})


def test_a_writer_that_slept_past_the_removal_of_its_number_loses(root: str, monkeypatch: pytest.MonkeyPatch) -> None:
    slow, fast = StateLog(root, "state"), StateLog(root, "state")
    create = slow._store.create

    def very_late(path: str, data: bytes) -> None:
        _fill(fast, KEPT + 5)
        create(path, data)

    monkeypatch.setattr(slow._store, "create", very_late)
    with pytest.raises(MovedError):
        slow.write(0, {"n": "slow"})
    assert fast.read() == (KEPT + 5, {"n": KEPT + 5})


def test_a_hundred_documents_are_kept(root: str) -> None:
    log = StateLog(root, "state")
    _fill(log, KEPT + 7)
    assert sorted(log._numbers()) == list(range(8, KEPT + 8))
    assert log.read() == (KEPT + 7, {"n": KEPT + 7})


@pytest.mark.parametrize("damage", [b"", b"{", b"[]", b'{"sha256": 1}', "flip", "other"])
def test_a_damaged_newest_document_falls_back_and_is_written_past(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, damage: bytes | str
) -> None:
    log = StateLog(str(tmp_path), "state")
    _fill(log, 3)
    newest = tmp_path / "state" / "000000000003.json"
    if damage == "flip":
        newest.write_bytes(newest.read_bytes().replace(b'"n": 3', b'"n": 9'))
    elif damage == "other":
        newest.write_bytes((tmp_path / "state" / "000000000001.json").read_bytes())
    else:
        assert isinstance(damage, bytes)
        newest.write_bytes(damage)
    with caplog.at_level(logging.WARNING):
        assert log.read() == (2, {"n": 2})
    assert "000000000003.json" in caplog.text
    assert "generation 2 is used instead" in caplog.text
    assert log.write(2, {"n": 4}) == 4
    assert log.read() == (4, {"n": 4})


def test_documents_of_which_none_can_be_read_are_not_an_empty_state(tmp_path: Path) -> None:
    log = StateLog(str(tmp_path), "state")
    _fill(log, 2)
    for document in (tmp_path / "state").iterdir():
        document.write_bytes(b"x")
    with pytest.raises(StorageError, match=r"000000000002\.json: .* nor can any of the 1 documents before it"):
        log.read()


def test_a_change_that_changes_nothing_writes_nothing(root: str) -> None:
    log = StateLog(root, "state")
    log.write(0, {"a": 1})
    assert log.update(dict) == (1, {"a": 1})
    assert log.read()[0] == 1


def test_an_update_of_an_expected_generation_is_not_tried_on_another(root: str) -> None:
    log = StateLog(root, "state")
    _fill(log, 2)
    with pytest.raises(MovedError, match="generation 1 was expected, and 2 is there"):
        log.update(_count, expected=1)
    assert log.update(_count, expected=2) == (3, {"n": 3})


def _race(root: str, times: int) -> None:
    _fill(StateLog(root, "state"), times)


def test_eight_processes_lose_no_update(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    racers = [context.Process(target=_race, args=(str(tmp_path), 12)) for _ in range(8)]
    for racer in racers:
        racer.start()
    for racer in racers:
        racer.join(60)
    assert [racer.exitcode for racer in racers] == [0] * 8
    assert StateLog(str(tmp_path), "state").read() == (96, {"n": 96})
    assert not list(tmp_path.rglob("*.tmp-*"))


def test_of_eight_writers_from_one_generation_one_wins(tmp_path: Path) -> None:
    gate, won = threading.Barrier(8), []

    def write(who: int) -> None:
        log = StateLog(str(tmp_path), "state")
        gate.wait()
        with contextlib.suppress(MovedError):
            won.append((log.write(0, {"who": who}), who))

    threads = [threading.Thread(target=write, args=(who,)) for who in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(won) == 1
    assert StateLog(str(tmp_path), "state").read() == (1, {"who": won[0][1]})


def test_a_writer_killed_before_the_name_is_given_leaves_the_state_as_it_was(tmp_path: Path) -> None:
    StateLog(str(tmp_path), "state").write(0, {"n": 1})
    code = (
        "import os, sys\nfrom tunesmith.serving.statelog import StateLog\n"
        "os.link = lambda *_: os.kill(os.getpid(), 9)\nStateLog(sys.argv[1], 'state').write(1, {'n': 2})"
    )
    assert subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=False).returncode == -9
    log = StateLog(str(tmp_path), "state")
    assert log.read() == (1, {"n": 1})
    left = next((tmp_path / "state").glob("*.tmp-*"))
    os.utime(left, (0, 0))
    _fill(log, KEPT)
    assert not left.exists(), "what a killed writer left is removed with the old documents"


def test_a_store_that_cannot_create_exclusively_is_refused() -> None:
    with pytest.raises(RegistryError, match="ftp cannot create a file only when there is none"):
        StateLog("ftp://host/registry", "state")


class _TwiceSent:
    """An object store whose client sends a request again because the answer to the first was lost."""

    def __init__(self, files: Any) -> None:
        self.files = files

    def __getattr__(self, name: str) -> Any:
        return getattr(self.files, name)

    def pipe_file(self, path: str, data: bytes, mode: str) -> None:
        self.files.pipe_file(path, data, mode=mode)
        raise OSError(22, "PreconditionFailed")  # what s3fs makes of 412


def test_a_request_sent_twice_has_won_and_a_lost_race_reported_as_einval_has_lost() -> None:
    objects = store.ObjectStore(f"memory://{uuid.uuid4().hex}")
    objects.files = _TwiceSent(objects.files)
    objects.create("state/1", b"mine")
    with pytest.raises(FileExistsError):
        objects.create("state/1", b"another's")
    assert objects.read("state/1") == b"mine"


def test_a_document_says_its_generation_and_hash(tmp_path: Path) -> None:
    StateLog(str(tmp_path), "state").write(0, {"a": 1})
    document = json.loads((tmp_path / "state" / "000000000001.json").read_text())
    assert document["state"] == {"a": 1}
    assert document["generation"] == 1
    assert document["sha256"] == statelog._hash({key: document[key] for key in ("generation", "writer", "state")})
