"""The command line as a shell sees it: quick help, exit codes, and data alone on standard output."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

RECIPE = {
    "name": "bot",
    "model": {"base": "/nowhere/llama"},
    "data": {"train": "rows.jsonl"},
    "objective": "sft",
    "adaptation": "lora",
}


def tunesmith(*arguments: str, cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "tunesmith.cluster.main", *arguments],
        capture_output=True,
        text=True,
        cwd=cwd,
        env={**os.environ, **environment},
        timeout=60,
    )


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(RECIPE))
    return tmp_path / "recipe.yaml"


def test_help_answers_in_under_half_a_second(tmp_path: Path):
    seconds = []
    for _ in range(5):
        began = time.perf_counter()
        assert tunesmith("--help", cwd=tmp_path).returncode == 0
        seconds.append(time.perf_counter() - began)
    assert min(seconds) < 0.5, seconds


def test_help_imports_nothing_heavy(tmp_path: Path):
    code = (
        "import sys, tunesmith.cluster.main\n"
        "heavy = {'torch', 'ray', 'transformers', 'deepspeed', 'pydantic', 'yaml', 'rich', 'numpy'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    assert subprocess.run([sys.executable, "-c", code], cwd=tmp_path).returncode == 0


def test_a_valid_recipe_is_said_to_be_and_printed_resolved_as_json(recipe: Path):
    plain = tunesmith("validate", str(recipe), cwd=recipe.parent)
    assert plain.returncode == 0
    assert plain.stdout == ""
    assert "valid recipe" in plain.stderr
    assert "`tunesmith train --dry-run` also checks the model" in plain.stderr
    as_json = tunesmith("validate", str(recipe), "--set", "train.epochs=2", "--json", cwd=recipe.parent)
    assert json.loads(as_json.stdout)["recipe"]["train"]["epochs"] == 2


def test_a_misspelt_key_exits_2_with_its_line_and_no_traceback(recipe: Path):
    recipe.write_text(recipe.read_text() + "trian: {epochs: 1}\n")
    done = tunesmith("validate", str(recipe), cwd=recipe.parent)
    assert done.returncode == 2
    assert "error: " in done.stderr
    assert "trian" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_required_key_that_is_misspelt_is_one_mistake(recipe: Path):
    recipe.write_text(recipe.read_text().replace("model:", "modle:"))
    said = tunesmith("validate", str(recipe), cwd=recipe.parent).stderr
    assert "did you mean model?" in said
    assert "missing" not in said
    recipe.write_text(recipe.read_text().replace("modle:", "zebra:"))
    said = tunesmith("validate", str(recipe), cwd=recipe.parent).stderr
    assert "zebra: no such key" in said
    assert "model: missing" in said


def test_debugging_shows_the_traceback_of_a_user_error(recipe: Path):
    done = tunesmith("validate", str(recipe) + "x", cwd=recipe.parent, TUNESMITH_DEBUG="1")
    assert done.returncode == 2
    assert "Traceback" in done.stderr


def test_a_missing_model_exits_2_and_leaves_no_run(recipe: Path):
    done = tunesmith("train", str(recipe), "--json", cwd=recipe.parent)
    assert done.returncode == 2, done.stderr
    assert "/nowhere/llama" in done.stderr
    assert done.stdout == ""
    assert not (recipe.parent / "runs" / "bot").exists()


def test_a_wrong_option_exits_2(recipe: Path):
    assert tunesmith("train", str(recipe), "--jsn", cwd=recipe.parent).returncode == 2
