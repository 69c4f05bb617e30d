"""What workers tell the driver about how an attempt ended."""

from __future__ import annotations

from pathlib import Path

import pytest

from tunesmith.cluster.errors import DiskFullError, NonFiniteError, StoppedError, TunesmithError, WorkerError
from tunesmith.trainers.outcome import AttemptOutcome, read_outcome, write_outcome
from tunesmith.trainers.worker import is_lost_peer


def round_trip(tmp_path: Path, outcome: AttemptOutcome) -> AttemptOutcome:
    assert write_outcome(tmp_path / "outcome-1.json", outcome)
    read = read_outcome(tmp_path / "outcome-1.json")
    assert read is not None
    return read


def test_a_result_comes_back_as_it_was(tmp_path: Path):
    result = {"step": 20, "metrics": {"train_loss": 1.5, "eval_loss": None}}
    assert round_trip(tmp_path, AttemptOutcome.done(0, result)).result == result


@pytest.mark.parametrize("kind", [NonFiniteError, DiskFullError, StoppedError])
def test_our_errors_come_back_as_themselves(tmp_path: Path, kind: type[TunesmithError]):
    error = round_trip(tmp_path, AttemptOutcome.failed(1, kind("what", "fix"))).to_error()
    assert type(error) is kind
    assert (error.what, error.fix, error.exit_code) == ("what", "fix", kind.exit_code)


def test_any_other_error_comes_back_with_its_traceback(tmp_path: Path):
    try:
        _ = 1 / 0
    except ZeroDivisionError as crash:
        error = round_trip(tmp_path, AttemptOutcome.failed(3, crash)).to_error()
    assert type(error) is WorkerError
    assert error.what.startswith("rank 3 failed with ZeroDivisionError: division by zero")
    assert "Traceback" in error.what


def test_the_first_worker_to_write_decides(tmp_path: Path):
    path = tmp_path / "outcome-1.json"
    assert write_outcome(path, AttemptOutcome.failed(1, NonFiniteError("first")))
    assert not write_outcome(path, AttemptOutcome.failed(0, NonFiniteError("second")))
    assert read_outcome(path).what == "first"  # type: ignore[union-attr]
    assert [p.name for p in tmp_path.iterdir()] == ["outcome-1.json"]


def test_no_file_means_that_nobody_could_write(tmp_path: Path):
    assert read_outcome(tmp_path / "outcome-1.json") is None


def test_a_broken_connection_is_a_victims_error_and_others_are_not():
    gloo = RuntimeError("[gloo/transport/tcp/pair.cc:553] Connection closed by peer [127.0.0.1]:37784.")
    wrapped = RuntimeError("backward failed")
    wrapped.__cause__ = gloo
    assert is_lost_peer(gloo)
    assert is_lost_peer(wrapped)
    assert not is_lost_peer(ZeroDivisionError("division by zero"))
