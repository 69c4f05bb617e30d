"""An adapter is held against its training and its base, a whole model against its training alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import tiny_adapters
from tiny_models import tokenizer

from tunesmith.cluster.artifacts import ParityRows, ScoredRow
from tunesmith.cluster.errors import UsageError
from tunesmith.cluster.storage import commit_folder
from tunesmith.serving.certify import Service, certify
from tunesmith.serving.certify_command import described

TRAINED = -0.5
ROW = ScoredRow(tokens=[1, 2, 3], positions=[1, 2], logprobs=[TRAINED, TRAINED])


def artifact(folder: Path, is_adapter: bool) -> Path:
    """A signed artifact with one row."""
    with commit_folder(folder, {"kind": "artifact"}) as temporary:
        if is_adapter:
            tiny_adapters.plain(temporary)
            for name in ("chat_template.jinja", "tokenizer_config.json"):
                (temporary / name).unlink()
        tokenizer().save_pretrained(temporary)
        (temporary / "receipts").mkdir()
        rows = ParityRows(tolerance_mean=0.01, tolerance=0.1, rows=[ROW])
        (temporary / "receipts" / "parity_rows.json").write_text(rows.model_dump_json())
    return folder


class Fake(Service):
    """Of one base, `tiny`, and one adapter on it, `bot`.

    Args:
        trained: the log-probabilities that each gives.
    """

    def __init__(self, **trained: float) -> None:
        self.trained = trained

    def models(self) -> list[str]:
        return [*self.trained]

    def scores(self, model: str, tokens: list[int]) -> tuple[list[float | None], dict[str, str]]:
        version = "none" if model == "tiny" else "f" * 64
        headers = {"x-tunesmith-base": tiny_adapters.BASE_DIGEST, "x-tunesmith-version": version}
        return [None, *[self.trained[model]] * (len(tokens) - 1)], headers

    def tokens(self, model: str, messages: list[dict[str, str]]) -> list[int]:
        made: Any = tokenizer().apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
        return made


def test_a_whole_model_is_held_against_its_training_without_a_base(tmp_path: Path) -> None:
    whole = artifact(tmp_path / "whole", False)
    receipt = certify(whole, Fake(tiny=TRAINED), "tiny", None)
    assert receipt.passed, receipt.problems
    assert receipt.base_difference is None
    assert described(receipt).startswith("tiny (the base alone) answers as it was trained: 2 tokens of 1 held-out rows")
    failed = certify(whole, Fake(tiny=TRAINED - 1), "tiny", None)
    assert [problem.partition(" from")[0] for problem in failed.problems] == ["log-probabilities differ"]


def test_a_whole_model_has_no_base_to_be_named(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="is a whole model, not an adapter: there is no base beside it") as error:
        certify(artifact(tmp_path / "whole", False), Fake(tiny=TRAINED), "tiny", "tiny")
    assert error.value.exit_code == 2


def test_an_adapter_is_held_against_its_base_too(tmp_path: Path) -> None:
    adapter = artifact(tmp_path / "adapter", True)
    receipt = certify(adapter, Fake(tiny=-2.0, bot=TRAINED), "bot", None)
    assert receipt.passed, receipt.problems
    assert receipt.base_difference == pytest.approx(1.5)
    same = certify(adapter, Fake(tiny=TRAINED, bot=TRAINED), "bot", None)
    assert same.problems == ["bot answers as its base tiny: the adapter has no effect"]
    alone = certify(adapter, Fake(bot=TRAINED), "bot", None)
    assert alone.problems[0].startswith("no model of the service is the base alone")
