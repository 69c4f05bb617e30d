"""Low-rank adaptation (Hu et al. 2021, arXiv:2106.09685) through PEFT; over an nf4 base it is QLoRA (arXiv:2305.14314).

Every parameter that is trained is made and initialised in fp32 on the CPU from the recipe's seed and then rounded to
the training format, so that the first weights are the same on every rank, every ZeRO stage and every device.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import nn

from tunesmith.cluster.errors import ModelError
from tunesmith.cluster.recipe.schema import Lora
from tunesmith.trainers.moe import moe_blocks

ALL_LINEAR = "all-linear"
TARGETS_KEY = "adaptation.target_modules"
FUSED = frozenset({"gate", "gate_proj", "up_proj", "down_proj", "w1", "w2", "w3"})
"""Endings that PEFT redirects to the router and the fused experts of a mixture-of-experts model. Those stay frozen: an
update of every expert costs as many times more, and servers of adapters do not take it."""


def adapt(model: nn.Module, spec: Lora, *, base: str, revision: str | None, seed: int, dtype: torch.dtype) -> nn.Module:
    """Wraps a causal language model with LoRA; only the LoRA weights are trainable, and they are in `dtype`.

    Args:
        model: a Transformers model; quantised and ZeRO-3 sharded ones are fine, their weights are not looked at.
        base: hub id or folder that plain PEFT will load this adapter's base from.
        revision: commit of a hub id.

    Raises:
        ModelError: a target matches no module, or a module that LoRA cannot adapt.
    """
    from peft import LoraConfig, TaskType, get_peft_model

    config = LoraConfig(
        task_type=TaskType.CAUSAL_LM,
        r=spec.rank,
        lora_alpha=spec.lora_alpha,  # type: ignore[arg-type]  # PEFT divides it by the rank: a float is fine
        lora_dropout=spec.lora_dropout,
        target_modules=peft_targets(model, spec.target_modules),
        base_model_name_or_path=base,
        revision=revision,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        # autocast_adapter_dtype would keep the adapter in fp32 beside a bf16 base; DeepSpeed holds the fp32 copy
        wrapped = get_peft_model(model, config, autocast_adapter_dtype=False)  # type: ignore[arg-type]
    config.base_model_name_or_path = base  # get_peft_model puts the local path there
    for parameter in wrapped.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.to(dtype)
    return wrapped


def peft_targets(model: nn.Module, targets: str | list[str]) -> str | list[str]:
    """What PEFT is given as `target_modules`: a regular expression as it is, else name endings in sorted order.

    `all-linear` becomes the endings of the linear layers but the head where those endings name nothing else, and full
    names otherwise: PEFT would store a set, whose order changes from run to run.
    """
    matched = matches(model, targets)
    if targets != ALL_LINEAR:
        return targets if isinstance(targets, str) else sorted(set(targets))
    endings = set(_endings(matched))
    same_endings = {name for name, _ in model.named_modules() if _ending(name) in endings}
    return sorted(endings) if same_endings == set(matched) else sorted(matched)


def matches(model: nn.Module, targets: str | list[str]) -> list[str]:
    """Names of the modules that `targets` picks, as PEFT would pick them.

    Raises:
        ModelError: a regular expression, or any one of the name endings, that picks nothing (PEFT lets such an ending
            pass when another one matches); or one that picks a module which is not a linear or embedding layer.
    """
    modules = dict(model.named_modules())
    adaptable = set(_adaptable(model))
    fused = bool(moe_blocks(model))
    if targets == ALL_LINEAR:
        head = _head(model)
        linear = [name for name in adaptable if not isinstance(modules[name], nn.Embedding)]
        found = [name for name in linear if modules[name] is not head and not (fused and _ending(name) in FUSED)]
        if not found:
            raise nothing(targets, adaptable)
        return sorted(found)
    picked: set[str] = set()
    for target in [targets] if isinstance(targets, str) else targets:
        found = pick(target, modules, regular_expression=isinstance(targets, str))
        if not found and targets in _endings(adaptable):
            raise ModelError(
                f"adaptation.target_modules: {target!r} as a text is a regular expression of full module names, and matches none",
                f"For all layers of this name write a list: [{target}].",
            )
        if not found:
            raise nothing(target, adaptable)
        if wrong := [name for name in found if name not in adaptable]:
            raise ModelError(
                f"adaptation.target_modules: {target!r} matches {wrong[0]}, a {type(modules[wrong[0]]).__name__}, "
                "and LoRA adapts linear and embedding layers only",
                f"Layers that can be adapted end in: {', '.join(_endings(adaptable))}.",
            )
        if fused and (wrong := [name for name in found if _ending(name) in FUSED]):
            raise ModelError(
                f"adaptation.target_modules: {target!r} matches {wrong[0]} of a mixture of experts, and PEFT takes "
                "that name for its fused experts",
                f"Layers that can be adapted end in: {', '.join(_endings(adaptable - set(wrong)))}.",
            )
        picked.update(found)
    return sorted(picked)


def pick(target: str, modules: dict[str, nn.Module], regular_expression: bool, key: str = TARGETS_KEY) -> list[str]:
    """Names of the modules that one target picks, as PEFT would pick them: by ending, or by a regular expression.

    Raises:
        ModelError: it is no regular expression; the message begins with `key`.
    """
    if not regular_expression:
        return [name for name in modules if name == target or name.endswith(f".{target}")]
    try:
        pattern = re.compile(target)
    except re.error as error:
        raise ModelError(f"{key}: {target!r} is no regular expression: {error}") from error
    return [name for name in modules if name and pattern.fullmatch(name)]


def _adaptable(model: nn.Module) -> Iterator[str]:
    """Names of the layers that PEFT's LoRA adapts: linear (quantised ones too), GPT-2's Conv1D and embeddings."""
    from transformers.pytorch_utils import Conv1D

    for name, module in model.named_modules():
        if isinstance(module, nn.Linear | nn.Embedding | Conv1D):
            yield name


def _head(model: Any) -> nn.Module | None:
    return model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None


def _ending(name: str) -> str:
    return name.rpartition(".")[2]


def _endings(names: Iterable[str]) -> list[str]:
    return sorted({_ending(name) for name in names})


def nothing(target: Any, adaptable: Iterable[str], key: str = TARGETS_KEY) -> ModelError:
    """The error for a target that matches nothing, with the names that come nearest."""
    names = list(adaptable)
    endings = _endings(names)
    last = re.split(r"[.\\]", str(target))[-1]
    near = difflib.get_close_matches(last, endings, 3, 0.4)
    examples = [next(name for name in names if name.endswith(ending)) for ending in near]
    hint = (
        f"Nearest: {', '.join(f'{end} ({full})' for end, full in zip(near, examples, strict=True))}. " if near else ""
    )
    return ModelError(
        f"{key}: {target!r} matches none of the model's modules",
        f"{hint}Layers that can be adapted end in: {', '.join(endings)}.",
    )
