"""What a finished run came to, read back from its folder, and how it is said at the end of a command."""

from __future__ import annotations

import shlex
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path

from tunesmith.cluster.artifacts import MaskReceipt, ParityReceipt
from tunesmith.cluster.metrics import read_metrics
from tunesmith.cluster.recipe.schema import Adapter, Recipe
from tunesmith.trainers.launch import Result, run_folder
from tunesmith.trainers.receipts.plan import read_plan_receipt

PASSED = {True: "passed", False: "FAILED"}


@dataclass(frozen=True)
class Closing:
    """What the files of a finished run say."""

    loss_before: float | None
    """Held-out loss, in nats per trained token, before the first step; None when nothing is held out."""
    loss_after: float | None
    """The same rows, with the weights that are in the artifact."""
    mask_passed: bool
    parity_passed: bool
    plan: str
    """How near the predicted memory was to the measured one."""


def closing(recipe: Recipe, result: Result) -> Closing:
    """Reads the run's metrics and the artifact's receipts."""
    lines = read_metrics(run_folder(recipe).metrics)
    before = next((line["eval_loss"] for line in lines if line.get("eval_loss") is not None), None)
    receipts = Path(result.artifact) / "receipts"
    mask = MaskReceipt.model_validate_json((receipts / "mask.json").read_text(encoding="utf-8"))
    parity = ParityReceipt.model_validate_json((receipts / "parity.json").read_text(encoding="utf-8"))
    plan = read_plan_receipt(receipts / "plan.json")
    verdict = "not compared" if plan is None else plan.verdict
    return Closing(before, result.metrics.get("eval_loss"), mask.passed, parity.passed, verdict)


def summary(recipe: Recipe, result: Result, arguments: list[str]) -> str:
    """What was reached, where it lies, and what to type next; `arguments` are those of `tunesmith`."""
    found, folder = closing(recipe, result), run_folder(recipe)
    loss = "nothing is held out"
    if found.loss_before is not None and found.loss_after is not None:
        loss = f"{found.loss_before:.3f} → {found.loss_after:.3f}"
    picture = [f"  course of the loss  {folder.loss_picture}"] if folder.loss_picture.exists() else []
    is_adapter = isinstance(recipe.adaptation, Adapter)
    kind = "AutoPeftModelForCausalLM" if is_adapter else "AutoModelForCausalLM"
    library = "peft" if is_adapter else "transformers"
    return "\n".join(
        [
            "",
            f"Run {result.run} is finished after {result.steps:,} steps:",
            f"  artifact            {result.artifact}",
            f"  held-out loss       {loss}",
            f"  receipts            mask {PASSED[found.mask_passed]}, parity {PASSED[found.parity_passed]}, plan {found.plan}",
            *picture,
            "To load it, in Python:",
            f"  from {library} import {kind}",
            f'  model = {kind}.from_pretrained("{result.artifact}")',
            "To see this again:",
            f"  {shlex.join([program(), *arguments])}",
        ]
    )


def program() -> str:
    """How this command was called, to be typed again."""
    return "tunesmith" if shutil.which("tunesmith") else sys.argv[0]
