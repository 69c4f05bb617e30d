"""The rules of the advice at their borders, without a model or data."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from tunesmith.cluster.errors import ResourceError
from tunesmith.trainers.advise.room import GIB, USABLE, Size, gib, layouts
from tunesmith.trainers.advise.rules import (
    DIFFERENT,
    FEW_ROWS,
    RANKS,
    RULES,
    SIMILAR,
    SMALL_ROWS,
    SMALL_TOKENS,
    Advice,
    Facts,
    recommend,
)

LLAMA_8B = Size(parameters=8_030_261_248, linear=6_979_321_856, lora_per_rank=2_621_440)
LARGE = 2 * RANKS[-1] * LLAMA_8B.lora_per_rank  # tokens, at one bit each, that LoRA of the largest rank just holds
USUAL = Facts(
    objective="sft",
    goal="ability",
    tasks=1,
    rows=20_000,
    trained_tokens=5_000_000,
    bits_per_byte=1.0,
    size=LLAMA_8B,
    gpus=8,
    gpu_gib=79.0,
    gpu="H100-80GB",
    on_gpu=True,
)


def advise(**changes: Any) -> Advice:
    return recommend(dataclasses.replace(USUAL, **changes))


def test_most_tasks_get_lora_of_the_usual_rank():
    advice = advise()
    assert (advice.rule, advice.way, advice.rank, advice.zero) == ("most tasks", "lora", 16, 2)
    assert (advice.objective, advice.learning_rate, advice.epochs) == ("sft", 2e-4, 3)


def test_the_rank_grows_with_the_data_just_when_the_smaller_one_is_full():
    held_by_16 = 2 * 16 * LLAMA_8B.lora_per_rank
    assert advise(trained_tokens=held_by_16).rank == 16
    assert advise(trained_tokens=held_by_16 + 1).rank == 32


@pytest.mark.parametrize(
    ("bits", "closeness"),
    [
        (None, "unknown"),
        (SIMILAR - 0.001, "similar"),
        (SIMILAR, "between"),
        (DIFFERENT, "between"),
        (DIFFERENT + 0.001, "different"),
    ],
)
def test_closeness_changes_at_its_borders(bits: float | None, closeness: str):
    assert dataclasses.replace(USUAL, bits_per_byte=bits).closeness == closeness


@pytest.mark.parametrize(
    ("changes", "rule", "way", "rank"),
    [
        ({"rows": SMALL_ROWS, "trained_tokens": SMALL_TOKENS, "bits_per_byte": 0.5}, "small and similar", "lora", 8),
        ({"rows": SMALL_ROWS + 1, "trained_tokens": SMALL_TOKENS, "bits_per_byte": 0.5}, "most tasks", "lora", 16),
        ({"rows": SMALL_ROWS, "trained_tokens": SMALL_TOKENS + 1, "bits_per_byte": 0.5}, "most tasks", "lora", 16),
        ({"rows": 100, "trained_tokens": 9_000, "bits_per_byte": 2.0}, "small and different", "lora", 16),
        ({"trained_tokens": LARGE + 1, "bits_per_byte": 1.3}, "large and different", "full", None),
        ({"trained_tokens": LARGE, "bits_per_byte": 1.3}, "most tasks", "lora", 128),
        ({"trained_tokens": LARGE + 1, "bits_per_byte": 1.0}, "large", "lora", 128),
        (
            {"trained_tokens": LARGE + 1, "bits_per_byte": None, "goal": "knowledge"},
            "large, for knowledge",
            "full",
            None,
        ),
        ({"trained_tokens": LARGE + 1, "bits_per_byte": 0.5, "goal": "knowledge"}, "large", "lora", 128),
        ({"goal": "format", "bits_per_byte": 2.0}, "format or safety", "lora", 8),
        ({"goal": "safety"}, "format or safety", "lora", 8),
        ({"tasks": 2, "trained_tokens": LARGE + 1, "bits_per_byte": 2.0}, "many tasks on one base", "lora", 128),
    ],
)
def test_each_rule_decides_where_it_should(changes: dict[str, Any], rule: str, way: str, rank: int | None):
    advice = advise(**changes)
    assert (advice.rule, advice.way, advice.rank) == (rule, way, rank)


def test_every_rule_is_reached_and_the_last_one_always_holds():
    assert RULES[-1].holds(USUAL)
    assert len({rule.name for rule in RULES}) == len(RULES)


def test_reasons_carry_the_numbers():
    reason = advise(trained_tokens=LARGE + 1, bits_per_byte=1.3).reasons[0]
    assert "20,000 rows" in reason
    assert "671 Mbit" in reason
    assert "1.30 bits a byte, over 1.2" in reason


def test_what_recipes_cannot_name_yet_is_said():
    small = advise(rows=10, trained_tokens=900, bits_per_byte=0.5)
    assert "the head or the last few layers" in small.reasons[0]
    assert any("DPO" in caution for caution in advise(goal="safety").cautions)
    assert any("unknown" in caution for caution in advise(bits_per_byte=None).cautions)


def test_full_fine_tuning_takes_zero_3_before_it_gives_way_to_lora_and_that_to_qlora():
    changes = {"trained_tokens": LARGE + 1, "bits_per_byte": 2.0}
    whole = {layout.zero: layout.gib for layout in advise(**changes).considered if layout.way == "full"}
    just = whole[3] / USABLE * 1.0001
    assert advise(**changes).zero == 2
    assert (advise(**changes, gpu_gib=just).way, advise(**changes, gpu_gib=just).zero) == ("full", 3)
    smaller = advise(**changes, gpu_gib=just * 0.99)
    assert (smaller.way, smaller.rank) == ("lora", 128)
    assert any("Full fine-tuning does not fit: it takes 15 GiB a GPU" in reason for reason in smaller.reasons)
    alone = advise(**changes, gpus=1, gpu_gib=16.0)
    assert (alone.way, alone.zero) == ("qlora", 0)


def test_what_fits_nowhere_is_refused_with_the_arithmetic():
    with pytest.raises(ResourceError) as refused:
        advise(gpus=1, gpu_gib=4.0)
    assert "LoRA does not fit: it takes 15.6 GiB a GPU and may take 3.2 of the 4 GiB of H100-80GB" in refused.value.what
    assert "at least" in refused.value.fix


def test_three_epochs_are_for_few_answers_only():
    assert advise(rows=FEW_ROWS).epochs == 3
    assert advise(rows=FEW_ROWS + 1).epochs == 1
    assert advise(objective="cpt").epochs == 1


def test_the_closed_forms_are_sixteen_two_and_half_a_byte_a_parameter():
    one = {(layout.way, layout.zero): layout.gib * GIB for layout in layouts(LLAMA_8B, 16, 1, on_gpu=True)}
    adapter = 16 * LLAMA_8B.lora_per_rank
    rest = LLAMA_8B.parameters - LLAMA_8B.linear
    assert one["full", 0] == pytest.approx(16 * LLAMA_8B.parameters)
    assert one["lora", 0] == pytest.approx(2 * LLAMA_8B.parameters + 16 * adapter)
    assert one["qlora", 0] == pytest.approx(0.516 * LLAMA_8B.linear + 2 * rest + 16 * adapter)
    eight = {(layout.way, layout.zero): layout.gib * GIB for layout in layouts(LLAMA_8B, 16, 8, on_gpu=True)}
    assert eight["full", 3] == pytest.approx(2 * LLAMA_8B.parameters)
    assert eight["full", 2] == pytest.approx((2 + 14 / 8) * LLAMA_8B.parameters)
    fp32 = {layout.way: layout.gib * GIB for layout in layouts(LLAMA_8B, 16, 1, on_gpu=False)}
    assert fp32["lora"] == pytest.approx(4 * LLAMA_8B.parameters + 16 * adapter)


def test_amounts_of_memory_are_short():
    assert [gib(0.01), gib(1.234), gib(1051.2)] == ["10.2 MiB", "1.23 GiB", "1,051 GiB"]
