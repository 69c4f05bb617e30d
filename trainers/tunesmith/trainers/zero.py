"""The DeepSpeed configuration of a recipe, as a pure function."""

from __future__ import annotations

from typing import Any, Literal

from tunesmith.cluster.errors import RecipeError
from tunesmith.cluster.recipe.schema import Cluster, Recipe

Precision = Literal["bf16", "fp16", "fp32"]


def stage(cluster: Cluster) -> int:
    """The ZeRO stage: what the recipe says, or for `auto` 0 on one worker and 2 on several."""
    if cluster.zero == "auto":
        return 0 if cluster.workers == 1 else 2
    return cluster.zero


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


def deepspeed_config(recipe: Recipe, on_gpu: bool) -> dict[str, Any]:
    """The dict that `deepspeed.initialize` takes.

    The optimizer and the learning rate are not in it: the loop owns both. Gradients of bf16 runs accumulate in fp32.
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
        config["data_types"] = {"grad_accum_dtype": "fp32"}
    elif number_format == "fp16":
        config["fp16"] = {"enabled": True, "loss_scale": 0, "initial_scale_power": 16}
    return config


def _zero_section(cluster: Cluster, on_gpu: bool, number_format: Precision) -> dict[str, Any]:
    zero = stage(cluster)
    if zero == 0 and number_format != "fp32":
        # DeepSpeed's 16-bit optimizer without ZeRO accumulates in 16 bits and drifts from the other stages (measured:
        # 0.05 nats after one step); stage 1 keeps fp32 sums and, on one worker, shards nothing
        zero = 1
    section: dict[str, Any] = {"stage": zero, "overlap_comm": on_gpu, "contiguous_gradients": True}
    if zero == 3:
        section["stage3_param_persistence_threshold"] = cluster.zero3_persistence_threshold
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
