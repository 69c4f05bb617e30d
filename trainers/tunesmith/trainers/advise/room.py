"""How much memory each adaptation would take on each worker, by the planner that `plan` and the launcher use."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

from tunesmith.cluster.fleet import GIB
from tunesmith.cluster.recipe.schema import Lora, Recipe
from tunesmith.trainers.memory.choose import changed
from tunesmith.trainers.memory.predict import Planner

Way = Literal["full", "lora", "qlora"]
LORA_ALPHA = 32
"""The update is scaled by alpha / rank; with one alpha, one learning rate suits every rank (Schulman et al. 2025)."""


@dataclass(frozen=True)
class Layout:
    """One way to place an adaptation on a fleet."""

    way: Way
    zero: int
    """ZeRO stage."""
    checkpointing: bool
    """Whether activations are computed twice (gradient checkpointing)."""
    gib: float
    """On each worker at the worst moment, what CUDA itself takes included."""
    fits: bool


@dataclass
class Room:
    """Simulates layouts of a draft as they are asked for."""

    planner: Planner
    draft: Recipe

    def layouts(self, way: Way, rank: int) -> Iterator[Layout]:
        """Every layout of an adaptation, the fastest first.

        QLoRA is not shared out by ZeRO-3: every worker loads the base in 4 bits whole.
        """
        several = self.planner.workers(self.draft) > 1
        stages: list[int] = [2, 3] if several and way != "qlora" else [2] if several else [0]
        if self.draft.cluster.zero != "auto":
            stages = [self.draft.cluster.zero]
        for zero in stages:
            for checkpointing in (False, True):
                variant = changed(self.draft, self._plain() | changes(self.draft, way, rank, zero, checkpointing))
                with _without_library_talk():
                    prediction = self.planner.predict(variant)
                yield Layout(way, zero, checkpointing, prediction.total / GIB, prediction.fits)

    def _plain(self) -> dict[str, Any]:
        """What stands for the draft's `auto`, which is chosen when the recipe runs."""
        batch, offload = self.draft.train.per_device_train_batch_size, self.draft.cluster.offload
        return {
            "train.per_device_train_batch_size": 1 if batch == "auto" else batch,
            "cluster.offload": "none" if offload == "auto" else offload,
        }


def changes(draft: Recipe, way: Way, rank: int, zero: int, checkpointing: bool) -> dict[str, Any]:
    """Dotted keys that make the draft such a layout; of the draft's own LoRA, targets and dropout stay."""
    adaptation: dict[str, Any] = {"kind": "full"}
    if way != "full":
        own = draft.adaptation.model_dump(exclude_unset=True) if isinstance(draft.adaptation, Lora) else {}
        kept = {key: own[key] for key in ("lora_dropout", "target_modules") if key in own}
        adaptation = {"kind": "lora", "rank": rank, "lora_alpha": LORA_ALPHA, **kept}
    return {
        "adaptation": adaptation,
        "model.quantization": "nf4" if way == "qlora" else None,
        "cluster.zero": zero,
        "train.gradient_checkpointing": checkpointing,
    }


@contextmanager
def _without_library_talk() -> Iterator[None]:
    """Keeps back what bitsandbytes and PEFT say of a model that is only simulated."""
    logger = logging.getLogger("bitsandbytes")
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="The PEFT config's")
            yield
    finally:
        logger.setLevel(before)


def gib(amount: float) -> str:
    """An amount of memory for people."""
    if amount < 0.1:
        return f"{amount * 1024:,.3g} MiB"
    return f"{amount:,.0f} GiB" if amount >= 100 else f"{amount:.3g} GiB"
