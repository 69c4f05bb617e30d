"""The fingerprint counts every trained answer as a request would, and gives no row away."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import tiny_models

from tunesmith.cluster.artifacts import FingerprintReceipt
from tunesmith.cluster.sketch import BUCKETS, FEATURES
from tunesmith.trainers.data.tokens import Piece, Spool, TokenStore
from tunesmith.trainers.receipts import fingerprint as module
from tunesmith.trainers.receipts.fingerprint import FEWEST, fingerprint

TOKENIZER = tiny_models.tokenizer()


def store(folder: Path, rows: list[list[tuple[str, bool]]]) -> TokenStore:
    """A store of rows of (text, trained) turns."""
    spool = Spool(folder / "spool")
    for index, turns in enumerate(rows):
        parts = [(TOKENIZER(text, add_special_tokens=False)["input_ids"], trained) for text, trained in turns]
        tokens = np.array([token for ids, _ in parts for token in ids])
        labels = np.array([trained for ids, trained in parts for _ in ids])
        spool.add([Piece(tokens, labels, source=0, file=0, line=index + 1, row=index, cut=False)])
    spool.write(folder / "store", np.ones(len(rows), bool), ["chat.jsonl"])
    return TokenStore(folder / "store")


def tokens_of(text: str) -> int:
    return len(TOKENIZER(text, add_special_tokens=False)["input_ids"])


def test_every_trained_turn_is_an_answer_after_all_that_precedes_it(tmp_path: Path) -> None:
    rows = [[("first?", False), ("yes", True), ("second?", False), ("I'm sorry, no", True)]] * FEWEST
    receipt = fingerprint(store(tmp_path, rows), TOKENIZER)
    assert receipt.answers == receipt.all_answers == 2 * FEWEST
    before_second = sum(map(tokens_of, ("first?", "yes", "second?")))
    assert sum(receipt.prompt_tokens) == FEWEST * (tokens_of("first?") + before_second)
    assert sum(receipt.answer_tokens) == FEWEST * (tokens_of("yes") + tokens_of("I'm sorry, no"))
    assert sorted(n for n in receipt.answer_lengths if n) == [FEWEST, FEWEST]
    assert receipt.refusals == FEWEST


def test_text_that_is_trained_whole_has_no_prompts_and_no_noise_of_them(tmp_path: Path) -> None:
    receipt = fingerprint(store(tmp_path, [[(f"plain text {n}", True)] for n in range(FEWEST)]), TOKENIZER)
    assert sum(receipt.prompt_tokens) == 0
    assert receipt.noise["prompt_tokens"] == []
    assert [one.answers for one in receipt.noise["answer_tokens"]] == list(module.SIZES)


def test_noise_falls_as_samples_grow_and_is_greater_between_samples(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    rows = [[("ask", False), (" ".join(random.choice(["a", "b", "cat"], 5)), True)] for _ in range(200)]
    receipt = fingerprint(store(tmp_path, rows), TOKENIZER)
    for name in ("answer_length", "answer_tokens", "embedding"):
        means = [one.mean for one in receipt.noise[name]]
        assert means == sorted(means, reverse=True)
        assert all(
            pair.mean > one.mean for pair, one in zip(receipt.window_noise[name], receipt.noise[name], strict=True)
        )
    assert set(receipt.noise) == set(FEATURES)


def test_too_few_answers_have_no_sums_to_read_back(tmp_path: Path) -> None:
    receipt = fingerprint(store(tmp_path, [[("ask", False), ("a secret", True)]] * (FEWEST - 1)), TOKENIZER)
    assert receipt == FingerprintReceipt(problem=receipt.problem, answers=FEWEST - 1, all_answers=FEWEST - 1)
    assert str(FEWEST - 1) in receipt.problem


def test_a_token_of_few_answers_is_not_named_however_frequent(tmp_path: Path) -> None:
    rare = "zebra " * 50
    rows = [[("ask", False), ("yes", True)]] * (2 * FEWEST) + [[("ask", False), (rare, True)]]
    receipt = fingerprint(store(tmp_path, rows), TOKENIZER)
    named = TOKENIZER.decode(list(receipt.top_tokens))
    assert set(receipt.top_tokens) == set(TOKENIZER("yes", add_special_tokens=False)["input_ids"])
    assert "z" not in named


def test_the_order_of_rows_and_of_tokens_is_lost(tmp_path: Path) -> None:
    rows = [[("ask", False), (" ".join(f"{n}" for n in range(k, k + 4)), True)] for k in range(FEWEST)]
    one = fingerprint(store(tmp_path / "a", rows), TOKENIZER)
    other = fingerprint(store(tmp_path / "b", rows[::-1]), TOKENIZER)
    sums = {"prompt_lengths", "answer_lengths", "prompt_tokens", "answer_tokens", "top_tokens", "refusals", "answers"}
    assert one.model_dump(include=sums) == other.model_dump(include=sums)


def test_long_data_sets_are_looked_at_in_evenly_spaced_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MOST_ROWS", 50)
    rows = [[("ask", False), ("yes" if n < 250 else "absolutely not", True)] for n in range(500)]
    receipt = fingerprint(store(tmp_path, rows), TOKENIZER)
    assert (receipt.answers, receipt.all_answers) == (50, 500)
    assert sorted(n for n in receipt.answer_lengths if n) == [25, 25]


def test_the_file_is_small_and_the_same_each_time(tmp_path: Path) -> None:
    at = store(tmp_path, [[("ask me", False), (f"answer {n}", True)] for n in range(100)])
    text = fingerprint(at, TOKENIZER).model_dump_json()
    assert text == fingerprint(at, TOKENIZER).model_dump_json()
    assert len(text) < 60_000
    assert len(json.loads(text)["prompt_tokens"]) == BUCKETS
