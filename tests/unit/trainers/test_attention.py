"""Fast attention paths equal the plain mask, on forests, sliding windows and grouped heads."""

from __future__ import annotations

import pytest
import torch

from tunesmith.trainers import attention
from tunesmith.trainers.batch import Forest

FORESTS = {
    "one": Forest.flat([9]),
    "flat": Forest.flat([5, 1, 7]),
    "shared prompt": Forest((4, 3, 5, 6), (-1, 0, 0, -1)),
    "nested": Forest((4, 2, 3, 3), (-1, 0, 1, 1)),
}


def test_positions_continue_from_the_parent() -> None:
    assert FORESTS["nested"].position_ids().tolist() == [0, 1, 2, 3, 4, 5, 6, 7, 8, 6, 7, 8]


def test_siblings_and_other_roots_are_invisible() -> None:
    visible = Forest((2, 1, 1, 1), (-1, 0, 0, -1)).visible()
    assert visible.int().tolist() == [
        [1, 0, 0, 0, 0],
        [1, 1, 0, 0, 0],
        [1, 1, 1, 0, 0],
        [1, 1, 0, 1, 0],
        [0, 0, 0, 0, 1],
    ]


@pytest.mark.parametrize("forest", FORESTS.values(), ids=FORESTS.keys())
@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize("key_heads", [4, 2])
def test_per_segment_equals_the_plain_mask(forest: Forest, window: int | None, key_heads: int) -> None:
    torch.manual_seed(0)
    length = sum(forest.lengths)
    module = torch.nn.Module()

    def run(path):
        torch.manual_seed(1)
        q, k, v = (torch.randn(1, heads, length, 8, requires_grad=True) for heads in (4, key_heads, key_heads))
        out, _ = path(module, q, k, v, None, forest=forest, scaling=0.3, sliding_window=window)
        (out * torch.randn_like(out)).sum().backward()
        return out.detach(), q.grad, k.grad, v.grad

    for ours, plain in zip(run(attention.per_segment), run(attention.reference), strict=True):
        torch.testing.assert_close(ours, plain, atol=1e-5, rtol=1e-5)
