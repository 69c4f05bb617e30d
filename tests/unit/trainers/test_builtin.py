"""The builtin models are plain Hugging Face folders, bit-identical each time, built without torch."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from tunesmith.cluster.artifacts import read_manifest, verify
from tunesmith.cluster.errors import ModelError
from tunesmith.trainers import builtin


@pytest.fixture(scope="module")
def output(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("runs")


@pytest.mark.parametrize("name", builtin.SHAPES)
def test_transformers_loads_every_weight_and_nothing_is_missing(output: Path, name: str) -> None:
    folder = builtin.builtin_folder(name, output)
    model, report = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(report.values()), report
    logits = model(input_ids=torch.arange(8)[None]).logits
    assert logits.shape == (1, 8, builtin.VOCABULARY)
    assert torch.isfinite(logits).all()


def test_the_tokenizer_gives_back_any_text(output: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(builtin.builtin_folder("tiny-llama", output))
    text = "def f(x):\n\treturn 'naïve 한국어 🎈'  # <|im_start"
    ids = tokenizer(text)["input_ids"]
    assert tokenizer.decode(ids) == text
    assert len(tokenizer) == builtin.VOCABULARY
    assert [tokenizer.eos_token, tokenizer.pad_token, tokenizer.bos_token] == ["<|endoftext|>", "<|pad|>", None]


def test_the_chat_template_marks_the_answer_and_its_end_of_turn(output: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(builtin.builtin_folder("tiny-llama", output))
    chat = [{"role": "user", "content": "Why?"}, {"role": "assistant", "content": "Because."}]
    rendered = tokenizer.apply_chat_template(chat, return_dict=True, return_assistant_tokens_mask=True)
    pairs = zip(rendered["input_ids"], rendered["assistant_masks"], strict=True)
    assert tokenizer.decode([token for token, trained in pairs if trained]) == "Because.<|im_end|>"


def test_a_folder_is_whole_signed_and_built_once(output: Path) -> None:
    folder = builtin.builtin_folder("tiny-llama", output)
    built = (folder / "model.safetensors").stat().st_mtime_ns
    verify(folder)
    assert read_manifest(folder).kind == "builtin"
    assert builtin.builtin_folder("tiny-llama", output) == folder
    assert (folder / "model.safetensors").stat().st_mtime_ns == built


def test_building_twice_gives_the_same_bytes_and_never_imports_torch(output: Path, tmp_path: Path) -> None:
    program = (
        "import sys; from tunesmith.trainers.builtin import builtin_folder;"
        "builtin_folder('tiny-llama', sys.argv[1]); assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", program, str(tmp_path)], check=True)
    first = read_manifest(builtin.builtin_folder("tiny-llama", output))
    assert read_manifest(builtin.builtin_folder("tiny-llama", tmp_path)).files == first.files


def test_an_unknown_name_is_answered_with_the_known_ones(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"did you mean builtin:tiny-llama\?") as error:
        builtin.builtin_folder("tiny-lama", tmp_path)
    assert "builtin:tiny-mixtral" in str(error.value)
    assert list(tmp_path.iterdir()) == []
