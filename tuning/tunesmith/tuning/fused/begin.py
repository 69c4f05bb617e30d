"""An adapter's first weights, from PEFT itself: those that the same trial alone would begin with."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from tunesmith.cluster.base import BaseRef
from tunesmith.cluster.recipe.schema import Lora, Recipe
from tunesmith.trainers import models
from tunesmith.trainers.adaptations import lora
from tunesmith.tuning.fused.group import Group
from tunesmith.tuning.fused.trial import Adapter

A, B = "lora_A.default.weight", "lora_B.default.weight"


def as_peft(recipe: Recipe, base: BaseRef, dtype: torch.dtype) -> nn.Module:
    """The trial's model as PEFT builds it, around a base without weights; the adapter has its first ones."""
    spec = recipe.adaptation
    assert isinstance(spec, Lora), f"{spec.kind} is not trained side by side"
    model: Any = _hollow(models.skeleton(base))
    seed = recipe.train.seed
    return lora.adapt(model, spec, base=base.loadable, revision=base.revision, seed=seed, dtype=dtype)


def begin(group: Group, recipe: Recipe, base: BaseRef, known: dict[str, Tensor] | None = None) -> Adapter:
    """A new adapter for this trial; its first weights are rounded to the group's format, as those of a run alone are.

    Args:
        known: first weights that were made before, by what they depend on; a second trial of the same rank, layers and
            seed takes them from there.
    """
    adapter = Adapter(group.layout, recipe, group.device)
    spec = recipe.adaptation
    assert isinstance(spec, Lora), f"{spec.kind} is not trained side by side"
    decisive = repr((spec.rank, spec.target_modules, recipe.train.seed))
    if known is not None and decisive in known:
        with torch.no_grad():
            adapter.weights.copy_(known[decisive])
        return adapter
    weights = dict(as_peft(recipe, base, group.dtype).named_parameters())
    for name in group.layout.spans:
        first, second = (f"base_model.model.{name}.{matrix}" for matrix in (A, B))
        if first in weights:  # else the trial does not adapt this layer, and zeros get no gradient
            a_RD, b_OR = adapter.matrices(name)
            a_RD.copy_(weights[first].detach())
            b_OR.copy_(weights[second].detach())
    if known is not None:
        known[decisive] = adapter.weights.detach().clone()
    return adapter


def _hollow(model: nn.Module) -> nn.Module:
    """Gives every weight of a skeleton its shape on the CPU, and one number's memory: PEFT makes an adapter where its
    layer is, and one on the meta device would have no first weights."""
    for module in model.modules():
        for name, weight in module.named_parameters(recurse=False):
            number = torch.zeros((), dtype=weight.dtype).expand(weight.shape)
            setattr(module, name, nn.Parameter(number, requires_grad=False))
    return model
