"""PEFT's own settings in a recipe: what is refused and how, and what plain PEFT would have built from the same."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import tiny_models
import torch
from imports import REPOSITORY
from peft import PEFT_TYPE_TO_CONFIG_MAPPING, BOFTConfig, PeftModel, TaskType, get_peft_model
from peft_configs import PEFT_CONFIGS, PLANNED_CONFIGS, adaptation
from pydantic import ValidationError
from transformers import AutoModelForCausalLM

from tunesmith.cluster.errors import ModelError
from tunesmith.cluster.recipe.schema import Peft, Recipe
from tunesmith.trainers import attention, models
from tunesmith.trainers.adaptations import peft, peft_types
from tunesmith.trainers.batch import collate
from tunesmith.trainers.policy import Policy, score


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_models.make("llama", tmp_path_factory.mktemp("llama"))


def recipe(base: Path, peft_type: str, changes: dict[str, Any] | None = None, **sections: Any) -> Recipe:
    return Recipe.model_validate(
        {
            "name": "t",
            "model": {"base": str(base), **sections.pop("model", {})},
            "data": {"train": "x.jsonl"},
            "objective": "sft",
            "adaptation": adaptation(peft_type, **(changes or {})),
            **sections,
        }
    )


def checked(recipe: Recipe, folder: Path) -> None:
    models.check_adaptation(recipe, models.resolve_base(recipe.model.base, None, folder))


def built(recipe: Recipe, folder: Path, dtype: torch.dtype = torch.float32) -> Any:
    base = models.resolve_base(recipe.model.base, None, folder)
    return models.build(recipe, base, device="cpu", dtype=dtype, zero3=False)


def test_every_type_of_the_installed_peft_is_known() -> None:
    assert {kind.value for kind in PEFT_TYPE_TO_CONFIG_MAPPING} == set(peft_types.PEFT_TYPES)
    assert {name for name, kind in peft_types.PEFT_TYPES.items() if not kind.untrainable} == set(PEFT_CONFIGS)


@pytest.mark.parametrize("peft_type", PEFT_CONFIGS)
def test_settings_that_train_pass_the_check_before_launch(peft_type: str, llama: Path, tmp_path: Path) -> None:
    checked(recipe(llama, peft_type), tmp_path)


@pytest.mark.parametrize("peft_type", PLANNED_CONFIGS)
def test_a_type_that_cannot_be_trained_is_refused_and_yet_built_for_a_plan(
    peft_type: str, llama: Path, tmp_path: Path
) -> None:
    made = recipe(llama, peft_type)
    with pytest.raises(ModelError, match=f"{peft_type} can be planned but not trained"):
        checked(made, tmp_path)
    assert isinstance(made.adaptation, Peft)
    model = peft.adapt(
        AutoModelForCausalLM.from_pretrained(llama),
        made.adaptation,
        base=str(llama),
        revision=None,
        seed=0,
        dtype=torch.float32,
        for_training=False,
    )
    assert any(parameter.requires_grad for parameter in model.parameters())


MISTAKES = [
    ("BOFT", {"peft_type": "BOFFT"}, {}, r"'BOFFT' is none of PEFT's types.*Nearest: BOFT"),
    ("BOFT", {"boft_blocksize": 4}, {}, r"config\.boft_blocksize: BOFTConfig has no such key.*boft_block_size"),
    ("BOFT", {"boft_block_size": "four"}, {}, r"config\.boft_block_size: 'four' does not fit BOFTConfig: .*integer"),
    ("LORA", {"lora_dropout": "1e-1"}, {}, r"config\.lora_dropout: '1e-1' does not fit LoraConfig: .*number"),
    ("LORA", {"r": 0}, {}, r"PEFT cannot build LORA: `r` should be a positive integer"),
    ("BOFT", {"boft_block_size": 5}, {}, r"PEFT cannot build BOFT: in_features .*divisible"),
    ("BOFT", {"task_type": "SEQ_CLS"}, {}, r"config\.task_type: not to be set here: it is CAUSAL_LM"),
    ("LORA", {"revision": "main"}, {}, r"config\.revision: not to be set here: .*model\.revision"),
    ("LORA", {"inference_mode": True}, {}, r"config\.inference_mode: not to be set here"),
    ("LORA", {"target_modules": ["q_proj", "v_porj"]}, {}, r"config\.target_modules: 'v_porj' matches none.*v_proj"),
    ("LORA", {"target_modules": "q_proj"}, {}, r"config\.target_modules: 'q_proj' matches none"),
    ("LORA", {"target_modules": "("}, {}, r"'\(' is no regular expression"),
    ("LN_TUNING", {"target_modules": ["q_proj"], "exclude_modules": ["q_proj"]}, {}, r"PEFT cannot build LN_TUNING"),
    ("LORA", {"alora_invocation_tokens": [1, 2]}, {}, r"alora_invocation_tokens: .*packed row"),
    ("LORA", {"init_lora_weights": "pissa"}, {}, r"'pissa' rewrites the base's weights.*\"gaussian\""),
    ("OSF", {}, {"cluster": {"zero": 3}}, r"OSF cannot be trained under ZeRO-3: .*weights.*zero to 2"),
    ("LORA", {"trainable_token_indices": [1]}, {"cluster": {"zero": 3}}, r"LORA cannot be trained under ZeRO-3"),
    ("LOHA", {}, {"model": {"quantization": "nf4"}}, r"LOHA does not adapt nf4 layers"),
    ("LORA", {"use_dora": True}, {"model": {"quantization": "int8"}}, r"DoRA .*int8"),
]


@pytest.mark.parametrize(("peft_type", "changes", "sections", "says"), MISTAKES)
def test_a_mistake_is_named_with_what_would_be_right(
    peft_type: str, changes: dict[str, Any], sections: dict[str, Any], says: str, llama: Path, tmp_path: Path
) -> None:
    with pytest.raises(ModelError) as refused:
        checked(recipe(llama, peft_type, changes, **sections), tmp_path)
    assert re.search(says, f"{refused.value.what} {refused.value.fix}", re.DOTALL), str(refused.value)


@pytest.mark.parametrize("config", [{}, {"peft_type": ""}, {"peft_type": 3}, {"r": 4}])
def test_settings_without_a_type_are_refused_by_the_schema(config: dict[str, Any]) -> None:
    with pytest.raises(ValidationError, match="peft_type is missing"):
        Peft(kind="peft", config=config)


def test_a_type_in_small_letters_is_the_same_type(llama: Path, tmp_path: Path) -> None:
    model = built(recipe(llama, "BOFT", {"peft_type": "boft"}), tmp_path)
    assert isinstance(model, PeftModel)
    assert model.peft_config["default"].peft_type == "BOFT"
    assert model.peft_config["default"].base_model_name_or_path == str(llama)


@pytest.mark.parametrize("peft_type", ["BOFT", "VERA", "SHIRA"])
def test_first_weights_depend_on_the_recipes_seed_alone(peft_type: str, llama: Path, tmp_path: Path) -> None:
    torch.manual_seed(1)
    first = built(recipe(llama, peft_type), tmp_path).state_dict()
    torch.manual_seed(2)
    before = torch.random.get_rng_state()
    second = built(recipe(llama, peft_type), tmp_path).state_dict()
    assert torch.equal(before, torch.random.get_rng_state())
    assert all(torch.equal(value, second[name]) for name, value in first.items())


def test_what_is_trained_is_in_the_training_format(llama: Path, tmp_path: Path) -> None:
    model = built(recipe(llama, "LOHA"), tmp_path, torch.bfloat16)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}


def test_all_linear_means_the_same_as_for_lora(llama: Path, tmp_path: Path) -> None:
    model = built(recipe(llama, "MISS", {"target_modules": "all-linear"}), tmp_path)
    adapted = {name.rpartition(".")[2] for name, part in model.named_modules() if hasattr(part, "base_layer")}
    assert adapted == {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}


def test_fused_experts_are_not_taken_for_layers(tmp_path: Path) -> None:
    mixtral = tiny_models.make("mixtral", tmp_path / "mixtral")
    with pytest.raises(ModelError, match="mixture of experts"):
        checked(recipe(mixtral, "LORA", {"target_modules": ["gate"]}), tmp_path)


class Rows:
    """Two examples of every token trained, with what `collate` asks of a TokenStore."""

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(0)
        self.tokens = [torch.randint(0, 200, (length,), generator=generator) for length in (17, 9)]

    def example(self, index: int) -> tuple[Any, Any]:
        tokens = self.tokens[index].numpy().astype("int32")
        return tokens, tokens >= 0


def test_loss_and_gradients_are_those_of_plain_peft(llama: Path, tmp_path: Path) -> None:
    """Two examples in one packed row here; there each alone, with Transformers' own forward and loss."""
    rows = Rows()
    ours = Policy(built(recipe(llama, "BOFT", train={"seed": 3}), tmp_path), attention.REFERENCE)
    labels = float(sum(len(tokens) - 1 for tokens in rows.tokens))
    loss = -score(ours, collate(rows, [[0, 1]], labels)).logps.sum() / labels  # type: ignore[arg-type]
    loss.backward()
    torch.manual_seed(3)
    config = BOFTConfig(task_type=TaskType.CAUSAL_LM, **PEFT_CONFIGS["BOFT"])
    theirs = get_peft_model(AutoModelForCausalLM.from_pretrained(llama), config)
    plain = sum(theirs(input_ids=t[None], labels=t[None]).loss * (len(t) - 1) / labels for t in rows.tokens)
    plain.backward()
    assert loss.item() == pytest.approx(plain.item(), abs=1e-5)
    gradients = {name: p.grad for name, p in theirs.named_parameters() if p.requires_grad}
    assert gradients
    for name, gradient in gradients.items():
        torch.testing.assert_close(ours.model.get_parameter(name).grad, gradient, rtol=1e-5, atol=1e-6)
    assert any(gradient.abs().max() > 1e-4 for gradient in gradients.values())


def test_the_table_of_the_documentation_is_what_the_code_knows() -> None:
    page = (REPOSITORY / "docs" / "adaptations.md").read_text(encoding="utf-8")
    written = [line for line in page.splitlines() if re.match("\\| `[A-Z]", line)]
    assert written == table(), "\n".join(table())


def table() -> list[str]:
    """A row for each type: what it is, whether it trains, under ZeRO-3, over which quantised bases, and why not."""
    rows = []
    for name, kind in sorted(peft_types.PEFT_TYPES.items(), key=lambda item: (bool(item[1].untrainable), item[0])):
        trains = "plan only" if kind.untrainable else "trains"
        sharded = "" if kind.untrainable else ("no" if kind.unsharded else "yes")
        why = "; ".join(part for part in (kind.untrainable, kind.unsharded and f"ZeRO-3: {kind.unsharded}") if part)
        rows.append(f"| `{name}` | {kind.method} | {trains} | {sharded} | {', '.join(kind.quantized)} | {why} |")
    return rows
