"""The same model on every rank and ZeRO stage: first weights, first losses, and frozen bits that nothing changes."""

from __future__ import annotations

import hashlib
import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import tiny_models

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


def work(folder: Path, rank: int, port: int) -> None:
    """A worker's life: every case and stage in turn; writes what it saw."""
    import torch.distributed as dist

    os.environ.update(RANK=str(rank), WORLD_SIZE=str(WORKERS), LOCAL_RANK=str(rank))
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=WORKERS)
    seen = {}
    for name, case in CASES.items():
        seen[name] = {str(stage): train_a_little(folder / case["kind"], rank, stage, **case) for stage in (0, 2, 3)}
        (folder / f"seen-{rank}.json").write_text(json.dumps(seen))
    dist.barrier()


def train_a_little(
    folder: Path,
    rank: int,
    stage: int,
    *,
    kind: str,
    adaptation: str,
    precision: str = "fp32",
    quantization: str | None = None,
    checkpointing: bool = True,
) -> dict[str, Any]:
    """Builds the engine of one stage, trains a few steps, evaluates, and says what became of the weights."""
    import deepspeed
    import torch
    import torch.distributed as dist

    from tunesmith.cluster.recipe.schema import Recipe
    from tunesmith.trainers.batch import Forest
    from tunesmith.trainers.engine import build_engine
    from tunesmith.trainers.models import resolve_base

    del kind
    base = resolve_base(str(folder), None, folder)

    def bits(model: Any, trained: bool) -> str:
        digest = hashlib.sha256()
        for name, parameter in model.named_parameters():
            if parameter.requires_grad == trained:
                with deepspeed.zero.GatheredParameters([parameter], enabled=hasattr(parameter, "ds_id")):
                    digest.update(name.encode() + parameter.data.contiguous().view(torch.uint8).numpy().tobytes())
        return digest.hexdigest()

    recipe = Recipe.model_validate(
        {
            "name": "t",
            "model": {"base": str(folder), "quantization": quantization},
            "data": {"train": "x.jsonl"},
            "objective": "sft",
            "adaptation": adaptation,
            "train": {"learning_rate": 1e-2, "gradient_checkpointing": checkpointing, "precision": precision},
            "cluster": {"workers": WORKERS, "zero": stage, "zero3_persistence_threshold": 0},
        }
    )
    torch.manual_seed(100 * rank + stage)
    engine = build_engine(recipe, base, torch.device("cpu"))
    first, frozen = bits(engine.module, True), bits(engine.module, False)
    sharded = [hasattr(p, "ds_id") and p.ds_tensor.numel() < p.ds_numel for p in engine.module.parameters()]
    losses = []
    for step in range(STEPS):
        # each rank repeats a byte of its own, so that their routers choose apart
        tokens = torch.full((24,), 65 + 20 * rank + step)
        at = torch.arange(23)
        forest = Forest.flat([24])
        logps, aux = engine(tokens, forest.position_ids(), forest, at, tokens[at + 1])
        loss = -logps.mean() + (aux if aux is not None else 0.0)
        engine.backward(loss)
        engine.step()
        total = loss.detach().clone()
        dist.all_reduce(total)
        losses.append(total.item() / WORKERS)
    engine.eval()
    with torch.no_grad():
        engine(tokens, forest.position_ids(), forest, at, tokens[at + 1])
    outcome = {
        "first": first,
        "losses": losses,
        "sharded": sum(sharded) / len(sharded),
        "frozen_kept": frozen == bits(engine.module, False),
        "trained_changed": first != bits(engine.module, True),
    }
    engine.destroy()
    return outcome


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each of two real processes on gloo saw, by case and stage."""
    folder = tmp_path_factory.mktemp("sharded")
    for kind in sorted({case["kind"] for case in CASES.values()}):
        tiny_models.make(kind, folder / kind)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    code = "import sys, pathlib, test_loading_sharded as t; t.work(pathlib.Path(sys.argv[1]), *map(int, sys.argv[2:]))"
    here = Path(__file__).parent
    path = os.pathsep.join([str(here), str(here.parent), *sys.path])
    environment = {**os.environ, "PYTHONPATH": path, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
    logs = [folder / f"log-{rank}.txt" for rank in range(WORKERS)]
    workers = [
        subprocess.Popen(
            [sys.executable, "-c", code, str(folder), str(rank), str(port)],
            env=environment,
            stdout=logs[rank].open("w"),
            stderr=subprocess.STDOUT,
        )
        for rank in range(WORKERS)
    ]
    codes = [worker.wait(timeout=400) for worker in workers]
    assert codes == [0, 0], "\n".join(log.read_text()[-3000:] for log in logs)
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
