"""The rules of the advice at their borders, without a model or data."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import pytest

from tunesmith.cluster.errors import ResourceError
from tunesmith.trainers.advise.room import Layout, Way, gib
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
    Size,
    recommend,
)

LLAMA_8B = Size(parameters=8_030_261_248, lora_per_rank=2_621_440)
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
)


GIB_OF: dict[tuple[Way, int, bool], float] = {
    ("full", 2, False): 40.0,
    ("full", 2, True): 36.0,
    ("full", 3, False): 30.0,
    ("full", 3, True): 25.0,
    ("lora", 2, False): 22.0,
    ("lora", 2, True): 17.0,
    ("lora", 3, False): 15.0,
    ("lora", 3, True): 9.0,
    ("qlora", 2, False): 8.0,
    ("qlora", 2, True): 7.0,
}
"""Memory of one worker for way, ZeRO stage and checkpointing: numbers of the order that eight workers need."""


def advise(gpu_gib: float = 79.0, **changes: Any) -> Advice:
    def layouts(way: Way, rank: int) -> Iterator[Layout]:
        for (name, zero, checkpointing), takes in GIB_OF.items():
            if name == way:
                yield Layout(way, zero, checkpointing, takes, fits=takes <= gpu_gib)

    return recommend(dataclasses.replace(USUAL, gpu_gib=gpu_gib, **changes), layouts)


def test_most_tasks_get_lora_of_the_usual_rank():
    advice = advise()
    assert (advice.rule, advice.way, advice.rank, advice.layout.zero) == ("most tasks", "lora", 16, 2)
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


@pytest.mark.parametrize(
    ("gpu_gib", "way", "zero", "checkpointing"),
    [
        (40.0, "full", 2, False),
        (39.9, "full", 2, True),
        (35.9, "full", 3, False),
        (29.9, "full", 3, True),
        (24.9, "lora", 2, False),
        (14.9, "lora", 3, True),
        (8.9, "qlora", 2, False),
        (7.9, "qlora", 2, True),
    ],
)
def test_what_is_wished_gives_way_to_what_fits(gpu_gib: float, way: str, zero: int, checkpointing: bool):
    layout = advise(gpu_gib, trained_tokens=LARGE + 1, bits_per_byte=2.0).layout
    assert (layout.way, layout.zero, layout.checkpointing) == (way, zero, checkpointing)


def test_giving_way_is_said_with_the_numbers():
    advice = advise(8.5, trained_tokens=LARGE + 1, bits_per_byte=2.0)
    assert (advice.rank, advice.learning_rate) == (128, 2e-4)
    assert (
        "Full fine-tuning does not fit: it takes at least 25 GiB of each H100-80GB, which has 8.5 GiB."
        in advice.reasons[1]
    )
    assert "LoRA does not fit: it takes at least 9 GiB" in advice.reasons[2]
    assert any("it will learn more slowly" in caution for caution in advice.cautions)
    shared = advise(14.9)
    assert "shared out over 8 GPUs (ZeRO-3): whole they take 22 GiB" in shared.reasons[1]
    assert "gradient checkpointing): kept, it would take 15 GiB" in shared.reasons[2]


def test_only_the_layouts_up_to_the_first_that_fits_are_simulated():
    assert len(advise().considered) == 1
    assert len(advise(8.5).considered) == 5


def test_what_fits_nowhere_is_refused_with_the_arithmetic():
    with pytest.raises(ResourceError) as refused:
        advise(4.0)
    assert "LoRA does not fit: it takes at least 9 GiB of each H100-80GB, which has 4 GiB" in refused.value.what
    assert "QLoRA does not fit: it takes at least 7 GiB" in refused.value.what
    assert "at least 7 GiB" in refused.value.fix


def test_three_epochs_are_for_few_answers_only():
    assert advise(rows=FEW_ROWS).epochs == 3
    assert advise(rows=FEW_ROWS + 1).epochs == 1
    assert advise(objective="cpt").epochs == 1


def test_amounts_of_memory_are_short():
    assert [gib(0.01), gib(1.234), gib(1051.2)] == ["10.2 MiB", "1.23 GiB", "1,051 GiB"]
