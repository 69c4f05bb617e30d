"""Supervised fine-tuning on rows of realistic lengths: our loop against the HF Trainer and TRL, in one process.

All train the same examples in every round, from the same weights with the same AdamW, and clip alike. The first step
takes the same examples in one batch everywhere, and must have the same loss; the 4-D mask trains the same packs as we
do, so every loss of its steps must follow ours.
"""

from __future__ import annotations

import argparse
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import workload
from measure import assert_close, comparison, in_turn, now, save

workload.quiet()

import torch  # noqa: E402
from datasets import Dataset  # noqa: E402
from transformers import (  # noqa: E402
    AutoModelForCausalLM,
    AutoTokenizer,
    DataCollatorForSeq2Seq,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)
from trl.trainer.sft_config import SFTConfig  # noqa: E402
from trl.trainer.sft_trainer import SFTTrainer  # noqa: E402

IGNORED = -100
Examples = list[int]


class Clock(TrainerCallback):
    """Seconds from the first step's begin to the last one's end, and every step's loss."""

    def __init__(self) -> None:
        self.began: float | None = None
        self.ended = 0.0
        self.losses: list[float] = []

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        if self.began is None:
            self.began = now()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self.ended = now()

    def on_log(self, *_: Any, logs: dict[str, float], **__: Any) -> None:
        if "loss" in logs:
            self.losses.append(logs["loss"])

    @property
    def seconds(self) -> float:
        """Of all steps."""
        assert self.began is not None, "nothing was trained"
        return self.ended - self.began


class Ours:
    """The real loop, one worker, ZeRO-0."""

    def __init__(self, folder: Path, max_length: int, rows: int) -> None:
        written = workload.recipe(
            folder, "ours", data={"max_length": max_length}, train={"per_device_train_batch_size": rows, "max_steps": 1000}
        )  # fmt: skip
        self.trainer = workload.trainer(folder, written)
        self.trainer.engine.train()
        for name in ("LOCAL_RANK", "RANK", "WORLD_SIZE"):  # or Accelerate would put the peers into DDP
            os.environ.pop(name, None)
        self.losses: list[float] = []

    def packs(self, first: int, steps: int) -> list[list[Examples]]:
        """The packs of each step."""
        return [[list(pack) for pack in self.trainer.plan.step(step).packs] for step in range(first, first + steps)]

    def train(self, steps: int) -> float:
        """Seconds."""
        began = now()
        records = [self.trainer.step()[0] for _ in range(steps)]
        self.losses += [record["loss"] for record in records]
        return now() - began


class Peer:
    """A Hugging Face trainer, made anew for each round's examples around one model and one optimizer."""

    def __init__(self, base: Path, scratch: Path) -> None:
        self.scratch = str(scratch)
        self.tokenizer = AutoTokenizer.from_pretrained(base)
        self.model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-4, weight_decay=0.0, fused=True)
        self.losses: list[float] = []

    def settings(self, batch_size: int) -> dict[str, Any]:
        """What all peers are set to."""
        return {
            "output_dir": self.scratch, "per_device_train_batch_size": batch_size, "num_train_epochs": 1,
            "max_grad_norm": 1.0, "lr_scheduler_type": "constant", "learning_rate": 1e-4, "logging_steps": 1,
            "save_strategy": "no", "report_to": "none", "disable_tqdm": True, "use_cpu": True, "bf16": False,
            "gradient_checkpointing": False, "remove_unused_columns": False, "dataloader_drop_last": False,
        }  # fmt: skip

    def time(self, trainer: Trainer) -> float:
        """Trains it to the end; seconds."""
        assert trainer.accelerator.distributed_type == "NO", (
            "the peer would pay for a process group that it does not need"
        )
        clock = Clock()
        trainer.add_callback(clock)
        trainer.train()
        self.losses += clock.losses
        return clock.seconds

    def optimizers(self) -> tuple[Any, Any]:
        return self.optimizer, torch.optim.lr_scheduler.LambdaLR(self.optimizer, lambda _: 1.0)


class Padded(Peer):
    """HF Trainer, rows padded to the longest of the batch."""

    def train(self, rows: list[dict[str, list[int]]], batch_size: int) -> float:
        return self.time(
            Trainer(
                self.model,
                TrainingArguments(**self.settings(batch_size)),
                DataCollatorForSeq2Seq(self.tokenizer),
                Dataset.from_list(rows),
                optimizers=self.optimizers(),
            )
        )


class Masked(Peer):
    """HF Trainer on our packs, with a block-diagonal 4-D mask."""

    def train(self, rows: list[list[dict[str, list[int]]]], max_length: int, batch_size: int) -> float:
        def collate(packs: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
            return masked_batch([pack["examples"] for pack in packs], max_length)

        trainer = Trainer(
            self.model,
            TrainingArguments(**self.settings(batch_size), train_sampling_strategy="sequential"),
            collate,
            Dataset.from_list([{"examples": pack} for pack in rows]),
            optimizers=self.optimizers(),
        )
        return self.time(trainer)


class Trl(Peer):
    """TRL's SFTTrainer, its own collator, with or without its packing."""

    def train(self, rows: list[dict[str, list[int]]], max_length: int, batch_size: int, packing: bool) -> float:
        return self.time(
            SFTTrainer(
                self.model,
                SFTConfig(**self.settings(batch_size), max_length=max_length, packing=packing, completion_only_loss=True),
                train_dataset=Dataset.from_list(rows),
                processing_class=self.tokenizer,
                optimizers=self.optimizers(),
            )
        )  # fmt: skip


def masked_batch(packs: list[list[dict[str, list[int]]]], max_length: int) -> dict[str, torch.Tensor]:
    """Rows [B, T] of several examples with the additive mask [B, 1, T, T]; padding sees itself."""
    shape = (len(packs), max_length)
    tokens, positions = torch.full(shape, workload.PADDING), torch.zeros(shape, dtype=torch.int64)
    labels = torch.full(shape, IGNORED)
    visible = torch.eye(max_length, dtype=torch.bool).repeat(len(packs), 1, 1, 1).transpose(0, 1)
    visible = visible.reshape(len(packs), 1, max_length, max_length)
    for row, pack in enumerate(packs):
        start = 0
        for example in pack:
            length = len(example["input_ids"])
            span = slice(start, start + length)
            tokens[row, span] = torch.tensor(example["input_ids"])
            labels[row, span] = torch.tensor(example["labels"])
            labels[row, start] = IGNORED  # predicted by another example's last token
            positions[row, span] = torch.arange(length)
            visible[row, 0, span, span] = torch.ones(length, length, dtype=torch.bool).tril()
            start += length
    mask = torch.zeros(visible.shape).masked_fill_(~visible, torch.finfo(torch.float32).min)
    return {"input_ids": tokens, "labels": labels, "position_ids": positions, "attention_mask": mask}


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--rounds", type=int, default=4)
    options.add_argument("--steps", type=int, default=2, help="optimizer steps a round")
    options.add_argument("--max-length", type=int, default=1024)
    options.add_argument("--rows", type=int, default=2, help="packed rows a step")
    options.add_argument("--threads", type=int, default=1)
    chosen = options.parse_args()
    with tempfile.TemporaryDirectory() as name, workload.alone(chosen.threads):
        run(Path(name), chosen.rounds, chosen.steps, chosen.max_length, chosen.rows)


def run(folder: Path, rounds: int, steps: int, max_length: int, rows: int) -> None:
    """Measures and writes the report."""
    workload.write_model(folder / "model")
    workload.write_rows(folder / "rows.jsonl", 3000, max_length)
    ours = Ours(folder, max_length, rows)
    store = ours.trainer.data.train
    mean = float(np.mean(store.lengths))
    per_step = round(rows * max_length / mean)  # examples a padded batch needs for as many tokens as our step has

    def example(index: int) -> dict[str, list[int]]:
        tokens, trained = store.example(index)
        labels = np.where(trained, tokens, IGNORED)
        return {
            "input_ids": tokens.tolist(),
            "labels": labels.tolist(),
            "completion_mask": trained.astype(int).tolist(),
        }

    def only(index: int, *keys: str) -> dict[str, list[int]]:
        return {key: value for key, value in example(index).items() if key in keys}

    base, scratch = folder / "model", folder / "scratch"
    padded, masked, trl, trl_packed = (
        Padded(base, scratch),
        Masked(base, scratch),
        Trl(base, scratch),
        Trl(base, scratch),
    )

    def train_all(first: int, count: int, batch_size: int | None) -> dict[str, Callable[[], float]]:
        by_step = ours.packs(first, count)
        flat = [index for packs in by_step for pack in packs for index in pack]
        plain = [only(index, "input_ids", "labels") for index in flat]
        for row in plain:
            row["attention_mask"] = [1] * len(row["input_ids"])
        in_packs = [[only(i, "input_ids", "labels") for i in pack] for packs in by_step for pack in packs]
        for_trl = [only(index, "input_ids", "completion_mask") for index in flat]
        batch = batch_size or len(flat)
        return {
            "ours": lambda: ours.train(count),
            "HF Trainer, padded": lambda: padded.train(plain, batch),
            "HF Trainer, packed, 4-D mask": lambda: masked.train(in_packs, max_length, rows),
            "TRL SFTTrainer, padded": lambda: trl.train(for_trl, max_length, batch, packing=False),
            "TRL SFTTrainer, its packing": lambda: trl_packed.train(for_trl, max_length, rows, packing=True),
        }

    for train in train_all(0, 1, None).values():  # warms up, too
        train()
    for what, peer in (("padded", padded), ("4-D mask", masked), ("TRL padded", trl), ("TRL packed", trl_packed)):
        assert_close(f"loss of the first step, {what}", ours.losses[0], peer.losses[0], 1e-4)

    def contestant(name: str) -> Callable[[int], float]:
        def figure(number: int) -> float:
            first = 1 + number * steps
            tokens = sum(int(store.lengths[i]) for packs in ours.packs(first, steps) for pack in packs for i in pack)
            return tokens / train_all(first, steps, per_step)[name]()

        return figure

    names = list(train_all(1, 1, per_step))
    figures = in_turn({name: contestant(name) for name in names}, rounds)
    gap = float(np.abs(np.array(ours.losses) - np.array(masked.losses)).max())
    assert_close("losses of all steps against the 4-D mask, largest gap", gap, 0.0, 2e-3)

    aims = {"HF Trainer, padded": "≥ 4", "HF Trainer, packed, 4-D mask": "≥ 1.25"}
    share = float(store.trained_counts.sum() / store.lengths.sum())
    save(
        "sft_throughput",
        f"Supervised fine-tuning, one process, {torch.get_num_threads()} thread(s) (where it is one, time is CPU time), fp32, all weights: Llama of "
        f"{sum(p.numel() for p in padded.model.parameters()) / 1e6:.0f}M parameters, vocabulary {workload.VOCABULARY}; "
        f"examples of median {np.median(store.lengths):.0f}, mean {mean:.0f}, at most {max_length} tokens, "
        f"{share:.0%} labels; about {rows * max_length} tokens a step ({per_step} examples where padded), {steps} steps a round.",
        {"first loss": [ours.losses[0], padded.losses[0], masked.losses[0], trl.losses[0], trl_packed.losses[0]],
         "largest gap to the 4-D mask over all steps": gap},
        [
            comparison("tokens a second, padding not counted", name, "tokens/s", figures["ours"], figures[name],
                       ratio="ours/peer", aim=aims.get(name))
            for name in names if name != "ours"
        ],
    )  # fmt: skip


if __name__ == "__main__":
    main()
