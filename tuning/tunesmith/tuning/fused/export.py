"""The model of a trial that was trained beside others, as an artifact like any run's."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import nn
from torch._C._distributed_c10d import HashStore

from tunesmith.cluster.base import BaseRef
from tunesmith.cluster.errors import ReceiptError
from tunesmith.cluster.recipe.schema import Lora, Recipe
from tunesmith.cluster.runs import RunFolder
from tunesmith.trainers import attention
from tunesmith.trainers.adaptations import lora
from tunesmith.trainers.export import write_artifact
from tunesmith.trainers.models import load_tokenizer
from tunesmith.trainers.packing import BatchPlan
from tunesmith.trainers.policy import Policy
from tunesmith.trainers.receipts import parity
from tunesmith.trainers.receipts.mask import write_mask_receipt
from tunesmith.tuning.fused.begin import A, B
from tunesmith.tuning.fused.group import Group
from tunesmith.tuning.fused.trial import Adapter


class Alone(nn.Module):
    """A policy where an engine is expected: there is nothing around it."""

    def __init__(self, policy: Policy) -> None:
        super().__init__()
        self.module = policy

    def forward(self, *batch: Any) -> Any:
        """The policy's."""
        return self.module(*batch)


def export(group: Group, adapter: Adapter, recipe: Recipe, base: BaseRef, run: RunFolder, metrics: Path) -> Path:
    """Writes the artifact of a trial; the group trains nothing after it, because its base becomes the trial's.

    Args:
        recipe: the trial's.
        run: where the artifact goes.
        metrics: the trial's own.

    Raises:
        ReceiptError: PEFT's model does not say what the shared one says of held-out rows, or the parity receipt failed.
    """
    data = group.data
    _, store, rows = parity.choose_rows(data, recipe.eval.parity_rows)
    shared = group.logps_of(adapter, store, rows)
    engine = Alone(
        Policy(
            _as_peft(group, adapter, recipe, base), attention.choose(recipe.model.attention, group.device, group.dtype)
        )
    )
    plain = parity.training_logps(engine, store, rows, group.length, group.device)
    apart = max(float(np.abs(one - other).max()) for one, other in zip(shared, plain, strict=True))
    if not apart <= parity.TOLERANCES[group.dtype].largest:
        raise ReceiptError(
            f"the trial's adapter in PEFT differs by {apart:.2g} nats from the one that was trained",
            "Use tune.execution: isolated, and report this.",
        )
    run.create()
    shutil.copyfile(metrics, run.metrics)
    plan = BatchPlan.of(recipe, data, 1)
    if not dist.is_initialized():
        dist.init_process_group("gloo", store=HashStore(), rank=0, world_size=1)
    write_mask_receipt(run.receipts, data, plan.epoch_packs(0), load_tokenizer(base))
    write_artifact(engine, recipe, base, run, data, group.device)
    return run.artifact


@torch.no_grad()
def _as_peft(group: Group, adapter: Adapter, recipe: Recipe, base: BaseRef) -> nn.Module:
    """The group's base, bare again, with the trial's adapter as PEFT's."""
    spec = recipe.adaptation
    assert isinstance(spec, Lora), f"{spec.kind} is not trained side by side"
    model = lora.adapt(
        group.bare(),
        spec,
        base=base.loadable,
        revision=base.revision,
        seed=recipe.train.seed,
        dtype=group.dtype,
    )
    weights = dict(model.named_parameters())
    for name in group.layout.spans:
        first, second = (f"base_model.model.{name}.{matrix}" for matrix in (A, B))
        if first in weights:
            a_RD, b_OR = adapter.matrices(name)
            weights[first].copy_(a_RD)
            weights[second].copy_(b_OR)
    return model.to(group.device)
