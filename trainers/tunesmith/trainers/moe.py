"""Mixture-of-experts blocks: found by structure, made whole for ZeRO-3, and balanced by the router's auxiliary loss.

Shape suffixes: T tokens, E experts.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn


def moe_blocks(model: nn.Module) -> list[nn.Module]:
    """Every block with several experts and, beside them, a router with one row for each expert, in the model's order.

    Experts are a list of modules, or one module that fuses them in parameters of three dimensions (Transformers 5). No
    class name is looked at, so an architecture that DeepSpeed does not know is found too, sharded by ZeRO-3 or not.
    """
    return [module for module in model.modules() if _is_block(module)]


def make_leaves(model: nn.Module) -> list[nn.Module]:
    """Tells DeepSpeed to gather each block's weights as one under ZeRO-3; returns the blocks.

    Ranks route their tokens to different experts. Were experts gathered one by one, a rank would wait for a gather that
    another never starts. The flag is the one that `deepspeed.utils.set_z3_leaf_module` sets, on these very instances.
    """
    blocks = moe_blocks(model)
    for block in blocks:
        block._z3_leaf = True  # type: ignore[assignment]
    return blocks


def load_balancing_loss(router_logits: Sequence[Tensor], top_k: int, counted_T: Tensor | None = None) -> Tensor:
    """E · Σ_e f_e · p_e over all layers together; `top_k` when the experts share the tokens evenly.

    f_e is the mean number of times that a token picks expert e, p_e the mean probability it gives it (Fedus et al.
    2021, arXiv:2101.03961, equations 4-6). Equal to Transformers' `load_balancing_loss_func`. Only p_e carries a
    gradient.

    Args:
        router_logits: [T, E] of each layer.
        top_k: experts that each token goes to.
        counted_T: weight of each token; those with 0 (padding) are left out. None counts all.

    Returns:
        A float32 scalar.
    """
    assert router_logits, "no router logits: the model has no mixture-of-experts block, or none ran"
    experts = router_logits[0].shape[-1]
    picks_E = torch.zeros(experts, device=router_logits[0].device)
    probability_E = torch.zeros_like(picks_E)
    tokens = picks_E.new_zeros(())
    for logits_TE in router_logits:
        probabilities_TE = torch.softmax(logits_TE, dim=-1)
        picked_TE = torch.zeros_like(probabilities_TE, dtype=torch.float32)
        picked_TE.scatter_(1, torch.topk(probabilities_TE, top_k, dim=-1).indices, 1.0)
        weight_T1 = torch.ones_like(picked_TE[:, :1]) if counted_T is None else counted_T.float().unsqueeze(1)
        picks_E = picks_E + (picked_TE * weight_T1).sum(0)
        probability_E = probability_E + (probabilities_TE.float() * weight_T1).sum(0)
        tokens = tokens + weight_T1.sum()
    return experts * torch.sum((picks_E / tokens) * (probability_E / tokens))


def _is_block(module: nn.Module) -> bool:
    children = list(module.children())
    return any(
        count and _has_router((child for child in children if child is not experts), count)
        for experts in children
        if (count := _count_experts(experts)) is not None
    )


def _count_experts(module: nn.Module) -> int | None:
    """Number of experts that a module holds; None when it holds none."""
    if isinstance(module, nn.ModuleList):
        return len(module) if len(module) > 1 and len({type(expert) for expert in module}) == 1 else None
    counts = {_shape(p)[0] for p in _own_parameters(module) if len(_shape(p)) == 3}
    return counts.pop() if len(counts) == 1 else None


def _has_router(siblings: Iterable[nn.Module], experts: int) -> bool:
    """Whether a sibling owns a matrix of one row for each expert."""
    return any(
        len(_shape(parameter)) == 2 and _shape(parameter)[0] == experts
        for sibling in siblings
        for parameter in _own_parameters(sibling)
    )


def _own_parameters(module: nn.Module) -> Iterable[nn.Parameter]:
    """A module's parameters without its children's; a PEFT layer's are those of the layer it wraps."""
    while isinstance(inner := getattr(module, "base_layer", None), nn.Module):
        module = inner
    return module.parameters(recurse=False)


def _shape(parameter: nn.Parameter) -> tuple[int, ...]:
    """The whole shape, also of a parameter that ZeRO-3 has sharded."""
    return tuple(getattr(parameter, "ds_shape", parameter.shape))
