"""Whether trials can share a base, and how many lanes they have."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from sweep_recipes import LEARNING_RATE, sweep_recipe

from tunesmith.tuning.eligible import (
    PER_TRIAL,
    ROW_TOKENS,
    BaseFacts,
    base_facts,
    lane_length,
    lanes_for,
    ranks_of,
    targets_of,
    trials_at_once,
    why_isolated,
)

DROPS = {"adaptation.lora_dropout": {"choice": [0.0, 0.1]}}
PEFT = {"kind": "peft", "config": {"peft_type": "LOHA"}}


def why(
    space: dict[str, Any] = LEARNING_RATE, adaptation: Any = "lora", facts: BaseFacts | None = None, **sections: Any
) -> str | None:
    recipe = sweep_recipe(space, adaptation, sections)
    assert recipe.tune is not None
    return why_isolated(recipe, recipe.tune, facts or BaseFacts())


def test_lora_trials_that_differ_in_their_own_keys_share_a_base():
    assert why() is None
    assert why({key: {"choice": [1]} for key in PER_TRIAL}) is None


@pytest.mark.parametrize(
    ("says", "case"),
    [
        ("adaptation: full is not LoRA", {"adaptation": "full"}),
        ("adaptation: peft is not LoRA", {"adaptation": PEFT}),
        (
            "the trials differ in data.max_length, cluster.zero, which",
            {"space": {**LEARNING_RATE, "data.max_length": {"choice": [64]}, "cluster.zero": {"choice": [0]}}},
        ),
        ("train.optimizer: adamw_8bit", {"train": {"optimizer": "adamw_8bit"}}),
        ("train.precision: fp16", {"train": {"precision": "fp16"}}),
        ("cluster.zero: 3 shards", {"cluster": {"zero": 3}}),
        ("cluster.zero: 1 shards", {"cluster": {"zero": 1}}),
        ("cluster.zero: 2 shards", {"cluster": {"zero": 2, "offload": "cpu"}}),
        ("mixture of experts", {"facts": BaseFacts(routes=True)}),
        ("drops activations", {"facts": BaseFacts(drops=True)}),
        ("embed_tokens is adapted", {"facts": BaseFacts(odd_targets=("embed_tokens",))}),
        (
            "train.gradient_checkpointing computes activations twice",
            {"space": DROPS, "train": {"gradient_checkpointing": True}},
        ),
        (
            "train.gradient_checkpointing computes activations twice",
            {"adaptation": {"kind": "lora", "lora_dropout": 0.1}, "train": {"gradient_checkpointing": True}},
        ),
    ],
)
def test_what_keeps_trials_apart_is_named(says: str, case: dict[str, Any]):
    assert says in (why(**case) or "")


@pytest.mark.parametrize(
    "case",
    [
        {"cluster": {"zero": 0}},
        {"cluster": {"zero": "auto", "offload": "auto"}},
        {"train": {"gradient_checkpointing": True}},
        {"space": DROPS, "train": {"gradient_checkpointing": "auto"}},
        {"space": DROPS},
        {"train": {"precision": "bf16"}},
    ],
)
def test_what_does_not_keep_trials_apart(case: dict[str, Any]):
    assert why(**case) is None


def test_lanes_fill_a_row_but_no_more_than_there_is_work():
    assert ROW_TOKENS == 1024
    assert lanes_for(64, trials=100, seeds=1, wanted=None) == 16
    assert lanes_for(64, trials=8, seeds=1, wanted=None) == 8
    assert lanes_for(512, trials=100, seeds=1, wanted=None) == 2
    assert lanes_for(4096, trials=100, seeds=1, wanted=None) == 1


def test_more_trials_are_begun_than_there_are_lanes_where_lanes_are_long():
    assert trials_at_once(lanes=16, trials=100, seeds=1) == 16
    assert trials_at_once(lanes=1, trials=100, seeds=1) == 4
    assert trials_at_once(lanes=1, trials=3, seeds=1) == 3
    assert trials_at_once(lanes=16, trials=100, seeds=3) == 5


def test_each_seed_of_a_trial_takes_a_lane():
    assert lanes_for(64, trials=100, seeds=3, wanted=None) == 16
    assert lanes_for(1024, trials=100, seeds=3, wanted=None) == 3
    assert lanes_for(1024, trials=1, seeds=3, wanted=None) == 3
    assert lanes_for(64, trials=1, seeds=40, wanted=None) == 40


def test_the_wanted_number_of_trials_is_kept():
    assert lanes_for(64, trials=100, seeds=1, wanted=5) == 5
    assert lanes_for(64, trials=3, seeds=1, wanted=5) == 3
    assert lanes_for(64, trials=100, seeds=2, wanted=5) == 10


def prepared(train: list[int], validation: list[int], max_length: int = 100) -> Any:
    class Store(SimpleNamespace):
        def __len__(self) -> int:
            return len(self.lengths)

    stores = [Store(lengths=np.array(lengths, dtype=np.int64)) for lengths in (train, validation)]
    return SimpleNamespace(train=stores[0], validation=stores[1], max_length=max_length)


def test_a_lane_holds_the_longest_pack_and_is_aligned():
    recipe = sweep_recipe()
    assert lane_length(recipe, prepared([30, 40, 50], [20])) == 104, "packs are filled up to max_length"
    assert lane_length(recipe, prepared([30, 20], [20])) == 56, "all examples together are shorter than a pack may be"
    assert lane_length(recipe, prepared([96], [], max_length=96)) == 96


def test_a_lane_without_packing_holds_the_longest_example():
    recipe = sweep_recipe(sections={"data": {"train": "rows.jsonl", "packing": False}})
    assert lane_length(recipe, prepared([30, 40, 50], [20])) == 56
    assert lane_length(recipe, prepared([30], [60])) == 64, "held-out examples pass through the same lanes"


def of(recipe: Any) -> tuple[Any, Any]:
    return recipe, recipe.tune


def test_ranks_are_all_that_a_trial_may_have():
    own = {"kind": "lora", "rank": 32}
    choice = {"adaptation.rank": {"choice": [16, 4]}}
    assert ranks_of(*of(sweep_recipe(adaptation=own))) == (32,)
    assert ranks_of(*of(sweep_recipe(choice, own))) == (4, 16)
    assert ranks_of(*of(sweep_recipe({"adaptation.rank": {"randint": [4, 64]}}, own))) == (4, 8, 16, 32, 64)
    conditional = {"train.epochs": {"choice": [1, 2]}, "adaptation.rank": {"choice": [4], "when": {"train.epochs": 2}}}
    assert ranks_of(*of(sweep_recipe(conditional, own))) == (4, 32), "elsewhere it is the recipe's"


def test_targets_are_all_that_a_trial_may_have():
    own = {"kind": "lora", "target_modules": ["q_proj"]}
    assert targets_of(*of(sweep_recipe(adaptation=own))) == (["q_proj"],)
    searched = {"adaptation.target_modules": {"choice": ["all-linear", ["v_proj", "k_proj"]]}}
    assert targets_of(*of(sweep_recipe(searched, own))) == ("all-linear", ["v_proj", "k_proj"])


@pytest.mark.parametrize(
    ("config", "facts"),
    [
        ({"model_type": "llama", "attention_dropout": 0.0}, BaseFacts()),
        ({"model_type": "llama", "attention_dropout": 0.1}, BaseFacts(drops=True)),
        ({"model_type": "gpt2", "resid_pdrop": 0.1}, BaseFacts(drops=True)),
        ({"model_type": "gpt2", "summary_first_dropout": 0.1, "classifier_dropout": 0.2}, BaseFacts()),
        ({"model_type": "mixtral", "num_local_experts": 4}, BaseFacts(routes=True)),
    ],
)
def test_a_bases_config_says_whether_it_drops_or_routes(config: dict[str, Any], facts: BaseFacts, tmp_path: Path):
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert base_facts(tmp_path, *of(sweep_recipe())) == facts


def test_layers_that_are_not_linear_are_found_among_all_targets(tmp_path: Path):
    (tmp_path / "config.json").write_text("{}")
    searched = {"adaptation.target_modules": {"choice": [["q_proj"], ["v_proj", "embed_tokens"], "lm_head"]}}
    assert base_facts(tmp_path, *of(sweep_recipe(searched))).odd_targets == ("embed_tokens", "lm_head")
    assert base_facts(tmp_path, *of(sweep_recipe(adaptation=PEFT))).odd_targets == ()
