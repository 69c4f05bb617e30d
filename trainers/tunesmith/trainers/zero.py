"""The DeepSpeed configuration of a recipe, as a pure function."""

from __future__ import annotations

from typing import Any, Literal

from tunesmith.cluster.errors import RecipeError
from tunesmith.cluster.recipe.schema import Cluster, Recipe

Precision = Literal["bf16", "fp16", "fp32"]


def stage(cluster: Cluster) -> int:
    """The ZeRO stage: what the recipe says, or for `auto` 0 on one worker and 2 on several."""
    if cluster.zero == "auto":
        return 0 if cluster.most_workers == 1 else 2
    return cluster.zero


def engine_stage(cluster: Cluster, number_format: Precision) -> int:
    """The stage that DeepSpeed is given.

    Its 16-bit optimizer without ZeRO accumulates in 16 bits and drifts from the other stages (measured: 0.05 nats after
    one step); stage 1 keeps fp32 sums and, on one worker, shards nothing.
    """
    return max(1, stage(cluster)) if number_format != "fp32" else stage(cluster)


def precision(recipe: Recipe, on_gpu: bool) -> Precision:
    """The number format: what the recipe says, or for `auto` bf16 on GPUs and fp32 on CPUs.

    Raises:
        RecipeError: fp16 was asked for on a CPU, where DeepSpeed has no loss scaling.
    """
    if recipe.train.precision == "fp16" and not on_gpu:
        raise RecipeError("train.precision: fp16 needs GPUs, and this run is on CPUs", "Use auto, bf16 or fp32.")
    if recipe.train.precision == "auto":
        return "bf16" if on_gpu else "fp32"
    return recipe.train.precision


MOST_BUCKET_ELEMENTS = 100_000_000
"""Gradients that are reduced at once: DeepSpeed's own 500 million would hold 1-2 GB of buffer."""


MOST_LIVE_ELEMENTS = 1_000_000_000
"""Weights that ZeRO-3 keeps gathered because they are needed again soon."""
PREFETCH_ELEMENTS = 50_000_000
"""Weights that ZeRO-3 gathers ahead."""
SUBGROUP_ELEMENTS = 1_000_000_000
"""Weights of a shard that ZeRO-3 updates at once."""


def gradient_item(stage: int, item: int, accumulation: int) -> int:
    """Bytes of a gradient as its shard is held: fp32 where several are summed."""
    return item if stage == 3 and accumulation == 1 else 4


def bucket_elements(trainable: int) -> int:
    """Elements of DeepSpeed's buffers for reducing gradients: never more than there are gradients."""
    return max(1, min(MOST_BUCKET_ELEMENTS, trainable))


def with_buckets(config: dict[str, Any], trainable: int) -> dict[str, Any]:
    """The DeepSpeed dict with its gradient buffers sized for so many trainable parameters."""
    zero_section = {**config["zero_optimization"], "reduce_bucket_size": bucket_elements(trainable)}
    return {**config, "zero_optimization": zero_section}


def deepspeed_config(recipe: Recipe, on_gpu: bool) -> dict[str, Any]:
    """The dict that `deepspeed.initialize` takes.

    The optimizer and the learning rate are not in it: the loop owns both. Gradients of bf16 runs are summed in fp32; under
    ZeRO-3 a single micro-batch leaves nothing to sum, and its gradients stay in 16 bits, as they were sent.
    """
    number_format = precision(recipe, on_gpu)
    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": 1,  # the loop's own batches; DeepSpeed only multiplies it into statistics
        "gradient_accumulation_steps": recipe.train.gradient_accumulation_steps,
        "gradient_clipping": recipe.train.max_grad_norm,
        "steps_per_print": 2**31,
        "zero_optimization": _zero_section(recipe.cluster, on_gpu, number_format),
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
    }
    if number_format == "bf16":
        config["bf16"] = {"enabled": True}
        if gradient_item(config["zero_optimization"]["stage"], 2, recipe.train.gradient_accumulation_steps) == 4:
            config["data_types"] = {"grad_accum_dtype": "fp32"}
    elif number_format == "fp16":
        config["fp16"] = {"enabled": True, "loss_scale": 0, "initial_scale_power": 16}
    return config


def _zero_section(cluster: Cluster, on_gpu: bool, number_format: Precision) -> dict[str, Any]:
    zero = engine_stage(cluster, number_format)
    section: dict[str, Any] = {"stage": zero, "overlap_comm": on_gpu, "contiguous_gradients": True}
    if zero == 3:
        section["stage3_param_persistence_threshold"] = cluster.zero3_persistence_threshold
        section["stage3_max_live_parameters"] = MOST_LIVE_ELEMENTS
        section["stage3_max_reuse_distance"] = MOST_LIVE_ELEMENTS
        section["stage3_prefetch_bucket_size"] = PREFETCH_ELEMENTS
        section["sub_group_size"] = SUBGROUP_ELEMENTS
        section["stage3_gather_16bit_weights_on_model_save"] = False
    if cluster.offload == "none":
        return section
    place: dict[str, Any] = {"device": cluster.offload}
    if cluster.offload == "nvme":
        place["nvme_path"] = cluster.nvme_path
    else:
        place["pin_memory"] = on_gpu
    section["offload_optimizer"] = place
    if zero == 3:
        section["offload_param"] = dict(place)
    return section
