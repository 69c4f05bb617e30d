"""What saving costs training, while it waits and in the background: two workers, ZeRO-0, 2 and 3, every file fsynced and hashed.

Three trainings of the same steps run in turn: one never saves, one saves while it waits, one in the background. What a save costs
is the time of the round beyond that of the training that never saves: it holds the slower steps meanwhile and the commit.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import workload
from measure import save, spread

if TYPE_CHECKING:
    from tunesmith.trainers.loop import Trainer

workload.quiet()

WORLD = 2
REALISTIC_SAVE_STEPS = 100  # the recipe's default
KINDS = {"never": "never saves", "waiting": "while training waits", "behind": "in the background"}


def main() -> None:
    import torch.multiprocessing as mp

    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--saves", type=int, default=3)
    options.add_argument("--steps", type=int, default=4, help="optimizer steps of a round; a save follows the first")
    options.add_argument("--max-length", type=int, default=256)
    chosen = options.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        workload.write_model(folder / "model")
        workload.write_rows(folder / "rows.jsonl", 1000, chosen.max_length)
        arguments = (_free_port(), folder, chosen.saves, chosen.steps, chosen.max_length)
        mp.spawn(_worker, arguments, nprocs=WORLD, join=True)  # pyright: ignore[reportPrivateImportUsage]
        measured = json.loads((folder / "measured.json").read_text())
    lines = [line(found, kind, int(stage)) for stage, found in measured.items() for kind in ("waiting", "behind")]
    setting = (
        f"{WORLD} workers of one thread on as many cores, fp32, AdamW, all weights of the 22M-parameter Llama, "
        f"{chosen.max_length} tokens a worker and step; local disk. A save costs what a round of {chosen.steps} steps with it takes "
        f"beyond one without; the share is of {REALISTIC_SAVE_STEPS} steps and one save, the recipe's default. Losses with and "
        "without saves are equal bit for bit."
    )
    save("checkpoint_stall", setting, {"last loss of each stage": [m["loss"] for m in measured.values()]}, lines)


def line(measured: dict[str, Any], kind: str, stage: int) -> dict[str, Any]:
    """Figures of one ZeRO stage and one way to save."""
    never, with_save = measured["rounds"]["never"], measured["rounds"][kind]
    stalls, step = measured["stalls"][kind], spread(measured["steps"])["median"]
    costs = [one - other for one, other in zip(with_save, never, strict=True)]
    shares = [100 * seconds / (seconds + REALISTIC_SAVE_STEPS * step) for seconds in costs]
    return {
        "what": f"ZeRO-{stage}, {KINDS[kind]}", "unit": "%", "rounds": len(costs), "share": spread(shares),
        "stall_seconds": spread(stalls), "cost_seconds": spread(costs), "step_seconds": spread(measured["steps"]),
        "checkpoint_mb": measured["bytes"] / 1e6,
    }  # fmt: skip


def _worker(rank: int, port: int, folder: Path, saves: int, steps: int, max_length: int) -> None:
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    os.environ["LOCAL_RANK"] = str(rank)
    dist.init_process_group("gloo", f"tcp://127.0.0.1:{port}", rank=rank, world_size=WORLD)
    measured = {stage: _measure(folder, stage, saves, steps, max_length) for stage in (0, 2, 3)}
    gap = max(found["loss"] for found in measured.values()) - min(found["loss"] for found in measured.values())
    assert gap < 1e-3, f"the stages train otherwise than each other: losses differ by {gap}"
    if rank == 0:
        (folder / "measured.json").write_text(json.dumps(measured))
    dist.destroy_process_group()


def _measure(folder: Path, stage: int, saves: int, steps: int, max_length: int) -> dict[str, Any]:
    import torch.distributed as dist

    trainers = {kind: _trainer(folder, kind, stage, saves * steps + 1, max_length) for kind in KINDS}
    losses = {kind: [trainer.step()[0]["loss"]] for kind, trainer in trainers.items()}  # some state is made in it
    rounds, stalls = ({kind: [] for kind in KINDS} for _ in range(2))
    step_seconds: list[float] = []
    for _ in range(saves):
        for kind, trainer in trainers.items():
            dist.barrier()
            began = time.perf_counter()
            records, stalled = _round(trainer, kind, steps)
            dist.barrier()
            rounds[kind].append(time.perf_counter() - began)
            stalls[kind].append(stalled)
            losses[kind] += [record["loss"] for record in records]
            if kind == "never":
                step_seconds += [record["step_seconds"] for record in records]
    assert losses["never"] == losses["waiting"] == losses["behind"], f"saving has changed the losses: {losses}"
    newest = sorted(trainers["behind"].run_folder.checkpoints.glob("step-*"))[-1]
    size = sum(path.stat().st_size for path in newest.rglob("*") if path.is_file())
    for trainer in trainers.values():
        trainer.checkpoints.close()
    dist.barrier()
    return {"loss": losses["never"][-1], "steps": step_seconds, "rounds": rounds, "stalls": stalls, "bytes": size}


def _trainer(folder: Path, kind: str, stage: int, steps: int, max_length: int) -> Trainer:
    written = workload.recipe(
        folder, f"{kind}-{stage}", data={"max_length": max_length}, train={"max_steps": steps},
        cluster={"workers": WORLD, "zero": stage},
    )  # fmt: skip
    trainer = workload.trainer(folder, written)
    trainer.engine.train()
    return trainer


def _round(trainer: Trainer, kind: str, steps: int) -> tuple[list[dict[str, Any]], float]:
    """Some steps with a save after the first, and the seconds in which training stood still: copying or writing, and committing."""
    settling = _Timed(trainer.checkpoints.settle)
    trainer.checkpoints.settle = settling
    records, stalled = [trainer.step()[0]], 0.0
    saved = trainer.progress.step
    if kind != "never":
        began = time.perf_counter()
        trainer.save(None, behind=kind == "behind")
        stalled = time.perf_counter() - began
    settling.seconds = 0.0
    records += [trainer.step()[0] for _ in range(steps - 1)]
    trainer.checkpoints.settle()
    trainer.checkpoints.settle = settling.function
    assert kind == "never" or trainer.checkpoints.last_saved == saved, "the save was not committed in its round"
    return records, stalled + settling.seconds


class _Timed:
    """A function that is called for its effect, and the seconds spent in it."""

    def __init__(self, function: Any) -> None:
        self.function, self.seconds = function, 0.0

    def __call__(self) -> None:
        began = time.perf_counter()
        self.function()
        self.seconds += time.perf_counter() - began


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


if __name__ == "__main__":
    main()
