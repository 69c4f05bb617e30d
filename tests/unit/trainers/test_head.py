"""Label log-probabilities and their gradients equal the log-softmax over whole logits."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from tunesmith.trainers import head
from tunesmith.trainers.head import LogitTransform


@pytest.mark.parametrize(
    "transform", [LogitTransform(), LogitTransform(0.5), LogitTransform(1.0, 3.0), LogitTransform(0.5, 3.0)]
)
@pytest.mark.parametrize("is_frozen", [True, False])
@pytest.mark.parametrize("has_bias", [True, False])
def test_equals_log_softmax(
    transform: LogitTransform, is_frozen: bool, has_bias: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(head, "CHUNK_BYTES", 4 * 50 * 3)  # chunks of three labels
    torch.manual_seed(0)
    hidden = torch.randn(11, 8, dtype=torch.float64, requires_grad=True)
    layer = nn.Linear(8, 50, bias=has_bias).double().requires_grad_(not is_frozen)
    targets, grad = torch.randint(50, (11,)), torch.randn(11)

    plain = transform.apply(layer(hidden).float()).log_softmax(1)[torch.arange(11), targets]
    wanted = torch.autograd.grad((plain * grad).sum(), [hidden, *(p for p in layer.parameters() if p.requires_grad)])
    head.install(layer, transform)
    logps = layer(hidden, targets)
    found = torch.autograd.grad((logps * grad).sum(), [hidden, *(p for p in layer.parameters() if p.requires_grad)])

    torch.testing.assert_close(logps, plain, atol=1e-6, rtol=1e-6)
    for ours, theirs in zip(found, wanted, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)


def test_without_targets_it_returns_logits() -> None:
    layer = nn.Linear(4, 6)
    hidden = torch.randn(3, 4)
    wanted = layer(hidden)
    head.install(layer, LogitTransform())
    torch.testing.assert_close(layer(hidden), wanted)


def test_a_second_backward_pass_gives_the_same_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(head, "CHUNK_BYTES", 4 * 20 * 3)
    hidden = torch.randn(7, 4, requires_grad=True)
    weight = torch.randn(20, 4, requires_grad=True)
    logps = head.label_logps(hidden, weight, None, torch.arange(7), LogitTransform(1.0, 2.0))
    first = torch.autograd.grad(logps.sum(), [hidden, weight], retain_graph=True)
    second = torch.autograd.grad(logps.sum(), [hidden, weight])
    for one, other in zip(first, second, strict=True):
        torch.testing.assert_close(one, other)
