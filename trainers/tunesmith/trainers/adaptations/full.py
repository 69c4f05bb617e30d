"""Full fine-tuning: every weight may change."""

from __future__ import annotations

from torch import nn

from tunesmith.cluster.recipe.schema import Full


def adapt(model: nn.Module, spec: Full) -> nn.Module:
    """Makes every parameter trainable and returns the same model."""
    del spec  # it has no settings: the kind says it all
    return model.requires_grad_(True)
