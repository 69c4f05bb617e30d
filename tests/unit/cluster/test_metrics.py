from __future__ import annotations

import os
from pathlib import Path

import pytest

from tunesmith.cluster.errors import DiskFullError, StorageError
from tunesmith.cluster.metrics import MetricsLog, read_metrics


def test_lines_come_back_as_they_were(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path / "metrics.jsonl")
    lines = [{"step": 1, "loss": 2.5}, {"step": 2, "loss": 2.25, "eval_loss": 2.0}]
    for line in lines:
        log.append(line)
    assert read_metrics(log.path) == lines


def test_a_number_that_is_not_finite_is_written_as_null(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path / "metrics.jsonl")
    log.append({"step": 1, "loss": float("nan"), "grad_norm": float("inf")})
    assert read_metrics(log.path) == [{"step": 1, "loss": None, "grad_norm": None}]


def test_a_line_torn_by_a_crash_is_left_out_and_cut_before_the_next(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 2, "lo')
    assert read_metrics(path) == [{"step": 1}]
    MetricsLog(path).append({"step": 2})
    assert read_metrics(path) == [{"step": 1}, {"step": 2}]


def test_steps_about_to_be_repeated_are_dropped(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path / "metrics.jsonl")
    for step in range(1, 6):
        log.append({"step": step})
    log.truncate_after(3)
    log.append({"step": 4})
    assert [line["step"] for line in read_metrics(log.path)] == [1, 2, 3, 4]


def test_nothing_to_drop_makes_no_file(tmp_path: Path) -> None:
    MetricsLog(tmp_path / "metrics.jsonl").truncate_after(0)
    assert list(tmp_path.iterdir()) == []


def test_a_damaged_line_is_named(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\nrubbish\n{"step": 3}\n')
    with pytest.raises(StorageError, match=r"metrics\.jsonl:2"):
        read_metrics(path)


def test_a_line_that_is_taken_in_parts_is_written_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write = os.write
    monkeypatch.setattr(os, "write", lambda descriptor, data: write(descriptor, data[:5]))
    MetricsLog(tmp_path / "metrics.jsonl").append({"step": 1, "loss": 2.5})
    assert read_metrics(tmp_path / "metrics.jsonl") == [{"step": 1, "loss": 2.5}]


def test_a_full_disk_is_told_with_the_numbers() -> None:
    with pytest.raises(DiskFullError, match="12 bytes needed"):
        MetricsLog(Path("/dev/full")).append({"step": 1})
