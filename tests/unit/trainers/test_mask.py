"""The mask receipt counts what the loop trains, shows it, and fails closed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_models

from tunesmith.cluster.artifacts import MaskReceipt
from tunesmith.cluster.errors import ReceiptError
from tunesmith.trainers.data.report import DataReport
from tunesmith.trainers.data.tokens import Piece, Spool, TokenStore
from tunesmith.trainers.receipts import mask, mask_page

TOKENIZER = tiny_models.tokenizer()
END = frozenset({TOKENIZER.eos_token_id})


def store(folder: Path, *examples: tuple[str, str], **changes: Any) -> TokenStore:
    """A store of (read, trained) text pairs; sources alternate."""
    spool = Spool(folder / "spool")
    for index, (read, trained) in enumerate(examples):
        first, second = (TOKENIZER(text, add_special_tokens=False)["input_ids"] for text in (read, trained))
        labels = np.array([False] * len(first) + [True] * len(second))
        piece = {"source": index % 2, "file": 0, "line": index + 1, "row": index, "cut": False} | changes
        spool.add([Piece(tokens=np.array(first + second), trained=labels, **piece)])
    spool.write(folder / "store", np.ones(len(examples), bool), ["chat.jsonl"])
    return TokenStore(folder / "store")


def look(at: TokenStore, ends: frozenset[int] = END) -> Any:
    return mask.inspect(at, [range(len(at))], TOKENIZER, ["a.jsonl", "b.jsonl"], ends)


def test_counts_by_source_are_those_of_the_packed_rows(tmp_path: Path) -> None:
    receipt = look(store(tmp_path, ("ask", "yes<|im_end|>"), ("a", "no<|im_end|>"), ("ask", "ok<|im_end|>")))
    assert [(s.source, s.examples, s.tokens, s.trained_tokens) for s in receipt.sources] == [
        ("a.jsonl", 2, 13, 7),
        ("b.jsonl", 1, 4, 3),
    ]
    assert (receipt.tokens, receipt.trained_tokens) == (17, 10)
    assert (receipt.assistant_turns, receipt.turns_with_trained_end, receipt.passed) == (3, 3, True)
    assert receipt.examples[0]["spans"] == [
        {"text": "ask", "trained": False, "tokens": 3},
        {"text": "yes<|im_end|>", "trained": True, "tokens": 4},
    ]


def test_an_answer_whose_end_is_not_trained_fails_and_is_named(tmp_path: Path) -> None:
    receipt = look(store(tmp_path, ("ask", "yes<|im_end|>"), ("ask", "yes")))
    assert not receipt.passed
    assert (receipt.assistant_turns, receipt.turns_with_trained_end) == (2, 1)
    assert "1 of 2 assistant turns" in receipt.problems[0]
    assert "chat.jsonl:2" in receipt.problems[0]
    assert "<|im_end|>" in receipt.problems[0]


def test_a_truncated_example_may_break_off(tmp_path: Path) -> None:
    receipt = look(store(tmp_path, ("ask", "yes"), ("ask", "no"), ("ask", "ok<|im_end|>"), cut=True))
    assert receipt.passed
    assert (receipt.cut_rows, receipt.assistant_turns, receipt.turns_with_trained_end) == (2, 1, 1)
    assert [example["cut"] for example in receipt.examples] == [True, True, False]
    shown = mask_page.page(receipt)
    assert "every trained turn ends with its end-of-turn token but for 2 rows cut at max_length." in shown
    assert shown.count("✂ cut at max_length") == 2
    assert "but for 1 row cut" in mask_page.page(receipt.model_copy(update={"cut_rows": 1}))


def test_all_tokens_trained_needs_no_turns(tmp_path: Path) -> None:
    receipt = look(store(tmp_path, ("", "plain text")), frozenset())
    assert receipt.passed
    assert "end-of-turn" not in mask_page.page(receipt)
    assert receipt.trained_tokens == 9  # the first token has no predecessor, so nothing predicts it


def test_ends_are_those_of_the_template_and_of_completions() -> None:
    report = DataReport(
        sources=[], splits={}, bad_rows=[], max_length=8, long_rows="split", loss_on="assistant", end_of_turn=7
    )
    assert mask.turn_ends(report, TOKENIZER) == {7, TOKENIZER.eos_token_id}
    assert mask.turn_ends(report.model_copy(update={"loss_on": "all"}), TOKENIZER) == frozenset()


class Data:
    """The two fields of `Prepared` that the receipt reads."""

    def __init__(self, train: TokenStore) -> None:
        self.train = train
        self.report = DataReport.model_validate(
            {
                "sources": [
                    {"path": name, "role": "train", "format": "messages", "columns": []}
                    for name in ("a.jsonl", "b.jsonl")
                ],
                "splits": {},
                "bad_rows": [],
                "max_length": 64,
                "long_rows": "truncate",
                "loss_on": "assistant",
                "end_of_turn": TOKENIZER.eos_token_id,
            }
        )


def test_nothing_trained_fails_closed_with_both_files_written(tmp_path: Path) -> None:
    data: Any = Data(store(tmp_path, ("all of it is read", "")))
    with pytest.raises(ReceiptError, match="None of 17 tokens is trained"):
        mask.write_mask_receipt(tmp_path / "receipts", data, [[0]], TOKENIZER)
    assert json.loads((tmp_path / "receipts" / "mask.json").read_text())["passed"] is False
    assert "Failed." in (tmp_path / "receipts" / "mask.html").read_text()


def test_the_page_marks_trained_text_and_escapes_it(tmp_path: Path) -> None:
    data: Any = Data(store(tmp_path, ("<b>한국어</b>", "<script>x</script><|im_end|>")))
    receipt = mask.write_mask_receipt(tmp_path / "receipts", data, [[0]], TOKENIZER)
    page = (tmp_path / "receipts" / "mask.html").read_text()
    assert "<mark>&lt;script&gt;x&lt;/script&gt;&lt;|im_end|&gt;</mark>" in page
    assert "&lt;b&gt;한국어&lt;/b&gt;" in page
    assert "<script" not in page
    assert "http" not in page
    assert MaskReceipt.model_validate_json((tmp_path / "receipts" / "mask.json").read_bytes()) == receipt
