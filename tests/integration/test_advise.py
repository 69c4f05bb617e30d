"""`tunesmith advise` on a base that knows some documents: close data, far data, and what is not here."""

from __future__ import annotations

import json
import os
import random
import shutil
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM, AutoTokenizer

from tunesmith.cluster.recipe.load import load_recipe
from tunesmith.trainers import documentation
from tunesmith.trainers.advise.rules import DIFFERENT, SIMILAR
from tunesmith.trainers.builtin import builtin_folder

DOCUMENTS = 10
LONGEST = 200  # characters


@cache
def known_documents() -> list[str]:
    texts = [text for text in documentation.documents(documentation.entries()) if len(text) >= 120]
    return [text[:LONGEST] for text in texts[:: len(texts) // DOCUMENTS][:DOCUMENTS]]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama that has read a few documents until it knows them."""
    output = tmp_path_factory.mktemp("known")
    folder = shutil.copytree(builtin_folder("tiny-llama", output), output / "base")
    (folder / "MANIFEST.json").unlink()  # it vouches for the weights before
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder)
    rows = tokenizer(known_documents(), padding=True, return_tensors="pt")
    labels = rows["input_ids"].masked_fill(rows["attention_mask"] == 0, -100)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(50):
        model(**rows, labels=labels).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(folder)
    return folder


def tunesmith(*arguments: str | Path, cwd: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "tunesmith.cluster.main", *map(str, arguments)],
        capture_output=True,
        text=True,
        cwd=cwd,
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
        timeout=300,
        check=False,
    )


def write_texts(path: Path, texts: list[str]) -> Path:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


def advised(*arguments: str | Path, cwd: Path) -> dict[str, Any]:
    done = tunesmith("advise", *arguments, "--json", cwd=cwd)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.matrix
def test_close_and_far_data_are_told_apart_and_advised_apart(base: Path, tmp_path: Path) -> None:
    letters = random.Random(0)
    far_texts = ["".join(letters.choices("abcdefghijklmnopqrstuvwxyz", k=900)) for _ in range(2600)]
    close = advised(write_texts(tmp_path / "close.jsonl", known_documents()), "--model", base, cwd=tmp_path)
    far = advised(write_texts(tmp_path / "far.jsonl", far_texts), "--model", base, cwd=tmp_path)

    assert close["loss"]["bits_per_byte"] < SIMILAR < DIFFERENT < far["loss"]["bits_per_byte"]
    assert far["loss"]["bits_per_byte"] > 4.7  # log2 of 26: nobody predicts random letters better
    assert close["loss"]["nats_per_token"] < far["loss"]["nats_per_token"]
    assert (close["advice"]["rule"], close["advice"]["way"]) == ("small and similar", "lora")
    assert (far["advice"]["rule"], far["advice"]["way"]) == ("large and different", "full")

    for advice in (close, far):
        recipe = load_recipe(tmp_path / advice["recipe"])
        assert recipe.objective.kind == "cpt"
        checked = tunesmith("train", advice["recipe"], "--dry-run", "--json", cwd=tmp_path)
        assert checked.returncode == 0, checked.stderr
        assert json.loads(checked.stdout)["workers"] == 1


@pytest.mark.matrix
def test_a_minimal_recipe_keeps_what_it_says_and_gets_what_it_lacks(base: Path, tmp_path: Path) -> None:
    rows = [{"prompt": f"{n} plus 1?", "completion": f" {n + 1}"} for n in range(60)]
    (tmp_path / "sums.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    draft = {
        "model": {"base": str(base)},
        "data": {"train": "sums.jsonl", "max_length": 128},
        "output": {"dir": "mine"},
    }
    (tmp_path / "sums.yaml").write_text(yaml.safe_dump(draft))
    done = tunesmith("advise", "sums.yaml", "--goal", "format", "--out", "out.yaml", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "out.yaml\n"
    assert "sft with LoRA of rank 8" in done.stderr
    assert "Why" in done.stderr
    assert "Warning" not in done.stderr
    recipe = load_recipe(tmp_path / "out.yaml")
    assert (recipe.name, recipe.objective.kind, recipe.adaptation.kind) == ("sums", "sft", "lora")
    assert (recipe.data.max_length, recipe.output.dir) == (128, "mine")
    again = tunesmith("advise", "sums.yaml", "--out", "out.yaml", cwd=tmp_path)
    assert again.returncode == 2
    assert "out.yaml is already there" in again.stderr


def test_a_base_that_is_not_here_is_advised_by_its_shape(tmp_path: Path) -> None:
    write_texts(tmp_path / "notes.jsonl", known_documents())
    arguments = ("notes.jsonl", "--model", "Llama-3.1-70B", "--fleet", "1xA100-80GB", "--tasks", "3")
    found = advised(*arguments, cwd=tmp_path)
    assert found["loss"] is None
    assert "not on this machine" in found["loss_missing_because"]
    assert found["facts"]["closeness"] == "unknown"
    assert (found["advice"]["rule"], found["advice"]["way"]) == ("many tasks on one base", "qlora")
    recipe = load_recipe(tmp_path / found["recipe"])
    assert (recipe.model.base, recipe.model.quantization) == ("meta-llama/Llama-3.1-70B", "nf4")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("notes.jsonl", "--model", "Lama-3.1-8B"), "Did you mean meta-llama/Llama-3.1-8B"),
        (("notes.jsonl", "--model", "Llama-3.1-8B", "--fleet", "8xH10"), "Did you mean H100-80GB"),
        (("notes.jsonl", "--model", "Llama-3.1-8B", "--goal", "knowlege"), "Did you mean knowledge?"),
        (("note.jsonl", "--model", "Llama-3.1-8B"), "In the same folder: notes.jsonl"),
        (("broken.jsonl", "--model", "Llama-3.1-8B"), "none of the first"),
        (("notes.jsonl",), "--model"),
        (("notes.jsonl", "draft.yaml", "--model", "Llama-3.1-8B"), "draft.yaml is a recipe among 2 inputs"),
        (("notes.jsonl", "--model", "Llama-3.1-70B", "--fleet", "1xT4"), "QLoRA does not fit"),
    ],
)
def test_mistakes_exit_2_with_the_nearest_names_and_write_nothing(
    arguments: tuple[str, ...], said: str, tmp_path: Path
) -> None:
    write_texts(tmp_path / "notes.jsonl", ["One note.", "Another note."])
    (tmp_path / "broken.jsonl").write_text("{no json\n")
    done = tunesmith("advise", *arguments, cwd=tmp_path)
    assert done.returncode == 2, done.stderr
    assert said in done.stderr
    assert "Traceback" not in done.stderr
    assert list(tmp_path.glob("*.yaml")) == []
