"""Runs stages of checkpointed training, each in fresh processes; a program of its own, driven by `checkpoint_stages`.

A stage comes in as a line of JSON on stdin, its results go out as one on stdout. torch and DeepSpeed are imported once;
for every stage the ranks are forked, join a gloo group, build an engine around a small model, train, save and resume,
and write down what they saw. `kill_at: [rank, k]` ends a rank by SIGKILL just before its k-th operation on files (open
for writing, write, fsync, mkdir, rename, unlink) during the save of `kill_step`, in the background or not, or while it
loads to resume.
"""

from __future__ import annotations

import builtins
import dataclasses
import hashlib
import io
import json
import os
import signal
import sys
import tempfile
import threading
import time
import traceback
from concurrent.futures import wait
from pathlib import Path
from typing import Any

import deepspeed
import deepspeed.runtime.zero.muon.muon_optimizer
import torch
import torch._dynamo
import torch.distributed as dist
from torch import nn

from tunesmith.cluster.errors import TunesmithError
from tunesmith.cluster.runs import RunFolder
from tunesmith.trainers.checkpoint import CheckpointStore


@dataclasses.dataclass(frozen=True)
class Stage:
    run: str
    steps: int
    zero: int = 0
    world: int = 2
    precision: str = "fp32"
    frozen: bool = False
    width: int = 8
    save_at: tuple[int, ...] = ()
    behind_at: tuple[int, ...] = ()  # steps that are saved in the background
    write_after: int | None = (
        None  # a step before whose end no background write begins, and all are over before the next
    )
    fail_rank: int | None = None  # a rank whose disk is full in the first save in the background
    end_at: tuple[int, int] | None = None  # a rank, and the step after which it is killed
    metrics: dict[str, float] = dataclasses.field(default_factory=dict)
    keep: int = 2
    resume: str = "no"  # no | newest | best
    load_afterwards: int | None = None  # a step to go back to in the same process, and train from again
    weight_decay: float = 0.01
    clipping: float = 0.5
    elastic: bool = False
    kill_at: tuple[int, int] | None = None
    kill_in: str = "save"  # save | load
    kill_step: int = 2
    fence_step: int | None = None  # just before this step is saved, a newer attempt begins
    seconds: float = 60.0


class Model(nn.Module):
    """A frozen or trainable body, an update beside it, a buffer, tied weights, dropout."""

    def __init__(self, width: int, frozen: bool) -> None:
        super().__init__()
        self.embedding = nn.Embedding(16, width)
        self.body = nn.Linear(width, width)
        self.down = nn.Linear(width, 2, bias=False)
        self.up = nn.Linear(2, width, bias=False)
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, 16, bias=False)
        self.head.weight = self.embedding.weight
        self.register_buffer("scale", torch.ones(1))
        if frozen:
            for part in (self.embedding, self.body):
                part.requires_grad_(False)

    def forward(self, inputs_BT: torch.Tensor, targets_BT: torch.Tensor) -> torch.Tensor:
        hidden = self.embedding(inputs_BT)
        hidden = self.norm(
            hidden + torch.tanh(self.body(hidden)) + self.up(self.down(hidden)) * self.scale.to(hidden.dtype)
        )
        hidden = nn.functional.dropout(hidden, 0.1)
        logits = self.head(hidden).float()
        return nn.functional.cross_entropy(logits.flatten(0, 1), targets_BT.flatten())


def build(stage: Stage) -> Any:
    torch.manual_seed(0)
    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_clipping": stage.clipping,
        "steps_per_print": 10**9,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "zero_optimization": {"stage": stage.zero, "stage3_param_persistence_threshold": 0},
    }
    if stage.precision == "bf16":
        config |= {"bf16": {"enabled": True}}
        if stage.zero > 0:  # DeepSpeed knows no fp32 accumulation of bf16 gradients under ZeRO-0
            config |= {"data_types": {"grad_accum_dtype": "fp32"}}
    model = Model(stage.width, stage.frozen)
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    groups = [
        {"params": [p for p in trainable if p.dim() > 1], "weight_decay": stage.weight_decay},
        {"params": [p for p in trainable if p.dim() < 2], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=1e-2, fused=True)
    return deepspeed.initialize(model=model, optimizer=optimizer, config=config, dist_init_required=False)[0]


def train_step(engine: Any, step: int) -> str:
    """One optimizer step, a function of the weights and the step's number; the exact loss as hex."""
    for group in engine.optimizer.param_groups:
        group["lr"] = 1e-2 / (step + 1)
    torch.manual_seed(1000 * step + dist.get_rank())
    tokens_BT = torch.randint(0, 16, (4, 9))
    loss = engine(tokens_BT[:, :-1], tokens_BT[:, 1:])
    engine.backward(loss)
    engine.step()
    return float(loss.detach()).hex()


def weights_hash(engine: Any) -> str:
    digest = hashlib.sha256()
    for name, parameter in engine.module.named_parameters():
        with deepspeed.zero.GatheredParameters([parameter], enabled=hasattr(parameter, "ds_id")):
            digest.update(name.encode())
            digest.update(parameter.detach().float().contiguous().numpy().tobytes())
    return digest.hexdigest()


def work(stage: Stage, rank: int, seen: dict[str, Any]) -> None:
    run = RunFolder(Path(stage.run))
    if rank == 0:
        run.create()
        run.begin_attempt()
    dist.barrier()
    attempt = run.current_attempt()
    store = CheckpointStore(run.checkpoints, rank, stage.world, attempt, run, stage.keep, 0, stage.elastic)
    engine = build(stage)
    first = 0
    if stage.resume != "no":
        newest = store.newest()
        path = store.best() if stage.resume == "best" else newest[0] if newest else None
        seen["warnings"] = store.warnings
        if path is not None:
            _Killer.armed = stage.kill_in == "load"
            first = store.load(engine, path)["step"]
            _Killer.armed = False
            seen["resumed"] = first
    seen["decay"] = [group["weight_decay"] for group in engine.optimizer.param_groups]
    gate = _Gate(store) if stage.write_after else None
    about = {"note": "kept"}
    for step in range(first, stage.steps):
        about["done"] = seen["losses"][step + 1] = train_step(engine, step)
        settle_if_written(store)
        seen["known"].append(store.last_saved)
        if step + 1 == stage.fence_step and rank == 0:
            run.begin_attempt()
        if step + 1 in (*stage.save_at, *stage.behind_at) or store.owes_save:
            _Killer.armed = stage.kill_in == "save" and step + 1 == stage.kill_step
            save = store.save_behind if step + 1 in stage.behind_at else store.save
            save(engine, step + 1, about, stage.metrics.get(str(step + 1)))
            seen["saved"].append(step + 1)
            if rank == stage.fail_rank and step + 1 == stage.behind_at[0]:
                fill_disk(store)
        _Killer.armed = _Killer.armed and store._behind is not None
        if gate and step + 1 == stage.write_after:
            gate.open()
        if stage.end_at and tuple(stage.end_at) == (rank, step + 1):
            os.kill(os.getpid(), signal.SIGKILL)
    store.settle()
    store.close()
    seen["threads"] = [thread.name for thread in threading.enumerate() if thread.name.startswith("checkpoint")]
    seen["weights"] = weights_hash(engine)
    if stage.load_afterwards is not None:
        store.load(engine, run.checkpoints / f"step-{stage.load_afterwards:08d}")
        seen["again"] = {step + 1: train_step(engine, step) for step in range(stage.load_afterwards, stage.steps)}
        seen["weights_again"] = weights_hash(engine)


def settle_if_written(store: CheckpointStore) -> None:
    """As the loop does with the totals of a step."""
    ready = torch.tensor(float(store.is_written))
    dist.all_reduce(ready)
    if ready == store.world:
        store.settle()


def fill_disk(store: CheckpointStore) -> None:
    """Has this rank's files, which are not begun yet, be written to a device that is full."""
    assert store._behind is not None
    for path, _ in store._behind.files._copies:
        path.symlink_to("/dev/full")


class _Gate:
    """Stands before the first background write, in the thread that would do it."""

    def __init__(self, store: CheckpointStore) -> None:
        self._store, self._open = store, threading.Event()
        store._thread.submit(self._open.wait)

    def open(self) -> None:
        """Lets the write go, and waits for its end."""
        self._open.set()
        if self._store._behind is not None:
            wait([self._store._behind.writing])


class _Killer:
    """Counts operations on files, and ends this process just before the k-th."""

    count = 0
    armed = False
    limit: int | None = None

    @classmethod
    def step(cls) -> None:
        if cls.armed:
            cls.count += 1
            if cls.count == cls.limit:
                os.kill(os.getpid(), signal.SIGKILL)

    @classmethod
    def install(cls, limit: int | None) -> None:
        cls.limit = limit
        for name in ("fsync", "rename", "replace", "mkdir", "unlink", "rmdir", "remove"):
            setattr(os, name, cls.counted(getattr(os, name)))
        real_open = builtins.open

        def opened(file: Any, mode: str = "r", *rest: Any, **more: Any) -> Any:
            if "w" not in mode:
                return real_open(file, mode, *rest, **more)
            cls.step()
            return _CountedFile(real_open(file, mode, *rest, **more)) if "b" in mode else real_open(file, mode)

        builtins.open = io.open = opened

    @classmethod
    def counted(cls, function: Any) -> Any:
        def call(*args: Any, **more: Any) -> Any:
            cls.step()
            return function(*args, **more)

        return call


class _CountedFile:
    """A binary file whose first write counts, so that a kill can leave an empty or a half-written file."""

    def __init__(self, file: Any) -> None:
        self._file, self._writes = file, 0

    def write(self, data: Any) -> int:
        self._writes += 1
        if self._writes in (1, 4):
            self._file.flush()
            _Killer.step()
        return self._file.write(data)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)

    def __enter__(self) -> _CountedFile:
        return self

    def __exit__(self, *error: object) -> None:
        self._file.close()


def rank_main(stage: Stage, rank: int, folder: Path) -> None:
    seen: dict[str, Any] = {"losses": {}, "saved": [], "known": [], "warnings": [], "resumed": None, "error": None}
    try:
        os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(stage.world))
        torch.set_num_threads(1)
        dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=stage.world)
        if stage.kill_at is not None and stage.kill_at[0] == rank:
            _Killer.install(stage.kill_at[1])
        work(stage, rank, seen)
    except TunesmithError as error:
        seen["error"] = [type(error).__name__, str(error)]
    finally:
        _Killer.armed = False
        unfinished = folder / f"{rank}.unfinished"  # this rank may be ended while it writes
        unfinished.write_text(json.dumps(seen))
        unfinished.rename(folder / f"{rank}.json")


def run_stage(stage: Stage) -> list[dict[str, Any]]:
    """Forks the ranks; when one dies the others are ended, as Ray Train does. `null` for a rank that was killed."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        alive: dict[int, int] = {}
        for rank in range(stage.world):
            if (pid := os.fork()) == 0:
                try:
                    rank_main(stage, rank, folder)
                except BaseException:
                    traceback.print_exc()
                    raise
                finally:
                    sys.stderr.flush()
                    os._exit(0)
            alive[pid] = rank
        deadline, hung = time.monotonic() + stage.seconds, False
        while alive:
            pid, status = os.waitpid(-1, os.WNOHANG)
            if pid:
                del alive[pid]
            if (pid and os.WIFSIGNALED(status)) or time.monotonic() > deadline:
                hung = hung or not pid
                for other in alive:
                    os.kill(other, signal.SIGKILL)
            time.sleep(0.01)
        results = []
        for rank in range(stage.world):
            path = folder / f"{rank}.json"
            results.append(
                {**json.loads(path.read_text()), "hung": hung} if path.exists() else {"killed": True, "hung": hung}
            )
        return results


def main() -> None:
    # No compiled op: it waits in a busy loop, and a process killed while loading it leaves a lock behind for ever.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # DeepSpeed prints to stdout
    for line in sys.stdin:
        print(json.dumps(run_stage(Stage(**json.loads(line)))), file=answers, flush=True)


if __name__ == "__main__":
    main()
