"""From a recipe's base to a model that is ready to train: loaded, sharded, quantised, adapted.

Nothing heavy is imported before it is needed: the driver resolves and checks a base without torch.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tunesmith.cluster.base import BaseRef, tensor_shapes
from tunesmith.cluster.errors import ModelError
from tunesmith.cluster.recipe.schema import Lora, Peft, Recipe
from tunesmith.trainers import zero
from tunesmith.trainers.base import resolve_base

if TYPE_CHECKING:
    import torch
    from torch import nn
    from transformers import PreTrainedTokenizerBase

__all__ = [
    "BaseRef",
    "build",
    "check_adaptation",
    "load_frozen",
    "load_tokenizer",
    "quantization_config",
    "resolve_base",
    "skeleton",
]


def load_tokenizer(base: BaseRef) -> PreTrainedTokenizerBase:
    """The base's own tokenizer, fast where there is one; no code of the model's repository is run.

    Raises:
        ModelError: its files cannot be read.
    """
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(base.path)
    except (OSError, ValueError, KeyError) as error:
        raise ModelError(f"model.base: the tokenizer in {base.path} cannot be loaded: {error}") from error


def check_adaptation(recipe: Recipe, base: BaseRef) -> None:
    """Fails before anything is launched when the adaptation does not fit the base.

    Cheap where it can be: when the names in the weight files show that every target matches a matrix, torch is not
    imported; only otherwise is the model built without weights, for the exact answer.

    Raises:
        ModelError: a target matches no module (the message lists the nearest names); or settings of PEFT's are wrong, do
            not fit the model, or cannot be trained.
    """
    spec = recipe.adaptation
    if isinstance(spec, Peft):
        _check_peft(recipe, spec, base)
        return
    if not isinstance(spec, Lora) or _surely_matches(spec.target_modules, base):
        return
    from tunesmith.trainers.adaptations import lora

    lora.matches(skeleton(base), spec.target_modules)


def _check_peft(recipe: Recipe, spec: Peft, base: BaseRef) -> None:
    """Builds the adapter on a model without weights: what is wrong with it, PEFT says then."""
    from tunesmith.trainers.adaptations import peft_types

    peft_types.refuse(spec, zero.stage(recipe.cluster), recipe.model.quantization)
    with quiet_libraries():
        import torch

        from tunesmith.trainers.adaptations import peft

        # NotImplementedError: a few types make their first weights from numbers, which a worker will have
        with suppress(NotImplementedError):
            peft.adapt(skeleton(base), spec, base=base.loadable, revision=base.revision, seed=0, dtype=torch.float32)


@contextmanager
def quiet_libraries() -> Iterator[None]:
    """Within it libraries warn of nothing: the workers will hear it again, and their output goes to the run's log."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


def skeleton(base: BaseRef) -> nn.Module:
    """The base's modules without weights (on the meta device), for questions about its structure."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    with _model_errors(base), torch.device("meta"):
        return AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(base.path))


def build(
    recipe: Recipe,
    base: BaseRef,
    *,
    device: torch.device | str,
    dtype: torch.dtype,
    zero3: bool,
    deepspeed_config: dict[str, Any] | None = None,
) -> nn.Module:
    """The model that is trained: a Transformers model (`full`) or a PEFT model around it (`lora`, `peft`).

    The same recipe gives the same first weights on every rank, ZeRO stage and world size. Under ZeRO-3 the weights are
    sharded as they are loaded, so torch.distributed must be initialised; a quantised base is loaded whole on every rank
    (half a byte a parameter) and sharded by `deepspeed.initialize`. Mixture-of-experts blocks become ZeRO-3 leaves.

    Args:
        device: where the weights go; ZeRO-3 puts its shards on DeepSpeed's own device or where the offload says.
        dtype: training format of every weight that is not quantised, and of the storage of those that are.
        zero3: whether the loop will run ZeRO-3.
        deepspeed_config: the loop's DeepSpeed dict, for its ZeRO-3 settings (offload); None takes plain ZeRO-3.

    Raises:
        ModelError: Transformers does not know the architecture, weights are missing, or a LoRA target matches nothing.
    """
    if isinstance(recipe.adaptation, Peft):
        from tunesmith.trainers.adaptations import peft_types

        peft_types.refuse(recipe.adaptation, 3 if zero3 else 0, recipe.model.quantization)
    shards_at_load = zero3 and recipe.model.quantization is None
    zero3_config = (deepspeed_config or _zero3_config(dtype)) if shards_at_load else None
    with _zero3_alive(zero3_config):  # Transformers shards what it loads, and PEFT gathers what it reads of it
        model = _load(recipe, base, device, dtype, is_sharded=shards_at_load)
        return adapt(model, recipe, base=base.loadable, revision=base.revision, dtype=dtype)


def load_frozen(recipe: Recipe, base: BaseRef, device: torch.device | str, dtype: torch.dtype) -> Any:
    """The whole base on one device with nothing to train, for adapters that are not PEFT's own.

    Raises:
        ModelError: as `build`.
    """
    model = _load(recipe, base, device, dtype, is_sharded=False).requires_grad_(False)
    _checkpoint_activations(model, recipe)
    return model


def adapt(
    model: Any, recipe: Recipe, *, base: str, revision: str | None, dtype: torch.dtype, for_training: bool = True
) -> nn.Module:
    """A loaded base made ready to train: adapted, its experts ZeRO-3 leaves, its activations checkpointed or not.

    Args:
        for_training: False builds the adapters too that this loop cannot train, for the planner.

    Raises:
        ModelError: a LoRA target matches nothing, or PEFT's settings do not fit.
    """
    from tunesmith.trainers import moe
    from tunesmith.trainers.adaptations import full, lora, peft

    spec = recipe.adaptation
    first: dict[str, Any] = {"base": base, "revision": revision, "seed": recipe.train.seed, "dtype": dtype}
    if isinstance(spec, Lora):
        adapted = lora.adapt(model, spec, **first)
    elif isinstance(spec, Peft):
        adapted = peft.adapt(model, spec, **first, for_training=for_training)
    else:
        adapted = full.adapt(model, spec)
    moe.make_leaves(adapted)
    _checkpoint_activations(model, recipe)
    return adapted


def _checkpoint_activations(model: Any, recipe: Recipe) -> None:
    if recipe.train.gradient_checkpointing:
        # not the re-entrant kind: it loses the router's gradient and needs inputs that require one
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})


def quantization_config(kind: str | None, dtype: torch.dtype) -> Any:
    """Transformers' quantisation settings: nf4 with double quantisation (Dettmers et al. 2023), LLM.int8 (Dettmers et al.
    2022), or None.

    The 4-bit codes are stored in tensors of the training format, which ZeRO-3 can shard and gather like any weight.
    """
    if kind is None:
        return None
    from transformers import BitsAndBytesConfig

    if kind == "int8":
        return BitsAndBytesConfig(load_in_8bit=True)
    assert kind == "nf4", f"unknown quantisation {kind}"
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
        bnb_4bit_quant_storage=dtype,
    )


def keep_codes(model: nn.Module) -> None:
    """Stops bitsandbytes from repacking 4-bit weights in place.

    On CPUs with AVX512-BF16 its layers change the stored codes at the first evaluation without gradients, which breaks
    ZeRO-3 shards and computes in bfloat16 whatever the compute format.
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False  # type: ignore[assignment]


def _load(recipe: Recipe, base: BaseRef, device: torch.device | str, dtype: torch.dtype, *, is_sharded: bool) -> Any:
    import torch
    from transformers import AutoModelForCausalLM

    quantization = quantization_config(recipe.model.quantization, dtype)
    with _model_errors(base), torch.random.fork_rng(devices=[]):
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            base.path,
            dtype=dtype,
            quantization_config=quantization,
            device_map={"": device} if quantization else None,
            output_loading_info=True,
        )
    model, info = loaded
    _require_all_weights(model, info, base)
    keep_codes(model)
    return model if is_sharded or quantization else model.to(device)


def _require_all_weights(model: Any, info: dict[str, Any], base: BaseRef) -> None:
    """Transformers fills missing weights with random numbers and a warning; here it is an error."""
    tied = set(getattr(model, "all_tied_weights_keys", None) or {})
    missing = sorted(set(info["missing_keys"]) - tied)
    if missing or info["mismatched_keys"]:
        names = [str(name) for name in missing or info["mismatched_keys"]]
        raise ModelError(
            f"model.base: {len(names)} weights of {type(model).__name__} are missing from {base.path} or of another "
            f"shape: {', '.join(names[:3])}{' …' if len(names) > 3 else ''}",
            "Training would start from random numbers there. Is the config the one these weights were saved with?",
        )


def _zero3_config(dtype: torch.dtype) -> dict[str, Any]:
    import torch

    return {
        "train_micro_batch_size_per_gpu": 1,
        "zero_optimization": {"stage": 3},
        "bf16": {"enabled": dtype == torch.bfloat16},
        "fp16": {"enabled": dtype == torch.float16},
    }


@contextmanager
def _zero3_alive(config: dict[str, Any] | None) -> Iterator[None]:
    """Within it Transformers and PEFT know of ZeRO-3, by a global reference that must not outlive the building."""
    if config is None:
        yield
        return
    from transformers.integrations import deepspeed as hf

    alive = hf.HfDeepSpeedConfig(config)
    try:
        yield
    finally:
        hf.unset_hf_deepspeed_config()
        del alive


@contextmanager
def _model_errors(base: BaseRef) -> Iterator[None]:
    """Transformers' complaints about a model folder, as ours."""
    try:
        yield
    except (OSError, ValueError, KeyError, ImportError) as error:
        reason = " ".join(str(error).split())[:400]
        raise ModelError(f"model.base: {base.reference} ({base.path}) cannot be loaded: {reason}") from error


def _surely_matches(targets: str | list[str], base: BaseRef) -> bool:
    """Whether the weight files alone prove that every target names a matrix. Names in a mixture-of-experts model prove
    nothing: experts are fused when they are loaded."""
    if targets == "all-linear":
        return True
    if isinstance(targets, str):
        return False
    shapes = tensor_shapes(Path(base.path))
    if any("experts" in name for name in shapes):
        return False
    names = [name.removesuffix(".weight") for name, shape in shapes.items() if len(shape) == 2]
    return all(any(name.endswith(f".{target}") for name in names) for target in targets)
