"""What the quickstart writes before it trains, and what it says afterwards."""

from __future__ import annotations

import io
import json
from dataclasses import asdict
from pathlib import Path

import pytest
from rich.console import Console

from tunesmith.cluster.recipe.load import load_recipe
from tunesmith.trainers import quickstart
from tunesmith.trainers.quickstart import Stage


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("first") / "quickstart"
    quickstart.write_inputs(folder)
    return folder


def test_the_recipes_are_valid_and_name_the_files_that_were_written(folder: Path) -> None:
    first, second = (load_recipe(folder / f"{name}.yaml") for name in ("1-documentation", "2-answers"))
    assert Path(first.data.train[0].path) == folder / "documentation.jsonl"
    assert Path(second.data.train[0].path) == folder / "questions.jsonl"
    assert second.model.base == f"run:{first.name}"
    assert first.output.dir == second.output.dir == str(folder / "runs")


def test_the_stages_are_those_that_the_quickstart_promises(folder: Path) -> None:
    first, second = (load_recipe(folder / f"{name}.yaml") for name in ("1-documentation", "2-answers"))
    chosen = [(r.objective.kind, r.adaptation.kind, r.cluster.zero, r.cluster.workers) for r in (first, second)]
    assert chosen == [("cpt", "full", 2, 2), ("sft", "lora", 3, 2)]


def test_the_data_are_texts_and_chats(folder: Path) -> None:
    texts = [json.loads(line) for line in (folder / "documentation.jsonl").read_text(encoding="utf-8").splitlines()]
    chats = [json.loads(line) for line in (folder / "questions.jsonl").read_text(encoding="utf-8").splitlines()]
    assert len(texts) > 3000
    assert len(chats) == quickstart.QUESTIONS
    assert {tuple(row) for row in texts} == {("text",)}
    assert {tuple(message["role"] for message in row["messages"]) for row in chats} == {("user", "assistant")}


def test_writing_again_changes_no_byte(folder: Path) -> None:
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    quickstart.write_inputs(folder)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_the_summary_names_losses_receipts_and_where_things_lie() -> None:
    stage = Stage("q/2-answers.yaml", "2-answers", "q/runs/2-answers/artifact", 60, 30.0, 5.5, 2.25, True, False)
    assert "5.500    2.250      60   passed   FAILED" in quickstart.summary([stage])
    for answers, is_offered in (({}, False), ({"answers": []}, True)):
        said = io.StringIO()
        quickstart.say_end(
            Path("q"), {"stages": [asdict(stage)], "seconds": 61.0, **answers}, Console(file=said, width=400)
        )
        assert "q/runs/2-answers/artifact/receipts/mask.html" in said.getvalue()
        assert "Done in 61 s" in said.getvalue()
        assert ("serve q/serve.yaml" in said.getvalue()) == is_offered
