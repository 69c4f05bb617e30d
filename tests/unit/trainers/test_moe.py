"""Mixture-of-experts blocks are found by structure, and the balancing loss is Transformers'."""

from __future__ import annotations

import pytest
import tiny_models
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import AutoModelForCausalLM
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

from tunesmith.trainers import moe


@pytest.mark.parametrize("kind", ["mixtral", "qwen3_moe"])
@pytest.mark.parametrize("wrapped", [False, True])
def test_blocks_of_known_models_are_found(kind: str, wrapped: bool) -> None:
    model = AutoModelForCausalLM.from_config(tiny_models.config(kind))
    if wrapped:
        model = get_peft_model(model, LoraConfig(target_modules="all-linear"))
    blocks = moe.make_leaves(model)
    assert [type(block).__name__.endswith("SparseMoeBlock") for block in blocks] == [True, True]
    assert all(block._z3_leaf for block in blocks)
    assert sum(hasattr(module, "_z3_leaf") for module in model.modules()) == 2


@pytest.mark.parametrize("kind", ["llama", "tied"])
def test_dense_models_have_none(kind: str) -> None:
    assert moe.moe_blocks(AutoModelForCausalLM.from_config(tiny_models.config(kind))) == []


def test_a_block_nobody_has_named_is_found() -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.wegweiser = nn.Linear(8, 3, bias=False)
            self.fachleute = nn.ModuleList(nn.Linear(8, 8) for _ in range(3))

    model = nn.Sequential(nn.Linear(8, 8), Block(), nn.ModuleList([nn.Linear(8, 8), nn.Linear(8, 8)]))
    assert moe.moe_blocks(model) == [model[1]]


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("top_k", [1, 2, 4])
def test_load_balancing_loss_is_transformers(top_k: int, masked: bool) -> None:
    generator = torch.Generator().manual_seed(3)
    ours = [torch.randn(12, 8, generator=generator, requires_grad=True) for _ in range(3)]
    theirs = [logits.detach().clone().requires_grad_() for logits in ours]
    mask = (torch.arange(12) < 9) if masked else None
    loss = moe.load_balancing_loss(ours, top_k, mask)
    oracle = load_balancing_loss_func(tuple(theirs), 8, top_k, mask[None] if mask is not None else None)
    loss.backward()
    oracle.backward()
    torch.testing.assert_close(loss, oracle)
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine.grad, other.grad)


def test_even_routing_costs_top_k() -> None:
    # two experts, picked in turn with near certainty: f = p = 1/2 each, so 2 · (1/4 + 1/4) = 1
    logits = torch.tensor([[50.0, 0.0], [0.0, 50.0]])
    assert moe.load_balancing_loss([logits], top_k=1).item() == pytest.approx(1.0)
