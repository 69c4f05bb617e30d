"""A recipe's data from files to the token cache."""

from __future__ import annotations

import json
import os
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny_tokenizers import CHATML_PLAIN, byte_level, save

from tunesmith.cluster.base import BaseRef
from tunesmith.cluster.errors import DataError
from tunesmith.cluster.recipe.schema import Recipe
from tunesmith.trainers.data.prepare import Prepared, open_prepared, prepare

TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")


@pytest.fixture
def base(tmp_path) -> BaseRef:
    folder = save(tmp_path / "base", byte_level(TOKENS, CHATML_PLAIN))
    return BaseRef("tiny", str(folder), "digest", 512)


def recipe_of(data: dict[str, Any], objective: str = "sft") -> Recipe:
    recipe = Recipe.model_validate(
        {"name": "t", "model": {"base": "tiny"}, "data": data, "objective": objective, "adaptation": "lora"}
    )
    recipe.forget_reads()
    return recipe


def write(path: Path, rows: list[Any]) -> str:
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return str(path)


def chats(count: int, words: int = 1) -> list[dict[str, Any]]:
    return [
        {
            "messages": [
                {"role": "user", "content": f"What is {number}?"},
                {"role": "assistant", "content": "lazy dog " * words + str(number)},
            ]
        }
        for number in range(count)
    ]


def run(tmp_path: Path, base: BaseRef, data: dict[str, Any], objective: str = "sft") -> Prepared:
    return prepare(recipe_of(data, objective), base, tmp_path / "cache")


def test_rows_become_examples_that_know_where_they_came_from(tmp_path, base):
    path = write(tmp_path / "a.jsonl", chats(40))
    prepared = run(tmp_path, base, {"train": path, "split": {"validation": 0.1, "test": 0.1}})
    stores = (prepared.train, prepared.validation, prepared.test)
    assert [len(store) for store in stores] == [32, 4, 4]
    assert sorted(line for store in stores for line in store.line) == list(range(1, 41))
    store = prepared.train
    assert store.where(0) == f"{path}:{store.line[0]}"
    tokens, trained = store.example(3)
    said = byte_level(TOKENS, CHATML_PLAIN).decode(tokens[trained])
    assert said == f"lazy dog {store.line[3] - 1}<|im_end|>"
    assert store.trained_counts[3] == trained[1:].sum()
    assert store.lengths.sum() == prepared.report.splits["train"].tokens
    again = pickle.loads(pickle.dumps(store))
    np.testing.assert_array_equal(again.example(3)[0], tokens)


def test_a_cached_data_set_marks_the_same_keys_as_the_one_that_was_built(tmp_path, base):
    data = {"train": write(tmp_path / "a.jsonl", chats(4)), "template": "chatml", "long_rows": "drop"}
    built, cached = recipe_of(data), recipe_of(data)
    first = prepare(built, base, tmp_path / "cache")
    second = prepare(cached, base, tmp_path / "cache")
    assert first.fingerprint == second.fingerprint
    assert built.read_keys() == cached.read_keys()
    assert [key for key in cached.unread_keys() if key.startswith("data")] == []


def test_the_report_says_which_columns_are_ignored_and_which_share_equal_rows_moved(tmp_path, base):
    rows = [{**row, "id": 7, "system": "Be kind."} for row in chats(2) for _ in range(30)]
    rows[-1]["late"] = "x"
    prepared = run(tmp_path, base, {"train": write(tmp_path / "a.jsonl", rows), "split": {"validation": 0.05}})
    said = prepared.report.lines()
    assert said[0].endswith("60 rows, 60 used; ignored columns: id, late")
    assert "validation: 5 % asked, 50 % held out: equal rows stay together (58 duplicates)" in said
    assert "Be kind." in byte_level(TOKENS, CHATML_PLAIN).decode(prepared.train.example(0)[0])


def test_rows_that_differ_only_in_weights_stay_together(tmp_path, base):
    rows = chats(4)
    rows += [{"messages": [row["messages"][0], {**row["messages"][1], "weight": 1}] * 2} for row in rows]
    rows += [{"messages": [*row["messages"][:3], {**row["messages"][3], "weight": 0}]} for row in rows[4:]]
    prepared = run(tmp_path, base, {"train": write(tmp_path / "a.jsonl", rows), "split": {"validation": 0.5}})
    held = set(prepared.validation.line.tolist())
    assert all((line in held) == (line + 4 in held) for line in range(5, 9))


def test_a_template_that_no_row_needs_is_not_read(tmp_path, base):
    recipe = recipe_of({"train": write(tmp_path / "a.jsonl", [{"text": "fox"}] * 3), "template": "chatml"}, "cpt")
    prepared = prepare(recipe, base, tmp_path / "cache")
    assert "data.template" in recipe.unread_keys()
    assert prepared.report.template is None


@pytest.mark.parametrize(
    "change", [{"template": "llama3"}, {"max_length": 64}, {"loss_on": "all"}, {"split": {"validation": 0.5}}]
)
def test_what_the_tokens_depend_on_makes_another_fingerprint(tmp_path, base, change):
    data = {"train": write(tmp_path / "a.jsonl", chats(4))}
    assert run(tmp_path, base, data).fingerprint != run(tmp_path, base, data | change).fingerprint


def test_what_they_do_not_depend_on_keeps_it(tmp_path, base):
    path = write(tmp_path / "a.jsonl", chats(4))
    plain = run(tmp_path, base, {"train": path})
    weighted = run(tmp_path, base, {"train": {"path": path, "weight": 2.0}, "packing": False})
    assert plain.fingerprint == weighted.fingerprint


def test_a_damaged_cache_is_built_again(tmp_path, base):
    data = {"train": write(tmp_path / "a.jsonl", chats(4))}
    prepared = run(tmp_path, base, data)
    tokens = prepared.train.folder / "tokens.npy"
    whole = tokens.read_bytes()
    tokens.write_bytes(whole[:-1])
    with pytest.raises(DataError, match="missing or damaged"):
        open_prepared(tmp_path / "cache", prepared.fingerprint)
    assert (run(tmp_path, base, data).train.folder / "tokens.npy").read_bytes() == whole


def test_a_bad_row_stops_the_run_and_is_listed_with_file_line_and_reason(tmp_path, base):
    rows = [*chats(3), "{bad", {"messages": []}, {"other": 1}, {"messages": [{"role": "user", "content": "a"}]}]
    path = write(tmp_path / "a.jsonl", rows)
    with pytest.raises(DataError) as caught:
        run(tmp_path, base, {"train": path})
    message = str(caught.value)
    assert caught.value.exit_code == 2
    assert "4 of 7 rows cannot be used, and data.max_bad_rows: 0 allows 0" in message
    assert f"{path}:4: invalid JSON" in message
    assert f"{path}:5: `messages` is empty" in message
    assert f"{path}:6: no `messages` (columns: other)" in message
    assert f"{path}:7: no assistant turn" in message
    assert not list((tmp_path / "cache").glob("*/MANIFEST.json"))


def test_only_the_first_ten_bad_rows_are_listed(tmp_path, base):
    with pytest.raises(DataError, match=r"… and 15 more"):
        run(tmp_path, base, {"train": write(tmp_path / "a.jsonl", [*chats(3), *["{"] * 25])})


@pytest.mark.parametrize("budget", [2, 0.5])
def test_within_the_budget_bad_rows_go_to_quarantine(tmp_path, base, budget):
    path = write(tmp_path / "a.jsonl", [*chats(3), "{", {"messages": []}])
    prepared = run(tmp_path, base, {"train": path, "max_bad_rows": budget})
    source = prepared.report.sources[0]
    assert (source.rows, source.used, source.bad) == (5, 3, 2)
    entries = [json.loads(line) for line in prepared.quarantine.read_text().splitlines()]
    assert [(entry["file"], entry["line"], entry["row"]) for entry in entries] == [
        (path, 4, None),
        (path, 5, {"messages": []}),
    ]
    assert prepared.report.skipped_rows == 2


def test_half_a_surrogate_pair_is_a_bad_row(tmp_path, base):
    path = write(tmp_path / "a.jsonl", [{"text": "fox"}, '{"text": "\\ud83d"}', {"text": "dog"}])
    prepared = run(tmp_path, base, {"train": path, "max_bad_rows": 1}, "cpt")
    assert [row.reason for row in prepared.report.bad_rows] == ["invalid Unicode: half of a surrogate pair"]


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([], "is empty"),
        (["{", "["], "none of the first 2 rows"),
        ([{"question": "a"}], "the columns question are no known format"),
        ([{"messages": []}] * 3, "3 of 3 rows cannot be used"),
        ([{"text": "fox"}], r"trains the assistant's words: there is no assistant\nUse objective: cpt"),
    ],
)
def test_data_that_cannot_be_trained_on_are_refused(tmp_path, base, rows, message):
    with pytest.raises(DataError, match=message):
        run(tmp_path, base, {"train": write(tmp_path / "a.jsonl", rows)})


def test_no_usable_row_is_an_error_within_any_budget(tmp_path, base):
    path = write(tmp_path / "a.jsonl", [{"messages": []}] * 3)
    with pytest.raises(DataError, match=r"no row of .* can be used"):
        run(tmp_path, base, {"train": path, "max_bad_rows": 100})


def test_long_rows_are_truncated_and_counted(tmp_path, base):
    path = write(tmp_path / "a.jsonl", [*chats(3), *chats(2, words=100)])
    prepared = run(tmp_path, base, {"train": path, "max_length": 50, "split": {"validation": 0}})
    assert prepared.report.sources[0].truncated == 2
    assert prepared.train.lengths.max() == 50
    assert prepared.train.cut.tolist() == [False] * 3 + [True] * 2


def test_the_pieces_of_a_long_document_go_to_the_same_split(tmp_path, base):
    rows = [{"text": f"{number} " + "lazy dog " * 60} for number in range(10)]
    data = {"train": write(tmp_path / "a.jsonl", rows), "max_length": 32, "split": {"validation": 0.3}}
    prepared = run(tmp_path, base, data, "cpt")
    assert prepared.report.sources[0].split == 10
    assert len(set(prepared.validation.line)) == 3
    assert not set(prepared.validation.line) & set(prepared.train.line)


def test_rows_dropped_for_their_length_are_not_listed_as_bad(tmp_path, base):
    rows = [*chats(4), {"messages": [{"role": "user", "content": "no answer"}]}]
    rows.insert(0, {"messages": [{"role": "user", "content": "?"}, {"role": "assistant", "content": "long " * 200}]})
    path = write(tmp_path / "a.jsonl", rows)
    with pytest.raises(DataError, match="1 of 6 rows cannot be used") as caught:
        run(tmp_path, base, {"train": path, "template": "chatml", "long_rows": "drop", "max_length": 100})
    assert "a.jsonl:6: no assistant turn" in str(caught.value)
    assert "a.jsonl:1:" not in str(caught.value)


def test_a_length_beyond_the_context_is_refused_if_asked_for_and_cut_if_not(tmp_path, base):
    path = write(tmp_path / "a.jsonl", chats(3))
    with pytest.raises(DataError, match="max_length: 600 is more than the 512 tokens that tiny can take"):
        run(tmp_path, base, {"train": path, "max_length": 600})
    prepared = run(tmp_path, base, {"train": path})
    assert prepared.max_length == 512
    assert "the context of tiny" in "\n".join(prepared.report.lines())


def test_validation_sources_of_their_own_leave_the_share_unread_and_leaks_are_counted(tmp_path, base):
    data = {
        "train": [write(tmp_path / "a.jsonl", chats(4)), write(tmp_path / "b.jsonl", chats(2, words=2))],
        "validation": write(tmp_path / "v.jsonl", [*chats(1), *chats(3, words=3)]),
        "split": {"validation": 0.2},
    }
    recipe = recipe_of(data)
    prepared = prepare(recipe, base, tmp_path / "cache")
    assert (len(prepared.train), len(prepared.validation)) == (6, 4)
    assert prepared.train.source.tolist() == [0] * 4 + [1] * 2
    assert prepared.report.leaked_rows == 1
    assert recipe.unread_keys().count("data.split.validation") == 1
    assert set(prepared.files) == {*data["train"], data["validation"]}


def test_preparing_imports_nothing_heavy_and_a_cached_set_opens_without(tmp_path, base):
    data = {"train": write(tmp_path / "a.jsonl", chats(4))}
    code = f"""
import sys
from pathlib import Path
from tunesmith.cluster.recipe.schema import Recipe
from tunesmith.cluster.base import BaseRef
from tunesmith.trainers.data.prepare import prepare
heavy = {{"torch", "transformers", "datasets", "ray", "deepspeed", "pyarrow"}}
assert not heavy & set(sys.modules), heavy & set(sys.modules)
if len(sys.argv) > 1:
    recipe = Recipe.model_validate({recipe_of(data).model_dump(exclude_unset=True)!r})
    prepared = prepare(recipe, {base!r}, Path({str(tmp_path / "cache")!r}))
    prepared.train.example(0)
    assert not heavy & set(sys.modules), heavy & set(sys.modules)
"""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    subprocess.run([sys.executable, "-c", code], check=True, env=environment)
    run(tmp_path, base, data)
    subprocess.run([sys.executable, "-c", code, "cached"], check=True, env=environment)
