"""The whole path on one machine, offline, on real text: continued pre-training, then answers, each with its receipts.

The two recipes are written out and then read like anybody's; `tunesmith train` on either does what the quickstart did.
"""

from __future__ import annotations

import json
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from tunesmith.cluster import storage
from tunesmith.cluster.console import say
from tunesmith.cluster.events import Listener, Note, ignore
from tunesmith.cluster.recipe.load import load_recipe
from tunesmith.trainers import documentation, launch
from tunesmith.trainers.closing import PASSED, closing, program

QUESTIONS = 4000  # chats of one question and its answer
PRETRAIN = """\
# Stage one: a small Llama with random weights reads the documentation of Python's standard library.
# Every weight is trained, by two workers that share gradients and the optimizer's state (ZeRO-2).
name: 1-documentation
model:
  base: builtin:tiny-llama
data:
  train: {folder}/documentation.jsonl
  max_length: 256
  split: {{validation: 0.02}}
objective: cpt
adaptation: full
train:
  learning_rate: 3.0e-3
  adam_beta2: 0.95
  max_steps: 200
  per_device_train_batch_size: 4
  eval_steps: 100
cluster: {{workers: 2, zero: 2}}
eval: {{max_rows: 60}}
output: {{dir: {folder}/runs}}
"""
ANSWERS = """\
# Stage two: the model of stage one learns to answer questions about it, with LoRA on its frozen weights.
# Two workers each keep a part of the weights (ZeRO-3). Only the answers are trained, not the questions.
name: 2-answers
model:
  base: run:1-documentation
data:
  train: {folder}/questions.jsonl
  max_length: 256
  split: {{validation: 0.02}}
objective: sft
adaptation: {{kind: lora, rank: 16, lora_alpha: 32}}
train:
  learning_rate: 5.0e-3
  max_steps: 60
  per_device_train_batch_size: 4
  eval_steps: 30
cluster: {{workers: 2, zero: 3, zero3_persistence_threshold: 0}}
output: {{dir: {folder}/runs}}
"""


@dataclass(frozen=True)
class Stage:
    """What one of the two runs came to."""

    recipe: str
    run: str
    artifact: str
    steps: int
    seconds: float
    """Of this command; little when the run was finished before."""
    loss_before: float
    """Held-out loss, in nats per trained token, before the first step."""
    loss_after: float
    """The same rows after the last step."""
    mask_passed: bool
    parity_passed: bool


def run(folder: Path, on_event: Listener = ignore) -> dict[str, Any]:
    """Trains both stages under `folder`; again, it goes on where it stopped, or shows what is there.

    Returns:
        `stages`, one dict each as in `Stage`, and `seconds`.

    Raises:
        TunesmithError: what `launch.run` raises.
    """
    began = time.monotonic()
    on_event(Note(write_inputs(folder)))
    stages = []
    for recipe in (folder / "1-documentation.yaml", folder / "2-answers.yaml"):
        on_event(Note(f"\n$ tunesmith train {recipe}"))
        stages.append(_train(recipe, on_event))
    seconds = time.monotonic() - began
    on_event(Note(summary(stages)))
    return {"stages": [asdict(stage) for stage in stages], "seconds": seconds}


def write_inputs(folder: Path) -> str:
    """Writes the corpus, the questions and the two recipes; returns a sentence about them."""
    found = documentation.entries()
    texts = documentation.documents(found)
    chats = documentation.conversations(found, QUESTIONS)
    folder.mkdir(parents=True, exist_ok=True)
    storage.write_atomic(folder / "documentation.jsonl", _lines({"text": text} for text in texts))
    storage.write_atomic(folder / "questions.jsonl", _lines({"messages": chat} for chat in chats))
    storage.write_atomic(folder / "1-documentation.yaml", PRETRAIN.format(folder=folder))
    storage.write_atomic(folder / "2-answers.yaml", ANSWERS.format(folder=folder))
    return (
        f"{len(texts):,} texts ({sum(map(len, texts)) / 1e6:.1f} million characters) and {len(chats):,} questions with "
        f"answers, from the documentation of Python {sys.version_info.major}.{sys.version_info.minor}: {folder}/"
    )


def summary(stages: list[Stage]) -> str:
    """What was reached."""
    lines = ["", "held-out loss       before    after   steps   mask     parity"]
    for stage in stages:
        lines.append(
            f"{stage.run:<18} {stage.loss_before:7.3f}  {stage.loss_after:7.3f} {stage.steps:7}   "
            f"{PASSED[stage.mask_passed]:<8} {PASSED[stage.parity_passed]}"
        )
    return "\n".join(lines)


def say_end(folder: Path, summary: dict[str, Any], console: Console) -> None:
    """Where everything lies, and what to type next.

    Args:
        summary: what `run` returned; with `answers` when the adapter was served.
    """
    last = folder / "runs" / summary["stages"][-1]["run"]
    command = program()
    serving = [
        f"  {command} serve {folder}/serve.yaml   serve it; then, in another terminal: {command} chat answers",
    ]
    lines = [
        f"Done in {summary['seconds']:.0f} s. Where everything lies:",
        f"  {last}/artifact   the adapter, with its tokenizer, receipts and model card",
        f"  {last}/artifact/receipts/mask.html   which tokens were trained, in colour",
        f"  {last}/loss.png   the course of the loss",
        f"  {folder}/2-answers.yaml   the recipe",
        "What to type next:",
        *(serving if "answers" in summary else []),
        f"  {command} train examples/support/lora.yaml   another recipe, with its data",
        f"  {command} train {folder}/2-answers.yaml --set name=mine --set data.train=yours.jsonl   your own data",
    ]
    say(console, "\n".join(lines))


def _train(recipe: Path, on_event: Listener) -> Stage:
    began = time.monotonic()
    loaded = load_recipe(recipe)
    result = launch.run(loaded, on_event=on_event)
    found = closing(loaded, result)
    assert found.loss_before is not None, "both stages hold rows out"
    assert found.loss_after is not None, "both stages hold rows out"
    return Stage(
        recipe=str(recipe),
        run=result.run,
        artifact=result.artifact,
        steps=result.steps,
        seconds=time.monotonic() - began,
        loss_before=found.loss_before,
        loss_after=found.loss_after,
        mask_passed=found.mask_passed,
        parity_passed=found.parity_passed,
    )


def _lines(rows: Any) -> str:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
