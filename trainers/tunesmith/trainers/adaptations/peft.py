"""Any of PEFT's adapter types, named in the recipe with PEFT's own settings.

The settings are checked against the type's config class before anything is built. What is trained is initialised from the
recipe's seed and then rounded to the training format, as in `lora`. Weights are touched through PEFT alone.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
from collections.abc import Iterable
from typing import Any, get_type_hints

import torch
from torch import nn

from tunesmith.cluster.errors import ModelError
from tunesmith.cluster.recipe.schema import Peft
from tunesmith.trainers.adaptations import lora, peft_types
from tunesmith.trainers.moe import moe_blocks

_OURS = {
    "auto_mapping": "PEFT writes it",
    "base_model_name_or_path": "it is what model.base says",
    "inference_mode": "it is off while training and on in the artifact",
    "peft_version": "PEFT writes it",
    "revision": "it is what model.revision says",
    "task_type": "it is CAUSAL_LM",
}
_KEY = "adaptation.config"


def adapt(
    model: nn.Module,
    spec: Peft,
    *,
    base: str,
    revision: str | None,
    seed: int,
    dtype: torch.dtype,
    for_training: bool = True,
) -> nn.Module:
    """Wraps a causal language model with the adapter; only its weights are trainable, and they are in `dtype`.

    Args:
        model: a Transformers model, on any device.
        base: hub id or folder that plain PEFT will load this adapter's base from.
        revision: commit of a hub id.
        seed: of the first weights, which are the same on every rank.
        dtype: training format of what is trained.
        for_training: False builds the types too that this loop cannot train, for the planner.

    Raises:
        ModelError: the settings are wrong, do not fit the model, or name a type that cannot be trained.
    """
    from peft import get_peft_model

    if for_training:
        peft_types.refuse(spec)
    config = peft_config(spec)
    _resolve_targets(model, config)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        try:
            wrapped = get_peft_model(model, config, autocast_adapter_dtype=False)  # type: ignore[arg-type]
        except (ValueError, TypeError, KeyError, ImportError) as error:
            raise _unfit(spec, error) from error
    config.base_model_name_or_path, config.revision = base, revision  # get_peft_model puts the local path there
    for parameter in wrapped.parameters():
        if parameter.requires_grad and parameter.is_floating_point():
            parameter.data = parameter.data.to(dtype)
    if for_training and not any(parameter.requires_grad for parameter in wrapped.parameters()):
        raise ModelError(f"{_KEY}: {spec.peft_type} with these settings leaves nothing to train")
    return wrapped


def peft_config(spec: Peft) -> Any:
    """The type's config, once every setting is known to be one of its keys and of the right type.

    Raises:
        ModelError: naming the setting, and the nearest type or key.
    """
    from peft import PEFT_TYPE_TO_CONFIG_MAPPING, TaskType

    classes = {kind.value: made for kind, made in PEFT_TYPE_TO_CONFIG_MAPPING.items()}
    made = classes.get(spec.peft_type)
    if made is None:
        raise ModelError(
            f"{_KEY}.peft_type: {spec.config['peft_type']!r} is none of PEFT's types",
            _nearest(spec.peft_type, classes),
        )
    given = {key: value for key, value in spec.config.items() if key != "peft_type"}
    if ours := sorted(given.keys() & _OURS.keys()):
        raise ModelError(f"{_KEY}.{ours[0]}: not to be set here: {_OURS[ours[0]]}", "Take it out.")
    keys = {field.name for field in dataclasses.fields(made) if field.init} - _OURS.keys() - {"peft_type"}
    if unknown := [key for key in given if key not in keys]:
        raise ModelError(f"{_KEY}.{unknown[0]}: {made.__name__} has no such key", _nearest(unknown[0], keys))
    hints = get_type_hints(made)
    values = {key: _typed(key, value, hints[key], made.__name__) for key, value in given.items()}
    try:
        return made(task_type=TaskType.CAUSAL_LM, **values)
    except (ValueError, TypeError, ImportError) as error:
        raise _unfit(spec, error) from error


def _resolve_targets(model: nn.Module, config: Any) -> None:
    """Puts into `target_modules` what PEFT is to match; every name of a list has to match, which PEFT does not ask."""
    targets = getattr(config, "target_modules", None)
    if not targets or config.is_adaption_prompt:
        return  # PEFT has targets of its own for many architectures, and names that type's by another rule
    if targets == lora.ALL_LINEAR:
        config.target_modules = lora.peft_targets(model, targets)
        return
    key, is_text, modules = f"{_KEY}.target_modules", isinstance(targets, str), dict(model.named_modules())
    for target in [targets] if is_text else sorted(targets):
        found = lora.pick(target, modules, regular_expression=is_text, key=key)
        if not found:
            raise lora.nothing(target, (name for name, module in modules.items() if not list(module.children())), key)
        if moe_blocks(model) and (fused := [name for name in found if name.rpartition(".")[2] in lora.FUSED]):
            raise ModelError(
                f"{key}: {target!r} matches {fused[0]} of a mixture of experts, and PEFT takes that name for its fused experts",
                "Name layers of the attention.",
            )


def _typed(key: str, value: Any, hint: Any, config_class: str) -> Any:
    """The value as the annotation of PEFT's config class has it."""
    from pydantic import ConfigDict, PydanticUserError, TypeAdapter, ValidationError

    try:
        adapter = TypeAdapter(hint, config=ConfigDict(arbitrary_types_allowed=True))
    except PydanticUserError:  # the annotation is a class with a config of its own
        adapter = TypeAdapter(hint)
    try:
        return adapter.validate_json(json.dumps(value), strict=True)
    except (ValidationError, TypeError) as error:
        reasons = [one["msg"].lower() for one in error.errors()] if isinstance(error, ValidationError) else [str(error)]
        raise ModelError(
            f"{_KEY}.{key}: {value!r} does not fit {config_class}: {'; or '.join(dict.fromkeys(reasons))}"
        ) from error


def _nearest(name: str, names: Iterable[str]) -> str:
    names = sorted(names)
    near = difflib.get_close_matches(name, names, 3, 0.5) or [each for each in names if name.lower() in each.lower()]
    return f"Nearest: {', '.join(near)}." if near else f"There are: {', '.join(names)}."


def _unfit(spec: Peft, error: Exception) -> ModelError:
    reason = " ".join(str(error).split())[:400]
    return ModelError(f"{_KEY}: PEFT cannot build {spec.peft_type}: {reason}")
