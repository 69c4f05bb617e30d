"""Where a LoRA goes in the base, whatever the base's file calls it."""

from __future__ import annotations

from typing import Any

import pytest

from tunesmith.cluster.errors import AdapterError
from tunesmith.serving.lora import check_fit, lora_rank

Shapes = dict[str, tuple[int, ...]]


def lora(module: str, out: int, into: int, rank: int = 2) -> Shapes:
    path = f"base_model.model.{module}"
    return {f"{path}.lora_A.weight": (rank, into), f"{path}.lora_B.weight": (out, rank)}


LAYER = "layers.1.mlp.up"
FITS: dict[str, tuple[str, Shapes, dict[str, Any]]] = {
    "the same name": (f"model.{LAYER}", {f"model.{LAYER}.weight": (6, 4)}, {}),
    "a file without the model's prefix": (f"model.{LAYER}", {f"{LAYER}.weight": (6, 4)}, {}),
    "a file with a longer prefix": (f"model.{LAYER}", {f"language_model.model.{LAYER}.weight": (6, 4)}, {}),
    "Conv1D": (f"transformer.{LAYER}", {f"{LAYER}.weight": (4, 6)}, {"fan_in_fan_out": True}),
    "a head tied to the embeddings": ("lm_head", {"model.embed_tokens.weight": (6, 4)}, {}),
    "a head of its own": ("lm_head", {"lm_head.weight": (6, 4), "model.embed_tokens.weight": (9, 9)}, {}),
    "experts that are stacked when loaded": (
        "model.layers.1.mlp.experts",
        {"model.layers.1.mlp.experts.0.up_proj.weight": (6, 4)},
        {},
    ),
    "one of two towers": (f"model.{LAYER}", {f"vision.{LAYER}.weight": (9, 9), f"text.{LAYER}.weight": (6, 4)}, {}),
    "a convolution": (f"model.{LAYER}", {f"model.{LAYER}.weight": (6, 4, 3, 3)}, {}),
}
MISFITS: dict[str, tuple[str, Shapes, str]] = {
    "another layer": (
        f"model.{LAYER}",
        {"model.layers.0.mlp.up.weight": (6, 4)},
        "has no module model.layers.1.mlp.up",
    ),
    "another module": (f"model.{LAYER}", {"model.layers.1.mlp.down.weight": (6, 4)}, "has no module"),
    "another width": (f"model.{LAYER}", {f"model.{LAYER}.weight": (6, 5)}, r"adds \[6, 4\] to .* \[6, 5\] in the base"),
    "the other way round": (f"model.{LAYER}", {f"model.{LAYER}.weight": (4, 6)}, r"adds \[6, 4\] to .* \[4, 6\]"),
    "experts of another layer": (
        "model.layers.1.mlp.experts",
        {"model.layers.0.mlp.experts.0.up_proj.weight": (6, 4)},
        "has no module",
    ),
    "a head of another vocabulary": ("lm_head", {"model.embed_tokens.weight": (7, 4)}, r"\[7, 4\] in the base"),
}


@pytest.mark.parametrize("kind", FITS)
def test_it_fits(kind: str) -> None:
    module, base, config = FITS[kind]
    check_fit(config, lora(module, 6, 4), base)


@pytest.mark.parametrize("kind", MISFITS)
def test_it_does_not_fit(kind: str) -> None:
    module, base, words = MISFITS[kind]
    with pytest.raises(AdapterError, match=words):
        check_fit({}, lora(module, 6, 4), base)


def test_the_rank_is_the_largest_of_its_modules_and_patterns_are_read_as_peft_reads_them() -> None:
    shapes = lora("layers.0.q_proj", 6, 4, 2) | lora("layers.1.q_proj", 6, 4, 8) | lora("layers.11.q_proj", 6, 4, 2)
    assert lora_rank({"r": 2, "rank_pattern": {r"layers\.1\.q_proj": 8}}, shapes, 64) == 8
    with pytest.raises(AdapterError, match=r"layers\.0.* its rank is 2, but .* says 8"):
        lora_rank({"r": 2, "rank_pattern": {"q_proj": 8}}, shapes, 64)


def test_stacked_experts_have_one_rank_for_each() -> None:
    shapes = lora("layers.0.mlp.experts", 6, 4, 2 * 8)
    assert lora_rank({"r": 2, "target_parameters": ["mlp.experts.up"]}, shapes, 64) == 2
    with pytest.raises(AdapterError, match="its rank is 16"):
        lora_rank({"r": 2}, shapes, 64)


def test_a_pattern_with_repetitions_is_never_tried_on_a_hostile_name() -> None:
    shapes = lora("a" * 400, 6, 4, 8)
    assert lora_rank({"r": 2, "rank_pattern": {".*a" * 6 + "b": 8}}, shapes, 64) == 8
