"""How long training stands still for saving: two workers, ZeRO-0, 2 and 3, every checkpoint fsynced and hashed."""

from __future__ import annotations

import argparse
import json
import os
import socket
import tempfile
import time
from pathlib import Path
from typing import Any

import workload
from measure import save, spread

workload.quiet()

WORLD = 2
REALISTIC_SAVE_STEPS = 100  # the recipe's default


def main() -> None:
    import torch.multiprocessing as mp

    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--saves", type=int, default=3)
    options.add_argument("--steps", type=int, default=4, help="optimizer steps between two saves")
    options.add_argument("--max-length", type=int, default=512)
    chosen = options.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        workload.write_model(folder / "model")
        workload.write_rows(folder / "rows.jsonl", 1000, chosen.max_length)
        arguments = (_free_port(), folder, chosen.saves, chosen.steps, chosen.max_length)
        mp.spawn(_worker, arguments, nprocs=WORLD, join=True)  # pyright: ignore[reportPrivateImportUsage]
        measured = json.loads((folder / "measured.json").read_text())
    lines = [line(measured[stage], int(stage)) for stage in measured]
    setting = (
        f"{WORLD} workers of one thread, fp32, AdamW, all weights of the 22M-parameter Llama, {chosen.max_length} tokens a "
        f"worker and step; local disk. The share is of {REALISTIC_SAVE_STEPS} steps and one save, the recipe's default."
    )
    save("checkpoint_stall", setting, {"losses of all stages": [m["losses"][-1] for m in measured.values()]}, lines)


def line(measured: dict[str, Any], stage: int) -> dict[str, Any]:
    """Figures of one ZeRO stage."""
    saves, steps = measured["saves"], measured["steps"]
    step = spread(steps)["median"]
    shares = [100 * seconds / (seconds + REALISTIC_SAVE_STEPS * step) for seconds in saves]
    return {
        "what": f"share of time spent saving, ZeRO-{stage}", "unit": "%", "rounds": len(saves), "share": spread(shares),
        "save_seconds": spread(saves), "step_seconds": spread(steps), "checkpoint_mb": measured["bytes"] / 1e6,
        "mb_per_second": spread([measured["bytes"] / 1e6 / seconds for seconds in saves]),
    }  # fmt: skip


def _worker(rank: int, port: int, folder: Path, saves: int, steps: int, max_length: int) -> None:
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    os.environ["LOCAL_RANK"] = str(rank)
    dist.init_process_group("gloo", f"tcp://127.0.0.1:{port}", rank=rank, world_size=WORLD)
    measured = {stage: _measure(folder, stage, saves, steps, max_length) for stage in (0, 2, 3)}
    first = measured[0]["losses"]
    for stage, found in measured.items():
        gap = max(abs(a - b) for a, b in zip(first, found["losses"], strict=True))
        assert gap < 1e-3, f"ZeRO-{stage} trains otherwise than ZeRO-0: losses differ by {gap}"
    if rank == 0:
        (folder / "measured.json").write_text(json.dumps(measured))
    dist.destroy_process_group()


def _measure(folder: Path, stage: int, saves: int, steps: int, max_length: int) -> dict[str, Any]:
    import torch.distributed as dist

    written = workload.recipe(
        folder, f"zero-{stage}", data={"max_length": max_length}, train={"max_steps": saves * steps},
        cluster={"workers": WORLD, "zero": stage},
    )  # fmt: skip
    trainer = workload.trainer(folder, written)
    trainer.engine.train()
    losses, step_seconds, save_seconds = [], [], []
    for _ in range(saves):
        for _ in range(steps):
            record, _ = trainer.step()
            losses.append(record["loss"])
            step_seconds.append(record["step_seconds"])
        dist.barrier()
        began = time.perf_counter()
        trainer.save(None)
        dist.barrier()
        save_seconds.append(time.perf_counter() - began)
    newest = sorted(trainer.run_folder.checkpoints.glob("step-*"))[-1]
    size = sum(path.stat().st_size for path in newest.rglob("*") if path.is_file())
    dist.barrier()
    return {"losses": losses, "steps": step_seconds[1:], "saves": save_seconds, "bytes": size}


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


if __name__ == "__main__":
    main()
