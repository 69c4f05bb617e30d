"""The model that a run would build, without its weights: for fake tensors, at any number of layers."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tunesmith.cluster.errors import ModelError
from tunesmith.cluster.recipe.schema import Adapter, Full, Lora, Peft, Recipe

HF_ATTENTION = "tunesmith_planned"
_UNEVEN_KEYS = ("mlp_only_layers", "first_k_dense_replace", "moe_layers", "no_rope_layers")
_ALIKE = {"full_attention", "sliding_attention", "chunked_attention"}
_BY_LAYER = (
    "layers_to_transform",
    "layers_pattern",
    "layer_replication",
    "rank_pattern",
    "alpha_pattern",
    "adapter_layers",
)


def layers_of(config: dict[str, Any]) -> int:
    """Number of decoder layers that a model's config names.

    Raises:
        ModelError: it names none.
    """
    for key in ("num_hidden_layers", "n_layer", "num_layers"):
        if isinstance(config.get(key), int):
            return config[key]
    raise _unbuildable(config, "its config names no number of layers")


def vocabulary_of(config: Mapping[str, Any]) -> int:
    """Width of the logits: what the config says, or its kind's usual one.

    Raises:
        ModelError: no model can be built from it.
    """
    if isinstance(config.get("vocab_size"), int):
        return config["vocab_size"]
    return int(_about(config).vocab_size)


def sample_depths(config: dict[str, Any], adaptation: Full | Adapter) -> tuple[int, int] | None:
    """Two depths whose simulations give every depth; None when layers differ, so that all must be simulated.

    Args:
        config: the model's.
    """
    depth = layers_of(config)
    adapter = _adapter(adaptation)
    uneven = any(config.get(key) for key in _UNEVEN_KEYS) or (config.get("decoder_sparse_step") or 1) > 1
    by_layer = any(adapter.get(key) for key in _BY_LAYER) or any(map(str.isdigit, _targets_by_path(adapter)))
    kinds = config.get("layer_types") or []
    if depth <= 2 or uneven or by_layer or not set(kinds) <= _ALIKE:
        return None
    return 1, 2


def at_depth(config: dict[str, Any], depth: int) -> dict[str, Any]:
    """The config of the same model with fewer or more layers."""
    changed = dict(config)
    for key in ("num_hidden_layers", "n_layer", "num_layers"):
        if key in changed:
            changed[key] = depth
    if changed.get("layer_types"):
        kinds = changed["layer_types"]
        changed["layer_types"] = [kinds[index % len(kinds)] for index in range(depth)]
    return changed


def causal_lm(config: dict[str, Any], dtype: torch.dtype, quantization: str | None) -> Any:
    """A causal language model as `from_pretrained` would load it, with weights of no value.

    Raises:
        ModelError: Transformers does not know the architecture.
    """
    from transformers import AutoModelForCausalLM
    from transformers.initialization import no_init_weights

    about = _about(config)
    try:
        with no_init_weights():
            model = AutoModelForCausalLM.from_config(about, dtype=dtype)
        model.tie_weights()
    except (ValueError, KeyError, TypeError, RuntimeError, ZeroDivisionError) as error:
        raise _unbuildable(config, " ".join(str(error).split())[:300]) from error
    if quantization is not None:
        from tunesmith.trainers.memory.quantized import quantize

        quantize(model, quantization, dtype)
    return model


def load_code(config: Mapping[str, Any]) -> None:
    """Imports what building and running a model of this kind takes; an unknown kind is for `causal_lm` to refuse."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

    from tunesmith.trainers import attention, policy  # noqa: F401

    MODEL_FOR_CAUSAL_LM_MAPPING.get(type(_about(config)), None)


def _about(config: Mapping[str, Any]) -> Any:
    from transformers import AutoConfig

    try:
        return AutoConfig.for_model(**config)
    except Exception as error:  # configs check themselves, with exceptions of many kinds
        raise _unbuildable(config, " ".join(str(error).split())[:300]) from error


def _unbuildable(config: Mapping[str, Any], reason: str) -> ModelError:
    """The error for a config that no model can be built from; of an unknown kind of model, with the nearest names."""
    import difflib

    from transformers import CONFIG_MAPPING

    kind = str(config.get("model_type"))
    kinds = list(CONFIG_MAPPING.keys())
    if kind in kinds:
        return ModelError(f"model.base: no model can be built from its config: {reason}")
    near = " or ".join(difflib.get_close_matches(kind, kinds, 3))
    return ModelError(
        f"model.base: its config's model_type {kind!r} is none that Transformers knows",
        f"Nearest: {near}." if near else "",
    )


def our_policy(recipe: Recipe, config: dict[str, Any], dtype: torch.dtype, on_gpu: bool) -> Callable[[], nn.Module]:
    """Makes the policy of our loop, as `engine.build_engine` does before DeepSpeed gets it."""
    if not isinstance(recipe.adaptation, Full):
        import peft  # noqa: F401  # not among fake tensors: bitsandbytes, which it loads, would keep its tables as such

    from tunesmith.trainers import attention, models, moe
    from tunesmith.trainers.policy import Policy

    def build() -> nn.Module:
        model = causal_lm(config, dtype, recipe.model.quantization)
        adapted = models.adapt(model, recipe, base="planned", revision=None, dtype=dtype)
        path = attention.choose(recipe.model.attention, torch.device("cuda" if on_gpu else "cpu"), dtype)
        coefficient = recipe.model.router_aux_loss_coef if moe.moe_blocks(adapted) else None
        return Policy(adapted, path, coefficient)

    return build


def hf_model(recipe: Recipe, config: dict[str, Any], dtype: torch.dtype, adapter_fp32: bool) -> Callable[[], nn.Module]:
    """Makes what the HF Trainer is given: a Transformers model, or PEFT's wrapper around one.

    Args:
        adapter_fp32: whether adapters are fp32, which is PEFT's default; DeepSpeed keeps its own fp32 copy.
    """

    def build() -> nn.Module:
        from tunesmith.trainers import models

        model = causal_lm(config, dtype, recipe.model.quantization)
        _attend_as_full_rows(model)
        adapter_dtype = torch.float32 if adapter_fp32 else dtype
        return models.adapt(model, recipe, base="planned", revision=None, dtype=adapter_dtype, for_training=False)

    return build


def _attend_as_full_rows(model: Any) -> None:
    """Rows of one length need no mask; Transformers would make one because it sees fake tensors."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    def attend(
        module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **options: Any
    ) -> Any:
        del attention_mask
        output = F.scaled_dot_product_attention(
            query, key, value, is_causal=True, scale=options.get("scaling"), enable_gqa=query.shape[1] != key.shape[1]
        )
        return output.transpose(1, 2).contiguous(), None

    ALL_ATTENTION_FUNCTIONS.register(HF_ATTENTION, attend)
    model.config._attn_implementation = HF_ATTENTION


def _adapter(adaptation: Full | Adapter) -> dict[str, Any]:
    """What PEFT is given of where the adapter goes."""
    if isinstance(adaptation, Peft):
        return adaptation.config
    return {"target_modules": adaptation.target_modules} if isinstance(adaptation, Lora) else {}


def _targets_by_path(adapter: dict[str, Any]) -> str:
    """The targets that are full names or expressions: those with digits in a path may pick single layers."""
    targets = adapter.get("target_modules") or []
    return " ".join(target for target in ([targets] if isinstance(targets, str) else targets) if "." in target)


def rough_parameters(config: Mapping[str, Any]) -> float:
    """Parameters of a decoder by the shape of its matrices: near enough to see whether a model is far too large."""
    hidden = float(config.get("hidden_size") or config.get("n_embd") or 0)
    inner = float(config.get("intermediate_size") or config.get("n_inner") or 4 * hidden)
    experts = float(config.get("num_local_experts") or config.get("num_experts") or 1)
    layer = 3 * hidden * hidden + 3 * hidden * inner * experts
    return layers_of(dict(config)) * layer + 2 * hidden * vocabulary_of(config)
