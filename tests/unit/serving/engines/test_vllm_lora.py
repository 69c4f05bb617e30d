"""The operator for mixed adapters against the formula, and the parts of vLLM that it stands on."""

from __future__ import annotations

import inspect
from importlib.metadata import entry_points

import pytest
import torch
from torch import Tensor

pytest.importorskip("vllm", reason="vLLM is not installed on this machine")

from vllm.lora.punica_wrapper.punica_base import PunicaWrapperBase
from vllm.lora.punica_wrapper.punica_cpu import PunicaWrapperCPU
from vllm.platforms.cpu import CpuPlatform

from tunesmith.serving.engines import vllm_lora

LARGEST, WIDTH, SLICES = 16, 24, (12, 6, 6)


def adapters(ranks: list[int | None]) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    """Stacked as vLLM stacks them: padded with zeros to the largest rank; None is an empty slot."""
    torch.manual_seed(0)
    a = tuple(torch.zeros(len(ranks), 1, LARGEST, WIDTH) for _ in SLICES)
    b = tuple(torch.zeros(len(ranks), 1, width, LARGEST) for width in SLICES)
    for slot, rank in enumerate(ranks):
        for index in range(len(SLICES)):
            a[index][slot, 0, : rank or 0] = torch.randn(rank or 0, WIDTH)
            b[index][slot, 0, :, : rank or 0] = torch.randn(SLICES[index], rank or 0)
    return a, b


def by_the_formula(y: Tensor, x: Tensor, a: tuple[Tensor, ...], b: tuple[Tensor, ...], slots: list[int]) -> Tensor:
    expected = y.clone()
    for t, slot in enumerate(slots):
        if slot >= 0:
            expected[t] += torch.cat([x[t] @ a[i][slot, 0].T @ b[i][slot, 0].T for i in range(len(SLICES))])
    return expected


@pytest.mark.parametrize("few", [0, 10**6], ids=["each adapter apart", "all together"])
@pytest.mark.parametrize(
    ("ranks", "slots"),
    [
        ([4, 8, 16], [0, 1, 2, 0, 1, 2]),
        ([4, 8, 16], [2, -1, 0, -1, -1, 1, 0]),
        ([1, None, 2, 3], [3, 0, 0, 3, -1, 2]),
        ([2, 2], [-1, -1]),
        ([3], [0]),
    ],
)
def test_every_token_gets_its_own_adapter_and_no_other(
    few: int, ranks: list[int | None], slots: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(vllm_lora, "FEW_TOKENS", few)
    a, b = adapters(ranks)
    x, y = torch.randn(len(slots), WIDTH), torch.randn(len(slots), sum(SLICES))
    expected = by_the_formula(y, x, a, b, slots)
    ids = [None if rank is None else slot + 1 for slot, rank in enumerate(ranks)]
    packed = vllm_lora.pack(a, b, SLICES, ids)
    assert len(packed.slots_C) == len(SLICES) * sum(rank or 0 for rank in ranks)
    for _ in range(vllm_lora.STEADY + 3):
        made = y.clone()
        vllm_lora.add_lora(made, x, packed, vllm_lora.tokens_of(torch.tensor(slots)))
        torch.testing.assert_close(made, expected, atol=1e-4, rtol=1e-5)


def test_a_row_of_zeros_within_an_adapter_is_a_row_of_its_rank() -> None:
    a, b = adapters([4])
    a[0][0, 0, 1] = 0
    packed = vllm_lora.pack(a, b, SLICES, [1])
    assert packed.layout == (4, 4, 4)


@pytest.mark.parametrize("padding", [0, 8, 24])
def test_the_head_and_the_embeddings_change_for_the_adapters_alone_that_change_them(padding: int) -> None:
    torch.manual_seed(0)
    wrapper = vllm_lora.PackedLora(32, 8, "cpu")
    slots, vocabulary = [0, -1, 1, 2], 40
    a, b = torch.randn(3, 1, LARGEST, WIDTH), torch.randn(3, 1, vocabulary + 8, LARGEST)
    a[1], b[1] = 0, 0
    wrapper._ids = (1, 2, 3)
    wrapper._sampled = wrapper._tokens = vllm_lora.tokens_of(torch.tensor(slots))
    x, y = torch.randn(4, WIDTH), torch.randn(4, vocabulary + padding)
    expected, made = y.clone(), y.clone()
    width = min(vocabulary + padding, vocabulary + 8)
    for t in (0, 3):
        expected[t, :width] += x[t] @ a[slots[t], 0].T @ b[slots[t], 0, :width].T
    wrapper.add_lora_logits(made, x, a, b, 1.0)
    torch.testing.assert_close(made, expected, atol=1e-4, rtol=1e-5)
    looked_up, y = torch.randn(4, LARGEST), torch.randn(4, vocabulary + 8)
    expected, made = y.clone(), y.clone()
    for t in (0, 3):
        expected[t] += looked_up[t] @ b[slots[t], 0].T
    wrapper.add_lora_embedding(made, looked_up, b)
    torch.testing.assert_close(made, expected, atol=1e-4, rtol=1e-5)


def test_a_slot_with_another_adapter_is_packed_anew() -> None:
    wrapper = vllm_lora.PackedLora(32, 8, "cpu")
    a, b = adapters([4, 8])
    x = torch.randn(3, WIDTH)
    for ids in ([1, 2], [3, 2]):
        wrapper._ids, wrapper._tokens = tuple(ids), vllm_lora.tokens_of(torch.tensor([0, 1, -1]))
        y = torch.zeros(3, sum(SLICES))
        wrapper.add_lora_linear(y, x, a, b, 1.0, SLICES)
        torch.testing.assert_close(y, by_the_formula(torch.zeros_like(y), x, a, b, [0, 1, -1]), atol=1e-4, rtol=1e-5)
        a[0][0, 0, :4] += 1  # what vLLM does before it puts another id into the slot
        b[1][0, 0, :, :4] *= 2


def test_vllm_is_as_the_operator_expects_it() -> None:
    linear = list(inspect.signature(PunicaWrapperCPU.add_lora_linear).parameters)
    assert linear == [
        "self",
        "y",
        "x",
        "lora_a_stacked",
        "lora_b_stacked",
        "scale",
        "output_slices",
        "buffer",
        "kwargs",
    ]
    for name in ("add_lora_logits", "add_lora_embedding"):
        theirs, ours = (
            list(inspect.signature(getattr(one, name)).parameters) for one in (PunicaWrapperCPU, vllm_lora.PackedLora)
        )
        assert theirs[:-1] == ours[:-1], name
    assert isinstance(PunicaWrapperBase.sampler_indices, property)
    metadata = list(inspect.signature(PunicaWrapperBase.update_metadata).parameters)
    assert metadata[:3] == ["self", "mapping", "lora_index_to_id"]
    assert isinstance(PunicaWrapperBase.token_lora_indices, property)
    assert CpuPlatform.get_punica_wrapper() in (
        "vllm.lora.punica_wrapper.punica_cpu.PunicaWrapperCPU",
        "tunesmith.serving.engines.vllm_lora.PackedLora",
    )


def test_vllm_finds_the_operator_as_a_plugin() -> None:
    found = {one.name: one.value for one in entry_points(group="vllm.general_plugins")}
    if "tunesmith" not in found:
        pytest.skip("the project is not installed here, only on the path")
    assert found["tunesmith"] == "tunesmith.serving.engines.vllm_lora:register"
