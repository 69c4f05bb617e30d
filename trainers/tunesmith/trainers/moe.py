"""Mixture-of-experts blocks: found by structure, made whole for ZeRO-3, and balanced by the router's auxiliary loss.

Shapes: T tokens, E experts.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class MoeBlock:
    """One block that sends each token to a few of its experts."""

    name: str
    block: nn.Module
    router: nn.Module
    """Its forward returns the router logits [T, E], alone or first in a tuple."""
    experts: int
    top_k: int


def find_blocks(model: nn.Module) -> list[MoeBlock]:
    """Every block with several experts and, beside them, a router with one row for each expert.

    Experts are a list of modules, or one module that fuses them in parameters of three dimensions (Transformers 5). No
    class name is looked at, so an architecture that DeepSpeed does not know is found too. Works on ZeRO-3 sharded models.
    """
    found = []
    for name, module in model.named_modules():
        children = dict(module.named_children())
        for experts in children.values():
            count = _count_experts(experts)
            router = _router(children.values(), experts, count) if count else None
            if router is not None:
                found.append(MoeBlock(name, module, router, count, _top_k(module, router, model)))
                break
    return found


def moe_blocks(model: nn.Module) -> list[nn.Module]:
    """The modules of `find_blocks`, in the model's order."""
    return [found.block for found in find_blocks(model)]


def make_leaves(model: nn.Module) -> list[nn.Module]:
    """Tells DeepSpeed to gather each block's weights as one under ZeRO-3; returns the blocks.

    Ranks route their tokens to different experts. Were experts gathered one by one, a rank would wait for a gather that
    another never starts. The flag is the one that `deepspeed.utils.set_z3_leaf_module` sets, on these very instances.
    """
    blocks = moe_blocks(model)
    for block in blocks:
        block._z3_leaf = True  # type: ignore[assignment]
    return blocks


@contextmanager
def router_logits(blocks: Sequence[MoeBlock]) -> Iterator[list[Tensor]]:
    """Collects the router logits [T, E] of every block that runs inside the context, in order, with their graph.

    A recomputation by gradient checkpointing happens in the backward pass, after the context, and is not collected.
    """
    collected: list[Tensor] = []

    def collect(_module: nn.Module, _inputs: Any, output: Any) -> None:
        logits = output[0] if isinstance(output, tuple) else output
        collected.append(logits.reshape(-1, logits.shape[-1]))

    handles = [found.router.register_forward_hook(collect) for found in blocks]
    try:
        yield collected
    finally:
        for handle in handles:
            handle.remove()


def load_balancing_loss(logits: Sequence[Tensor], top_k: int, counted_T: Tensor | None = None) -> Tensor:
    """E · Σ_e f_e · p_e over all layers together; 1·top_k when the experts share the tokens evenly.

    f_e is the mean number of times that a token picks expert e, p_e the mean probability it gives it (Fedus et al. 2021,
    arXiv:2101.03961, equations 4-6). Equal to Transformers' `load_balancing_loss_func`. Only p_e carries a gradient.

    Args:
        logits: router logits [T, E] of each layer.
        counted_T: bool or weights; tokens with 0 (padding) are left out.
    """
    assert logits, "no router logits: the model has no mixture-of-experts block, or none ran"
    experts = logits[0].shape[-1]
    picks_E = torch.zeros(experts, device=logits[0].device)
    probability_E = torch.zeros(experts, device=logits[0].device)
    rows = torch.zeros((), device=logits[0].device)
    for logits_TE in logits:
        probabilities_TE = torch.softmax(logits_TE, dim=-1)
        chosen_TE = torch.zeros_like(probabilities_TE, dtype=torch.float32)
        chosen_TE.scatter_(1, torch.topk(probabilities_TE, top_k, dim=-1).indices, 1.0)
        weight_T1 = (counted_T.float() if counted_T is not None else chosen_TE.new_ones(chosen_TE.shape[0])).unsqueeze(
            1
        )
        picks_E = picks_E + (chosen_TE * weight_T1).sum(0)
        probability_E = probability_E + (probabilities_TE.float() * weight_T1).sum(0)
        rows = rows + weight_T1.sum()
    return experts * torch.sum((picks_E / rows) * (probability_E / rows))


def aux_loss_coef(model: nn.Module, given: float | None) -> float:
    """Weight of the auxiliary loss: the recipe's when given, else the model's own, else 0."""
    if given is not None:
        return given
    return float(getattr(getattr(model, "config", None), "router_aux_loss_coef", None) or 0.0)


def _shape(parameter: nn.Parameter) -> tuple[int, ...]:
    """The whole shape, also of a parameter that ZeRO-3 has sharded."""
    return tuple(getattr(parameter, "ds_shape", parameter.shape))


def _count_experts(module: nn.Module) -> int:
    """Number of experts that a module holds; 0 when it holds none."""
    if isinstance(module, nn.ModuleList):
        return len(module) if len(module) > 1 and len({type(expert) for expert in module}) == 1 else 0
    counts = {_shape(p)[0] for p in _unwrapped(module).parameters(recurse=False) if len(_shape(p)) == 3}
    return counts.pop() if len(counts) == 1 else 0


def _unwrapped(module: nn.Module) -> nn.Module:
    """The module that a PEFT layer stands for."""
    inner = getattr(module, "base_layer", module)
    return _unwrapped(inner) if inner is not module else module


def _router(children: Any, experts: nn.Module, count: int) -> nn.Module | None:
    """The smallest sibling with a matrix of one row for each expert."""
    candidates = [
        child
        for child in children
        if child is not experts
        and any(len(_shape(p)) == 2 and _shape(p)[0] == count for p in _unwrapped(child).parameters(recurse=False))
    ]
    return min(candidates, key=lambda child: sum(_size(p) for p in child.parameters()), default=None)


def _size(parameter: nn.Parameter) -> int:
    return int(torch.Size(_shape(parameter)).numel())


def _top_k(block: nn.Module, router: nn.Module, model: nn.Module) -> int:
    for holder in (router, block, getattr(model, "config", None)):
        for key in ("top_k", "num_experts_per_tok", "num_experts_per_token"):
            if isinstance(value := getattr(holder, key, None), int):
                return value
    raise AssertionError(f"{type(block).__name__} does not say how many experts a token goes to")
