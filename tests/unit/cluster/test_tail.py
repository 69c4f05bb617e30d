"""Following metrics.jsonl while it grows, is torn, or is rewritten by a later attempt."""

from __future__ import annotations

import os
from pathlib import Path

from tunesmith.cluster.tail import MetricsTail


def append(path: Path, text: str) -> None:
    with path.open("a") as file:
        file.write(text)


def steps(tail: MetricsTail) -> list[int]:
    return [line["step"] for line in tail.lines()]


def test_each_line_is_given_once_and_none_that_was_there_before(tmp_path: Path):
    path = tmp_path / "metrics.jsonl"
    append(path, '{"step": 1}\n')
    tail = MetricsTail(path)
    assert steps(tail) == []
    append(path, '{"step": 2}\n{"step": 3}\n')
    assert steps(tail) == [2, 3]
    assert steps(tail) == []


def test_a_file_that_appears_later_is_read_from_its_start(tmp_path: Path):
    tail = MetricsTail(tmp_path / "metrics.jsonl")
    assert steps(tail) == []
    append(tmp_path / "metrics.jsonl", '{"step": 0}\n')
    assert steps(tail) == [0]


def test_half_a_line_waits_for_its_other_half(tmp_path: Path):
    path = tmp_path / "metrics.jsonl"
    tail = MetricsTail(path)
    append(path, '{"step": 1}\n{"st')
    assert steps(tail) == [1]
    append(path, 'ep": 2}\n')
    assert steps(tail) == [2]


def test_after_a_rewrite_only_what_follows_is_new(tmp_path: Path):
    path = tmp_path / "metrics.jsonl"
    tail = MetricsTail(path)
    append(path, '{"step": 1}\n{"step": 2}\n')
    assert steps(tail) == [1, 2]
    append(tmp_path / "new", '{"step": 1}\n')
    os.replace(tmp_path / "new", path)
    assert steps(tail) == []
    append(path, '{"step": 2}\n')
    assert steps(tail) == [2]
