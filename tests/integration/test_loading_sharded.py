"""The same model on every rank and ZeRO stage: first weights, losses, frozen bits, and the artifact at the end."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
import tiny_models
import torch
import torch.distributed as dist
from workers import run_workers

from tunesmith.cluster.artifacts import ParityReceipt, verify
from tunesmith.cluster.base import BaseRef
from tunesmith.cluster.recipe.schema import Recipe
from tunesmith.cluster.runs import RunFolder
from tunesmith.trainers.base import resolve_base
from tunesmith.trainers.batch import Forest
from tunesmith.trainers.data.prepare import Prepared, open_prepared, prepare

WORKERS = 2
STEPS = 3
CASES: dict[str, dict[str, Any]] = {
    "full, tied embeddings": {"kind": "tied", "adaptation": "full"},
    "LoRA in bf16": {"kind": "llama", "adaptation": "lora", "precision": "bf16"},
    "QLoRA": {"kind": "llama", "adaptation": "lora", "quantization": "nf4"},
    "QLoRA in bf16": {"kind": "llama", "adaptation": "lora", "quantization": "nf4", "precision": "bf16"},
    "Mixtral, full": {"kind": "mixtral", "adaptation": "full"},
    "Qwen3-MoE, LoRA": {"kind": "qwen3_moe", "adaptation": "lora", "checkpointing": False},
}


def recipe(folder: Path, name: str, stage: int) -> Recipe:
    case = CASES[name]
    return Recipe.model_validate(
        {
            "name": "t",
            "model": {"base": str(folder / case["kind"]), "quantization": case.get("quantization")},
            "data": {"train": str(folder / "chat.jsonl"), "max_length": 96, "split": {"validation": 0.4}},
            "objective": "sft",
            "adaptation": case["adaptation"],
            "train": {
                "learning_rate": 1e-2,
                "gradient_checkpointing": case.get("checkpointing", True),
                "precision": case.get("precision", "fp32"),
            },
            "cluster": {"workers": WORKERS, "zero": stage, "zero3_persistence_threshold": 0},
        }
    )


def work(folder: Path, names: list[str]) -> None:
    """A worker's life: every case and stage in turn; writes what it saw."""
    seen: dict[str, Any] = {}
    for name in names:
        base = resolve_base(str(folder / CASES[name]["kind"]), None, folder)
        data = open_prepared(folder / "cache", (folder / f"{CASES[name]['kind']}.key").read_text())
        seen[name] = {stage: train_a_little(folder, name, stage, base, data) for stage in (0, 2, 3)}
        (folder / f"seen-{dist.get_rank()}.json").write_text(json.dumps(seen))


def train_a_little(folder: Path, name: str, stage: int, base: BaseRef, data: Prepared) -> dict[str, Any]:
    """Builds the engine of one stage, trains a few steps, evaluates, and says what became of the weights."""
    from tunesmith.trainers import export
    from tunesmith.trainers.engine import build_engine

    torch.manual_seed(100 * dist.get_rank() + stage)
    engine = build_engine(recipe(folder, name, stage), base, torch.device("cpu"))
    first, frozen = bits(engine.module, True), bits(engine.module, False)
    sharded = [hasattr(p, "ds_id") and p.ds_tensor.numel() < p.ds_numel for p in engine.module.parameters()]
    losses = []
    for step in range(STEPS):
        # each rank repeats a byte of its own, so that their routers choose apart
        tokens = torch.full((24,), 65 + 20 * dist.get_rank() + step)
        at, forest = torch.arange(23), Forest.flat([24])
        logps, aux = engine(tokens, forest.position_ids(), forest, at, tokens[at + 1])
        loss = -logps.mean() + (aux if aux is not None else 0.0)
        engine.backward(loss)
        engine.step()
        losses.append(loss.item())
    run = RunFolder(folder / name / str(stage))
    receipt = export.write_artifact(engine, recipe(folder, name, stage), base, run, data, torch.device("cpu"))
    outcome = {
        "first": first,
        "losses": losses,
        "sharded": sum(sharded) / len(sharded),
        "frozen_kept": frozen == bits(engine.module, False),
        "trained_changed": first != bits(engine.module, True),
        "parity": receipt.model_dump(),
    }
    engine.destroy()
    return outcome


def bits(model: Any, trained: bool) -> str:
    """Hash of the raw bytes of all trained, or all frozen, parameters. Collective."""
    from tunesmith.trainers import export

    weights = export.whole_weights(model, lambda _, parameter: parameter.requires_grad == trained)
    digest = hashlib.sha256()
    for name, tensor in weights.items():
        digest.update(name.encode() + tensor.contiguous().view(torch.uint8).numpy().tobytes())
    found = [digest.hexdigest()]
    dist.broadcast_object_list(found)
    return found[0]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where two real gloo workers have run every case at every stage."""
    folder = tmp_path_factory.mktemp("sharded")
    rows = [
        {"messages": [{"role": "user", "content": f"{n}?"}, {"role": "assistant", "content": "yes " * n}]}
        for n in range(1, 9)
    ]
    (folder / "chat.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for name, case in CASES.items():
        base = tiny_models.make(case["kind"], folder / case["kind"])
        prepared = prepare(recipe(folder, name, 0), resolve_base(str(base), None, folder), folder / "cache")
        (folder / f"{case['kind']}.key").write_text(prepared.fingerprint)
    run_workers(WORKERS, work, folder, list(CASES))
    return folder


@pytest.fixture(scope="module")
def ranks(folder: Path) -> list[dict[str, Any]]:
    """What each worker saw, by case and stage."""
    return [json.loads((folder / f"seen-{rank}.json").read_text()) for rank in range(WORKERS)]


@pytest.mark.parametrize("name", CASES)
def test_stages_start_alike_train_alike_and_leave_frozen_bits_alone(ranks: list[dict[str, Any]], name: str) -> None:
    assert len({seen["first"] for rank in ranks for seen in rank[name].values()}) == 1
    coarse = "quantization" in CASES[name] or "precision" in CASES[name]
    for stages in (rank[name] for rank in ranks):
        assert all(seen["frozen_kept"] and seen["trained_changed"] for seen in stages.values())
        assert stages["3"]["sharded"] == 1.0
        for stage in ("2", "3"):
            assert stages[stage]["losses"] == pytest.approx(stages["0"]["losses"], abs=1e-2 if coarse else 1e-4)


@pytest.mark.parametrize("stage", ["0", "2", "3"])
@pytest.mark.parametrize("name", CASES)
def test_the_artifact_of_every_stage_is_signed_and_in_parity(
    folder: Path, ranks: list[dict[str, Any]], name: str, stage: str
) -> None:
    artifact = folder / name / stage / "artifact"
    about = verify(artifact).about
    receipt = ParityReceipt.model_validate(ranks[1][name][stage]["parity"])
    assert receipt == ParityReceipt.model_validate_json((artifact / "receipts" / "parity.json").read_text())
    assert receipt.passed, receipt
    assert about["parity_passed"] is True
    assert about["base"]["digest"] == resolve_base(str(folder / CASES[name]["kind"]), None, folder).digest
    assert "## Load it" in (artifact / "README.md").read_text()
