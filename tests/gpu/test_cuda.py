"""What only a CUDA device can show: FlashAttention over segments equals the plain mask, and the loop trains on NCCL."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from tiny import KINDS, Rows, tiny_model
from tiny_models import make
from trainings import write_rows

from tunesmith.trainers import attention
from tunesmith.trainers.objectives.likelihood import negative_log_likelihood
from tunesmith.trainers.policy import Policy, score

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device on this machine"),
]
CUDA = torch.device("cuda")


@pytest.mark.parametrize("kind", KINDS)
def test_flash_attention_equals_the_plain_mask(kind: str) -> None:
    """In bf16 the two differ by rounding alone: each is compared with the plain mask in fp32."""
    batch = Rows([17, 5, 1, 23, 9, 140]).batch().to(CUDA)
    model = tiny_model(kind, head_dim=16).to(CUDA)
    exact = Policy(copy.deepcopy(model), attention.REFERENCE)
    found = {path: Policy(copy.deepcopy(model).bfloat16(), path) for path in (attention.REFERENCE, attention.VARLEN)}
    wanted = score(exact, batch).logps
    errors = {path: (score(policy, batch).logps - wanted).abs().max().item() for path, policy in found.items()}
    assert errors[attention.VARLEN] <= 2 * errors[attention.REFERENCE] + 1e-3
    gradients = {}
    for path, policy in found.items():
        negative_log_likelihood(score(policy, batch).logps, batch)[0].backward()
        gradients[path] = torch.cat([p.grad.float().flatten() for p in policy.parameters() if p.grad is not None])
    plain, flash = gradients[attention.REFERENCE], gradients[attention.VARLEN]
    assert (plain - flash).norm() <= 2e-2 * plain.norm()


@pytest.mark.parametrize("adaptation", ["full", "lora"])
@pytest.mark.parametrize("zero", [0, 2, 3])
def test_a_recipe_trains_on_one_gpu(tmp_path: Path, adaptation: str, zero: int) -> None:
    make("llama", tmp_path / "llama", head_dim=16)
    write_rows(tmp_path / "rows.jsonl")
    recipe = {
        "name": "gpu",
        "model": {"base": str(tmp_path / "llama")},
        "data": {"train": str(tmp_path / "rows.jsonl"), "max_length": 128},
        "objective": "sft",
        "adaptation": adaptation,
        "train": {"max_steps": 30, "learning_rate": 3e-3},
        "cluster": {"zero": zero},
        "output": {"dir": str(tmp_path / "runs"), "report_to": []},
    }
    (tmp_path / "gpu.yaml").write_text(yaml.safe_dump(recipe))
    command = [sys.executable, "-m", "tunesmith.cluster.main", "train", str(tmp_path / "gpu.yaml"), "--json"]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=500)
    assert ended.returncode == 0, ended.stderr
    lines = [json.loads(line) for line in (tmp_path / "runs" / "gpu" / "metrics.jsonl").read_text().splitlines()]
    assert lines[-1]["eval_loss"] < lines[0]["eval_loss"]


def _train(folder: Path, changes: dict) -> subprocess.CompletedProcess[str]:
    make("llama", folder / "llama", head_dim=16, **changes.get("model", {}))
    write_rows(folder / "rows.jsonl")
    recipe = {
        "name": "gpu",
        "model": {"base": str(folder / "llama")},
        "data": {"train": str(folder / "rows.jsonl"), "max_length": 128},
        "objective": "sft",
        "adaptation": "full",
        "train": {"max_steps": 3, **changes.get("train", {})},
        "output": {"dir": str(folder / "runs"), "report_to": []},
    }
    (folder / "gpu.yaml").write_text(yaml.safe_dump(recipe))
    command = [sys.executable, "-m", "tunesmith.cluster.main", "train", str(folder / "gpu.yaml"), "--json"]
    return subprocess.run(command, capture_output=True, text=True, timeout=500)


def test_the_plan_receipt_says_what_the_allocator_saw(tmp_path: Path) -> None:
    ended = _train(tmp_path, {"model": {"hidden_size": 512, "num_hidden_layers": 6}})
    assert ended.returncode == 0, ended.stderr
    receipt = json.loads((tmp_path / "runs" / "gpu" / "artifact" / "receipts" / "plan.json").read_text())
    assert (receipt["device"], receipt["steps"]) == ("cuda", 2)
    (worker,) = receipt["workers"]
    assert sum(worker["measured"].values()) == worker["measured_bytes"] > 0
    assert receipt["within"] <= 0.08, receipt


def test_what_does_not_fit_is_said_before_step_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a GPU's memory a process may take some megabytes only: the model fits, its largest batch does not."""
    monkeypatch.setenv("PYTORCH_CUDA_ALLOC_CONF", "per_process_memory_fraction:0.001")
    ended = _train(
        tmp_path,
        {"train": {"per_device_train_batch_size": 100}, "model": {"hidden_size": 512, "num_hidden_layers": 12}},
    )
    assert ended.returncode == 2, ended.stderr
    assert "does not fit" in ended.stderr
    metrics = tmp_path / "runs" / "gpu" / "metrics.jsonl"
    assert not metrics.exists() or not metrics.read_text()
