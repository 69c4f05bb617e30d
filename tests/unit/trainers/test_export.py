"""Saved weights load with plain Transformers and PEFT as the model that was trained; the parity receipt says so."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import tiny_models
import torch
from peft import AutoPeftModelForCausalLM
from transformers import AutoModelForCausalLM, AutoTokenizer

from tunesmith.cluster.base import BaseRef
from tunesmith.cluster.recipe.schema import Recipe
from tunesmith.trainers import attention, export, models
from tunesmith.trainers.base import resolve_base
from tunesmith.trainers.data.prepare import Prepared, prepare
from tunesmith.trainers.policy import Policy, score
from tunesmith.trainers.receipts import parity

CPU = torch.device("cpu")


class Tuned:
    """A tiny model, really tuned for a few steps without DeepSpeed."""

    def __init__(self, folder: Path, kind: str, adaptation: str, quantization: str | None, dtype: torch.dtype) -> None:
        rows = [
            {"messages": [{"role": "user", "content": f"{n}?"}, {"role": "assistant", "content": "yes " * n}]}
            for n in range(1, 9)
        ]
        (folder / "chat.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        base = tiny_models.make(kind, folder / "base")
        self.recipe = Recipe.model_validate(
            {
                "name": "t",
                "model": {"base": str(base), "quantization": quantization},
                "data": {"train": str(folder / "chat.jsonl"), "max_length": 96, "split": {"validation": 0.4}},
                "objective": "sft",
                "adaptation": adaptation,
            }
        )
        self.base: BaseRef = resolve_base(str(base), None, folder)
        self.data: Prepared = prepare(self.recipe, self.base, folder / "cache")
        model = models.build(self.recipe, self.base, device=CPU, dtype=dtype, zero3=False)
        self.dtype, self.quantization = dtype, quantization
        self.policy = Policy(model, attention.REFERENCE)
        self.model: Any = self.policy.model
        self.name, self.store, self.rows = parity.choose_rows(self.data, 3)

    def train(self) -> None:
        from tunesmith.trainers.batch import collate

        trainable = [p for p in self.policy.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(trainable, lr=2e-2)
        for _ in range(3):
            logps, _aux = score(self.policy, collate(self.data.train, [[0, 1]], 1.0))
            (-logps.mean()).backward()
            optimizer.step()
            optimizer.zero_grad()

    def save(self, folder: Path) -> Path:
        folder.mkdir()
        wanted = export._is_adapter if hasattr(self.model, "peft_config") else export._is_any
        export.save_weights(self.model, export.whole_weights(self.model, wanted), folder, self.data.report.end_of_turn)
        export.save_tokenizer(self.base, self.data.report.chat_template, folder)
        return folder

    def receipt(self, artifact: Path) -> Any:
        trained = parity.training_logps(self.policy, self.store, self.rows, 96, CPU)
        return parity.compare(
            trained,
            artifact,
            self.base,
            self.store,
            self.rows,
            quantization=self.quantization,
            dtype=self.dtype,
            device=CPU,
        )


CASES = [
    ("llama", "full", None, torch.float32),
    ("tied", "full", None, torch.bfloat16),
    ("mixtral", "full", None, torch.float32),
    ("qwen3_moe", "full", None, torch.float32),
    ("llama", "lora", None, torch.float32),
    ("llama", "lora", None, torch.bfloat16),
    ("mixtral", "lora", None, torch.float32),
    ("qwen3_moe", "lora", None, torch.float32),
    ("llama", "lora", "nf4", torch.float32),
    ("llama", "lora", "nf4", torch.bfloat16),
    ("llama", "lora", "int8", torch.float32),
    ("llama", "lora", "int8", torch.bfloat16),
]


@pytest.mark.parametrize(("kind", "adaptation", "quantization", "dtype"), CASES)
def test_the_artifact_is_the_model_that_was_trained(
    tmp_path: Path, kind: str, adaptation: str, quantization: str | None, dtype: torch.dtype
) -> None:
    tuned = Tuned(tmp_path, kind, adaptation, quantization, dtype)
    tuned.train()
    artifact = tuned.save(tmp_path / "artifact")
    receipt = tuned.receipt(artifact)
    assert receipt.passed, receipt
    assert set(receipt.differences) == ({"artifact", "merged"} if adaptation == "lora" else {"artifact"})
    assert receipt.base_difference > 0.01
    assert (receipt.rows, tuned.name) == (3, "validation")
    if dtype == torch.float32 and quantization != "int8":
        assert max(receipt.differences.values()) < 1e-4
    elif adaptation == "full":
        saved = AutoModelForCausalLM.from_pretrained(artifact, dtype="auto")
        assert saved.dtype == torch.bfloat16
        assert all(torch.equal(p, saved.get_parameter(name)) for name, p in tuned.model.named_parameters())


@pytest.mark.parametrize("adaptation", ["full", "lora"])
def test_an_untuned_model_fails_the_receipt(tmp_path: Path, adaptation: str) -> None:
    tuned = Tuned(tmp_path, "llama", adaptation, None, torch.float32)
    receipt = tuned.receipt(tuned.save(tmp_path / "artifact"))
    assert not receipt.passed
    assert "the tuned model is its base" in receipt.problems[0]
    assert receipt.base_difference == 0.0


@pytest.mark.parametrize("adaptation", ["full", "lora"])
def test_other_weights_than_those_trained_fail_the_receipt(tmp_path: Path, adaptation: str) -> None:
    tuned = Tuned(tmp_path, "llama", adaptation, None, torch.float32)
    tuned.train()
    artifact = tuned.save(tmp_path / "artifact")
    tuned.train()
    receipt = tuned.receipt(artifact)
    assert not receipt.passed
    assert "differ from the training forward" in receipt.problems[0]


def test_plain_tools_load_the_folder_and_find_the_template(tmp_path: Path) -> None:
    tuned = Tuned(tmp_path, "llama", "lora", None, torch.float32)
    artifact = tuned.save(tmp_path / "artifact")
    assert AutoPeftModelForCausalLM.from_pretrained(artifact).peft_config["default"].r == 16
    tokenizer = AutoTokenizer.from_pretrained(artifact)
    assert tokenizer.chat_template == tuned.data.report.chat_template
    settings = json.loads((artifact / "adapter_config.json").read_text())
    assert settings["base_model_name_or_path"] == tuned.base.path
    assert settings["target_modules"] == sorted(settings["target_modules"])
    assert settings["inference_mode"] is True


def test_a_whole_model_carries_no_trace_of_our_attention_and_stops_at_the_end_of_turn(tmp_path: Path) -> None:
    tuned = Tuned(tmp_path, "llama", "full", None, torch.float32)
    artifact = tuned.save(tmp_path / "artifact")
    assert "tunesmith" not in (artifact / "config.json").read_text()
    stops = json.loads((artifact / "generation_config.json").read_text())["eos_token_id"]
    assert tuned.data.report.end_of_turn in (stops if isinstance(stops, list) else [stops])
