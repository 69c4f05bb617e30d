"""Model, adaptation and optimizer inside a DeepSpeed engine."""

from __future__ import annotations

from typing import Any

import deepspeed
import torch
from torch import nn

from tunesmith.cluster.recipe.schema import Recipe
from tunesmith.trainers import attention, models, zero
from tunesmith.trainers.models import BaseRef
from tunesmith.trainers.moe import moe_blocks
from tunesmith.trainers.policy import Policy

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def build_engine(recipe: Recipe, base: BaseRef, device: torch.device) -> Any:
    """The DeepSpeed engine around the policy that the recipe describes. Collective.

    Raises:
        ModelError: if the base does not fit the adaptation.
    """
    on_gpu = device.type == "cuda"
    dtype = DTYPES[zero.precision(recipe, on_gpu)]
    config = zero.deepspeed_config(recipe, on_gpu)
    is_zero3 = zero.stage(recipe.cluster) == 3
    _skip_inference_kernel()  # before the model: under ZeRO-3 building it starts DeepSpeed
    model = models.build(recipe, base, device=device, dtype=dtype, zero3=is_zero3, deepspeed_config=config)
    is_moe = bool(moe_blocks(model))
    policy = Policy(
        model,
        attention.choose(recipe.model.attention, device, dtype),
        recipe.model.router_aux_loss_coef if is_moe else None,
    )
    engine, *_ = deepspeed.initialize(
        model=policy,
        optimizer=_optimizer(recipe, policy),
        config=zero.with_buckets(config, _trainable(policy)),
        dist_init_required=False,
    )
    return engine


def _skip_inference_kernel() -> None:
    """Spares CPU workers minutes of compiling, and a lock that one which is killed meanwhile would leave behind for ever:
    DeepSpeed builds this shared-memory kernel when it starts, and only its inference engine calls it."""
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # pyright: ignore[reportAttributeAccessIssue]


def _optimizer(recipe: Recipe, policy: nn.Module) -> torch.optim.Optimizer:
    """AdamW, its moments in 32 or 8 bits; weight decay touches matrices only, as is usual: not biases and norms."""
    train = recipe.train
    trainable = [p for p in policy.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in trainable if _dimensions(p) >= 2], "weight_decay": train.weight_decay},
        {"params": [p for p in trainable if _dimensions(p) < 2], "weight_decay": 0.0},
    ]
    settings: dict[str, Any] = {
        "lr": train.learning_rate,
        "betas": (train.adam_beta1, train.adam_beta2),
        "eps": train.adam_epsilon,
    }
    groups = [group for group in groups if group["params"]]
    if recipe.cluster.offload != "none":
        from deepspeed.ops.adam import DeepSpeedCPUAdam

        return DeepSpeedCPUAdam(groups, adamw_mode=True, **settings)
    if train.optimizer == "adamw_8bit":
        from bitsandbytes.optim.adamw import AdamW8bit

        return AdamW8bit(groups, **settings)
    return torch.optim.AdamW(groups, fused=True, **settings)


def _trainable(policy: nn.Module) -> int:
    """Trainable weights of the whole model, however they are sharded."""
    return sum(getattr(p, "ds_numel", p.numel()) for p in policy.parameters() if p.requires_grad)


def _dimensions(parameter: nn.Parameter) -> int:
    """Dimensions of the whole parameter, which ZeRO-3 may hold as a flat shard."""
    return len(getattr(parameter, "ds_shape", parameter.shape))
