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
from functools import partial
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


class Contest:
    """Ours and the peers on the same examples, each with its own copy of the same weights.

    Attributes:
        mean: tokens of an example.
        per_step: examples that a padded batch needs for as many tokens as our step has.
    """

    def __init__(self, folder: Path, steps: int, max_length: int, rows: int) -> None:
        workload.write_model(folder / "model")
        workload.write_rows(folder / "rows.jsonl", 3000, max_length)
        self.steps, self.max_length, self.rows = steps, max_length, rows
        self.ours = Ours(folder, max_length, rows)
        self.store = self.ours.trainer.data.train
        self.mean = float(np.mean(self.store.lengths))
        self.per_step = round(rows * max_length / self.mean)
        base, scratch = folder / "model", folder / "scratch"
        self.padded, self.masked = Padded(base, scratch), Masked(base, scratch)
        self.trl, self.trl_packed = Trl(base, scratch), Trl(base, scratch)

    def example(self, index: int, *keys: str) -> dict[str, list[int]]:
        """These columns of an example."""
        tokens, trained = self.store.example(index)
        labels = np.where(trained, tokens, IGNORED)
        columns = {
            "input_ids": tokens.tolist(),
            "labels": labels.tolist(),
            "completion_mask": trained.astype(int).tolist(),
        }
        return {key: columns[key] for key in keys}

    def arms(self, first: int, count: int, batch_size: int | None = None) -> dict[str, Callable[[], float]]:
        """What trains our steps `first` and on, each in its own way; their answers are seconds.

        Args:
            batch_size: of the padded; None takes all examples at once.
        """
        by_step = self.ours.packs(first, count)
        flat = [index for packs in by_step for pack in packs for index in pack]
        plain = [self.example(index, "input_ids", "labels") for index in flat]
        for row in plain:
            row["attention_mask"] = [1] * len(row["input_ids"])
        in_packs = [[self.example(i, "input_ids", "labels") for i in pack] for packs in by_step for pack in packs]
        for_trl = [self.example(index, "input_ids", "completion_mask") for index in flat]
        batch = batch_size or len(flat)
        return {
            "ours": lambda: self.ours.train(count),
            "HF Trainer, padded": lambda: self.padded.train(plain, batch),
            "HF Trainer, packed, 4-D mask": lambda: self.masked.train(in_packs, self.max_length, self.rows),
            "TRL SFTTrainer, padded": lambda: self.trl.train(for_trl, self.max_length, batch, packing=False),
            "TRL SFTTrainer, its packing": lambda: self.trl_packed.train(
                for_trl, self.max_length, self.rows, packing=True
            ),
        }

    def tokens_per_second(self, name: str, number: int) -> float:
        """Of one arm in one round, which trains the steps of its number; padding is not counted."""
        first = 1 + number * self.steps
        packs = [pack for packs in self.ours.packs(first, self.steps) for pack in packs]
        tokens = sum(int(self.store.lengths[index]) for pack in packs for index in pack)
        return tokens / self.arms(first, self.steps, self.per_step)[name]()


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
    contest = Contest(folder, steps, max_length, rows)
    ours, masked = contest.ours, contest.masked
    peers = {"padded": contest.padded, "4-D mask": masked, "TRL padded": contest.trl, "TRL packed": contest.trl_packed}
    first_step = contest.arms(0, 1)
    for train in first_step.values():  # warms up, too
        train()
    for what, peer in peers.items():
        assert_close(f"loss of the first step, {what}", ours.losses[0], peer.losses[0], 1e-4)

    figures = in_turn({name: partial(contest.tokens_per_second, name) for name in first_step}, rounds)
    gap = float(np.abs(np.array(ours.losses) - np.array(masked.losses)).max())
    assert_close("losses of all steps against the 4-D mask, largest gap", gap, 0.0, 2e-3)

    aims = {"HF Trainer, padded": "≥ 4", "HF Trainer, packed, 4-D mask": "≥ 1.25"}
    lengths = contest.store.lengths
    share = float(contest.store.trained_counts.sum() / lengths.sum())
    save(
        "sft_throughput",
        f"Supervised fine-tuning, one process, {torch.get_num_threads()} thread(s) (where it is one, time is CPU time), fp32, all weights: Llama of "
        f"{sum(p.numel() for p in contest.padded.model.parameters()) / 1e6:.0f}M parameters, vocabulary {workload.VOCABULARY}; "
        f"examples of median {np.median(lengths):.0f}, mean {contest.mean:.0f}, at most {max_length} tokens, "
        f"{share:.0%} labels; about {rows * max_length} tokens a step ({contest.per_step} examples where padded), {steps} steps a round.",
        {"first loss": [ours.losses[0], *(peer.losses[0] for peer in peers.values())],
         "largest gap to the 4-D mask over all steps": gap},
        [
            comparison("tokens a second, padding not counted", name, "tokens/s", figures["ours"], figures[name],
                       ratio="ours/peer", aim=aims.get(name))
            for name in figures if name != "ours"
        ],
    )  # fmt: skip


if __name__ == "__main__":
    main()
