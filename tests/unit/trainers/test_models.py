"""Loading and adapting tiny real models."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import tiny_models
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM

from tunesmith.cluster.errors import ModelError
from tunesmith.cluster.recipe.schema import Recipe
from tunesmith.trainers import models
from tunesmith.trainers.adaptations import lora


def recipe(base: Path, adaptation: Any = "lora", **sections: Any) -> Recipe:
    model = {"base": str(base), **sections.pop("model", {})}
    return Recipe.model_validate(
        {
            "name": "t",
            "model": model,
            "data": {"train": "x.jsonl"},
            "objective": "sft",
            "adaptation": adaptation,
            **sections,
        }
    )


def build(recipe: Recipe, folder: Path, dtype: torch.dtype = torch.float32) -> Any:
    base = models.resolve_base(recipe.model.base, recipe.model.revision, folder)
    return models.build(recipe, base, device="cpu", dtype=dtype, zero3=False)


@pytest.fixture(scope="module", params=["llama", "tied", "mixtral", "qwen3_moe"])
def base(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_models.make(request.param, tmp_path_factory.mktemp(request.param))


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_models.make("llama", tmp_path_factory.mktemp("llama"))


def test_full_trains_every_weight_and_loads_what_transformers_loads(base: Path, tmp_path: Path) -> None:
    ours = build(recipe(base, "full"), tmp_path)
    plain = AutoModelForCausalLM.from_pretrained(base)
    assert all(parameter.requires_grad for parameter in ours.parameters())
    assert ours.state_dict().keys() == plain.state_dict().keys()
    assert all(torch.equal(value, plain.state_dict()[name]) for name, value in ours.state_dict().items())


def test_all_linear_is_pefts_all_linear_but_for_routers_and_fused_experts(base: Path, tmp_path: Path) -> None:
    ours = build(recipe(base), tmp_path)
    dense = "moe" not in base.name and "mixtral" not in base.name
    targets = "all-linear" if dense else ["q_proj", "k_proj", "v_proj", "o_proj"]
    theirs = get_peft_model(
        AutoModelForCausalLM.from_pretrained(base), LoraConfig(r=16, lora_alpha=32, target_modules=targets)
    )
    assert {n for n, _ in ours.named_parameters()} == {n for n, _ in theirs.named_parameters()}
    trainable = {name for name, parameter in ours.named_parameters() if parameter.requires_grad}
    assert trainable == {name for name, _ in ours.named_parameters() if ".lora_" in name}
    assert not any("lm_head" in name for name in trainable)


def test_lora_starts_as_peft_starts_from_the_same_seed(llama: Path, tmp_path: Path) -> None:
    ours = build(recipe(llama, train={"seed": 7}), tmp_path)
    torch.manual_seed(7)
    theirs = get_peft_model(
        AutoModelForCausalLM.from_pretrained(llama), LoraConfig(r=16, lora_alpha=32, target_modules="all-linear")
    )
    for name, value in theirs.named_parameters():
        assert torch.equal(value, ours.get_parameter(name)), name


def test_first_weights_depend_on_the_recipes_seed_alone(llama: Path, tmp_path: Path) -> None:
    torch.manual_seed(1)
    first = build(recipe(llama), tmp_path).state_dict()
    torch.manual_seed(2)
    before = torch.random.get_rng_state()
    second = build(recipe(llama), tmp_path).state_dict()
    assert torch.equal(before, torch.random.get_rng_state())
    assert all(torch.equal(value, second[name]) for name, value in first.items())
    other = build(recipe(llama, train={"seed": 43}), tmp_path).state_dict()
    assert any(not torch.equal(value, other[name]) for name, value in first.items())


def test_bf16_lora_is_the_fp32_start_rounded(llama: Path, tmp_path: Path) -> None:
    exact = dict(build(recipe(llama), tmp_path).named_parameters())
    rounded = dict(build(recipe(llama), tmp_path, torch.bfloat16).named_parameters())
    assert {value.dtype for value in rounded.values()} == {torch.bfloat16}
    assert all(torch.equal(value.bfloat16(), rounded[name]) for name, value in exact.items())


def test_target_modules_are_kept_in_sorted_order(llama: Path, tmp_path: Path) -> None:
    model = build(recipe(llama), tmp_path)
    expected = ["down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj"]
    plain = AutoModelForCausalLM.from_pretrained(llama)
    assert lora.peft_targets(plain, "all-linear") == expected
    assert lora.peft_targets(plain, ["v_proj", "q_proj"]) == ["q_proj", "v_proj"]
    assert sorted(model.peft_config["default"].target_modules) == expected


@pytest.mark.parametrize(
    ("targets", "said"),
    [
        (["qproj"], "q_proj"),
        (["q_proj", "vproj"], "'vproj' matches none"),
        (".*\\.attn\\.q_prj", "q_proj"),
        (["mlp"], "LlamaMLP"),
        ("(", "no regular expression"),
    ],
)
def test_a_target_that_matches_nothing_names_the_nearest(llama: Path, tmp_path: Path, targets: Any, said: str) -> None:
    wrong = recipe(llama, {"kind": "lora", "target_modules": targets})
    base = models.resolve_base(str(llama), None, tmp_path)
    with pytest.raises(ModelError, match=r"adaptation\.target_modules") as error:
        models.check_adaptation(wrong, base)
    assert said in str(error.value)
    assert error.value.exit_code == 2
    with pytest.raises(ModelError):
        build(wrong, tmp_path)


@pytest.mark.parametrize("targets", ["all-linear", ["q_proj", "v_proj"], ".*\\.layers\\.1\\..*(q|v)_proj"])
def test_targets_that_match_pass_the_check(llama: Path, tmp_path: Path, targets: Any) -> None:
    right = recipe(llama, {"kind": "lora", "target_modules": targets})
    models.check_adaptation(right, models.resolve_base(str(llama), None, tmp_path))
    matched = lora.matches(build(recipe(llama, "full"), tmp_path), targets)
    assert len(matched) == {"all-linear": 14, ".*\\.layers\\.1\\..*(q|v)_proj": 2}.get(str(targets), 4)


@pytest.mark.parametrize(
    ("kind", "target", "said"), [("mixtral", "w1", "'w1' matches none"), ("qwen3_moe", "up_proj", "fused experts")]
)
def test_a_target_that_peft_would_send_to_fused_experts_is_refused(
    tmp_path: Path, kind: str, target: str, said: str
) -> None:
    folder = tiny_models.make(kind, tmp_path / kind, **({"mlp_only_layers": [0]} if kind == "qwen3_moe" else {}))
    wrong = recipe(folder, {"kind": "lora", "target_modules": ["q_proj", target]})
    with pytest.raises(ModelError, match=said):
        models.check_adaptation(wrong, models.resolve_base(str(folder), None, tmp_path))
    adapted = build(recipe(folder), tmp_path)
    assert {name.split(".")[-4] for name, p in adapted.named_parameters() if p.requires_grad} == {
        "q_proj",
        "k_proj",
        "v_proj",
        "o_proj",
    }


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_nf4_codes_stay_as_they_are_through_training_and_evaluation(
    llama: Path, tmp_path: Path, dtype: torch.dtype
) -> None:
    model = build(recipe(llama, model={"quantization": "nf4"}), tmp_path, dtype)
    codes = {name: p for name, p in model.named_parameters() if type(p).__name__ == "Params4bit"}
    assert len(codes) == 14
    assert {p.dtype for p in model.parameters()} == {dtype}
    before = {name: p.detach().clone() for name, p in codes.items()}
    tokens = torch.randint(0, 100, (1, 16))
    model(input_ids=tokens, labels=tokens).loss.backward()
    model.eval()
    with torch.no_grad():
        model(input_ids=tokens)
    for name, parameter in model.named_parameters():
        assert name not in before or torch.equal(parameter.view(torch.uint8), before[name].view(torch.uint8)), name
        assert ("lora_" in name) == (parameter.grad is not None)


@pytest.mark.parametrize("adaptation", ["full", "lora"])
def test_gradient_checkpointing_changes_no_gradient(base: Path, tmp_path: Path, adaptation: str) -> None:
    tokens = torch.randint(0, 100, (1, 24), generator=torch.Generator().manual_seed(0))
    gradients = []
    for checkpointing in (False, True):
        model = build(recipe(base, adaptation, train={"gradient_checkpointing": checkpointing}), tmp_path).train()
        router = {"output_router_logits": True} if hasattr(model.config, "router_aux_loss_coef") else {}
        model(input_ids=tokens, labels=tokens, use_cache=False, **router).loss.backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.requires_grad})
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        assert gradient is not None, name
        torch.testing.assert_close(gradient, gradients[1][name], rtol=1e-5, atol=1e-8)


def test_missing_weights_are_an_error_and_not_random_numbers(llama: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    folder = tiny_models.make("llama", tmp_path / "holes")
    weights = load_file(folder / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(ModelError, match=r"model\.layers\.1\.mlp\.up_proj\.weight"):
        build(recipe(folder), tmp_path)


def test_adapter_config_names_the_base_that_plain_peft_will_load(llama: Path, tmp_path: Path) -> None:
    model = build(recipe(llama), tmp_path)
    assert model.peft_config["default"].base_model_name_or_path == str(llama)
    assert isinstance(model, PeftModel)
