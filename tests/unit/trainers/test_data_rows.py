"""Files to rows, rows to examples, examples to splits and lengths."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tunesmith.cluster.errors import DataError
from tunesmith.cluster.recipe.data import Source
from tunesmith.trainers.data import formats, split
from tunesmith.trainers.data.encoding import Encoded
from tunesmith.trainers.data.fit import fit
from tunesmith.trainers.data.formats import Completion, Conversation, Text, detect, normalise
from tunesmith.trainers.data.sources import fingerprints, read_rows

ROWS = [{"text": "one"}, {"text": "zwei ü"}]


def rows_of(path: Path | str, **fields: str) -> list:
    return list(read_rows(Source(path=str(path), **fields)))


def test_every_kind_of_file_yields_the_same_rows(tmp_path):
    lines = "\n".join(json.dumps(row) for row in ROWS)
    (tmp_path / "a.jsonl").write_text(lines)
    (tmp_path / "a.json").write_text(json.dumps(ROWS))
    (tmp_path / "b.json").write_text(json.dumps({"data": ROWS}))
    (tmp_path / "c.json").write_text(lines)
    (tmp_path / "a.csv").write_text("text\none\nzwei ü\n")
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(lines.encode()))
    pq.write_table(pa.Table.from_pylist(ROWS), tmp_path / "a.parquet")
    for name in ("a.jsonl", "a.json", "b.json", "c.json", "a.csv", "a.jsonl.gz", "a.parquet"):
        assert [raw.row for raw in rows_of(tmp_path / name)] == ROWS, name
        assert [raw.row for raw in rows_of(f"file://{tmp_path / name}")] == ROWS, name


def test_a_saved_datasets_folder_and_its_splits_are_read(tmp_path):
    import datasets

    datasets.Dataset.from_list(ROWS).save_to_disk(tmp_path / "one")
    datasets.DatasetDict({"odd": datasets.Dataset.from_list(ROWS)}).save_to_disk(tmp_path / "several")
    assert [raw.row for raw in rows_of(tmp_path / "one")] == ROWS
    assert [(raw.row, raw.line) for raw in rows_of(tmp_path / "several", split="odd")][1] == (ROWS[1], 2)
    with pytest.raises(DataError, match="no split 'train'\nIt has odd"):
        rows_of(tmp_path / "several")


def test_a_glob_reads_all_its_files_in_order_of_their_names(tmp_path):
    for name in ("b.jsonl", "a.jsonl"):
        (tmp_path / name).write_text(json.dumps({"text": name}))
    assert [raw.file for raw in rows_of(tmp_path / "*.jsonl")] == [str(tmp_path / "a.jsonl"), str(tmp_path / "b.jsonl")]


def test_damage_in_a_line_costs_that_line_and_keeps_the_count(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"text": "a"}\n\n{"text": \n{"text": "\xff"}\n[1]\n{"text": "z"}')
    found = [(raw.line, raw.row or raw.problem) for raw in rows_of(path)]
    assert found == [
        (1, {"text": "a"}),
        (3, "invalid JSON at character 11 of the line: Expecting value"),
        (4, "invalid UTF-8 at byte 11 of the line"),
        (5, "not an object but a list"),
        (6, {"text": "z"}),
    ]


def test_damage_in_a_csv_costs_its_row_and_lines_are_those_of_the_file(tmp_path):
    path = tmp_path / "a.csv"
    path.write_bytes(b'prompt,completion\n"two\nlines",x\na,b,c\n\xff,y\nq,r\n')
    found = [(raw.line, raw.row or raw.problem) for raw in rows_of(path)]
    assert found == [
        (2, {"prompt": "two\nlines", "completion": "x"}),
        (4, "3 fields where the header has 2"),
        (5, "invalid UTF-8"),
        (6, {"prompt": "q", "completion": "r"}),
    ]


@pytest.mark.parametrize(
    ("name", "content"), [("a.json", b'[{"text": "a"}, {"te'), ("a.json", b'["\xff"]'), ("a.parquet", b"PAR1 no")]
)
def test_a_file_that_is_damaged_as_a_whole_is_an_error(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=name):
        rows_of(tmp_path / name)


def test_a_missing_file_is_named_with_its_neighbours(tmp_path):
    (tmp_path / "tickets.jsonl").write_text("{}")
    with pytest.raises(DataError, match=r"tickts\.jsonl does not exist\nIn the same folder: tickets\.jsonl"):
        rows_of(tmp_path / "tickts.jsonl")
    with pytest.raises(DataError, match="matches no file"):
        rows_of(tmp_path / "*.csv")
    with pytest.raises(DataError, match="nobody/nothing is no file or folder here, and no hub data set"):
        rows_of("nobody/nothing")
    with pytest.raises(DataError, match=r"Name the files: .*/\*\.jsonl"):
        rows_of(tmp_path)


def test_a_file_is_known_by_the_hash_of_its_bytes(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "a"}')
    before = fingerprints(Source(path=str(path)))
    path.write_text('{"text": "b"}')
    assert before.keys() == fingerprints(Source(path=str(path))).keys() == {str(path)}
    assert before != fingerprints(Source(path=str(path)))


CHAT = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
SYSTEM = {"role": "system", "content": "s"}


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"messages": CHAT}, Conversation(CHAT)),
        ({"messages": json.dumps(CHAT)}, Conversation(CHAT)),
        ({"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]}, Conversation(CHAT)),
        ({"instruction": "a", "input": "", "output": "b"}, Conversation(CHAT)),
        (
            {"instruction": "a", "input": "x", "output": "b"},
            Conversation([{"role": "user", "content": "a\n\nx"}, CHAT[1]]),
        ),
        ({"prompt": "a", "completion": "b"}, Completion("a", "b")),
        ({"prompt": CHAT[:1], "completion": CHAT[1:]}, Conversation(CHAT, first_trained=1)),
        ({"text": "a"}, Text("a")),
        ({"messages": [CHAT[0], {**CHAT[1], "tool_calls": None}]}, Conversation(CHAT)),
        ({"messages": CHAT, "system": "s"}, Conversation([SYSTEM, *CHAT])),
        ({"messages": [SYSTEM, *CHAT], "system": "s"}, Conversation([SYSTEM, *CHAT])),
        ({"messages": CHAT, "system": ""}, Conversation(CHAT)),
        (
            {"prompt": CHAT[:1], "completion": CHAT[1:], "system": "s"},
            Conversation([SYSTEM, *CHAT], first_trained=2),
        ),
        (
            {"messages": [CHAT[0], {**CHAT[1], "weight": 0}, CHAT[0], {**CHAT[1], "weight": 1}]},
            Conversation(CHAT * 2, untrained=(1,)),
        ),
        (
            {"messages": [CHAT[0], {**CHAT[1], "weight": 0}], "system": "s"},
            Conversation([SYSTEM, *CHAT], untrained=(2,)),
        ),
        (
            {"instruction": "c", "output": "d", "system": "s", "history": [["a", "b"]]},
            Conversation([SYSTEM, *CHAT, {"role": "user", "content": "c"}, {"role": "assistant", "content": "d"}]),
        ),
        ({"instruction": "a", "output": "b", "history": []}, Conversation(CHAT)),
        ({"instruction": "a", "output": "b", "history": ""}, Conversation(CHAT)),
        (
            {"messages": [{"role": "user", "content": [{"type": "text", "text": "a"}]}, CHAT[1]]},
            Conversation(CHAT),
        ),
    ],
)
def test_rows_are_recognised_by_their_columns_and_brought_to_one_shape(row, expected):
    fmt = detect(row)
    assert fmt is not None
    assert normalise(row, fmt) == expected


@pytest.mark.parametrize(
    ("fmt", "row", "reason"),
    [
        ("text", {"txt": "a"}, "no `text` (columns: txt)"),
        ("text", {"text": None}, "`text` is null"),
        ("text", {"text": 3}, "`text` is not text but a number"),
        ("text", {"text": " "}, "`text` is empty"),
        ("messages", {"messages": "hi"}, "`messages` is not a list of messages but text"),
        ("messages", {"messages": []}, "`messages` is empty"),
        ("messages", {"messages": ["a"]}, "messages[0] is not an object but text"),
        ("messages", {"messages": [{"content": "a"}]}, "messages[0] has no `role`"),
        ("messages", {"messages": [{"role": "robot", "content": "a"}]}, "messages[0] has the unknown role 'robot'"),
        ("messages", {"messages": [{"role": "user"}]}, "messages[0] has no `content`"),
        ("messages", {"messages": [{"role": "user", "content": ""}]}, "messages[0]: the user's content is empty"),
        (
            "messages",
            {"messages": [{"role": "user", "content": [{"type": "image"}]}]},
            "messages[0] has a part of type image: only text can be trained on",
        ),
        *[
            (
                "messages",
                {"messages": [CHAT[0], {**CHAT[1], "weight": weight}]},
                f"messages[1]: `weight` is {weight!r}: it may be 0 (not trained) or 1",
            )
            for weight in (0.5, 2, -1, True, "0")
        ],
        (
            "messages",
            {"messages": [SYSTEM, *CHAT], "system": "other"},
            "`system` and the system turn that the messages begin with differ",
        ),
        ("messages", {"messages": CHAT, "system": 3}, "`system` is not text but a number"),
        ("alpaca", {"instruction": "a", "output": "b", "history": [["x"]]}, "history[0] is not [question, answer]"),
        (
            "alpaca",
            {"instruction": "a", "output": "b", "history": "x"},
            "`history` is not a list of [question, answer] but text",
        ),
        (
            "alpaca",
            {"instruction": "a", "output": "b", "history": [["x", 1]]},
            "`history[0][1]` is not text but a number",
        ),
        ("prompt_completion", {"prompt": "a", "completion": ""}, "`completion` is empty"),
        ("alpaca", {"instruction": "a", "output": ["b"]}, "`output` is not text but a list"),
    ],
)
def test_a_row_that_cannot_be_used_has_a_reason(fmt, row, reason):
    assert normalise(row, fmt) == reason


def test_unknown_columns_are_no_format():
    assert detect(["question", "answer"]) is None
    assert set(formats.COLUMNS) == {"messages", "sharegpt", "alpaca", "prompt_completion", "text"}


def hashes(count: int) -> list[bytes]:
    return [split.content_hash({"row": number}) for number in range(count)]


def test_shares_are_exact_and_do_not_depend_on_the_order():
    rows = hashes(1000)
    chosen = split.assign(rows, 0.05, 0.1)
    assert np.bincount(chosen).tolist() == [850, 50, 100]
    backwards = split.assign(rows[::-1], 0.05, 0.1)
    np.testing.assert_array_equal(chosen, backwards[::-1])


def test_one_share_does_not_move_the_other():
    rows = hashes(100)
    with_test, without = split.assign(rows, 0.1, 0.2), split.assign(rows, 0.1, 0.0)
    np.testing.assert_array_equal(with_test == split.VALIDATION, without == split.VALIDATION)


@pytest.mark.parametrize(("count", "expected"), [(1, [1, 0, 0]), (2, [1, 1, 0]), (3, [1, 1, 1]), (10, [8, 1, 1])])
def test_few_rows_leave_something_to_train_and_hold_at_least_one_out(count, expected):
    assert np.bincount(split.assign(hashes(count), 0.01, 0.01), minlength=3).tolist() == expected


def test_equal_rows_stay_together():
    rows = hashes(20)
    chosen = split.assign(rows * 5, 0.2, 0.2).reshape(5, 20)
    assert (chosen == chosen[0]).all()
    many_twins = split.assign([rows[0]] * 90 + rows[1:11], 0.1, 0.0)
    assert np.bincount(many_twins, minlength=3).tolist() == [90, 10, 0]


def test_a_share_that_equal_rows_move_far_is_said():
    rows = hashes(2)
    twins = rows[:1] * 30 + rows[1:] * 30
    said = "validation: 5 % asked, 50 % held out: equal rows stay together (58 duplicates)"
    assert split.stray("validation", 0.05, 30, twins) == said
    assert split.stray("validation", 0.5, 30, twins) is None
    assert split.stray("test", 0.5, 10, twins) is not None
    assert split.stray("test", 0.5, 10, hashes(60)) is None
    assert split.stray("test", 0.0, 0, twins) is None


def test_columns_that_hold_something_and_are_not_read_are_ignored():
    assert formats.ignored({"messages": [], "system": "", "id": 3, "note": None, "source": "x"}, "messages") == [
        "id",
        "source",
    ]
    assert formats.ignored({"prompt": "a", "completion": "b", "system": "s"}, "prompt_completion") == ["system"]
    assert formats.ignored({"prompt": [], "completion": [], "system": "s"}, "prompt_completion") == []
    assert formats.ignored({"instruction": "a", "output": "b", "history": [], "tools": [1]}, "alpaca") == ["tools"]


def test_rows_that_say_the_same_have_the_same_hash():
    assert split.content_hash({"a": 1, "b": "ü"}) == split.content_hash({"b": "ü", "a": 1})


def numbered(length: int, first_trained: int = 0) -> Encoded:
    return Encoded(np.arange(length, dtype=np.int32), np.arange(length) >= first_trained)


def test_split_trains_every_label_of_a_long_row_exactly_once():
    fitted = fit(numbered(20, 3), 8, "split")
    labels = [
        token for piece in fitted.examples for token, on in zip(piece.tokens[1:], piece.trained[1:], strict=True) if on
    ]
    assert fitted.fate == "split"
    assert labels == list(range(3, 20))
    assert all(len(piece.tokens) <= 8 for piece in fitted.examples)


@pytest.mark.parametrize(
    ("rule", "first_trained", "fate", "lengths"),
    [
        ("truncate", 3, "truncated", [8]),
        ("truncate", 9, "dropped", []),
        ("drop", 0, "dropped", []),
        ("split", 16, "split", [6]),
    ],
)
def test_long_rows_follow_the_rule(rule, first_trained, fate, lengths):
    fitted = fit(numbered(20, first_trained), 8, rule)
    assert (fitted.fate, [len(piece.tokens) for piece in fitted.examples]) == (fate, lengths)
    assert bool(fitted.reason) == (fate == "dropped")
    assert fit(numbered(8), 8, rule).fate == "whole"
