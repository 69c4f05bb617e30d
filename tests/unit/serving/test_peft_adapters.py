"""What PEFT itself saves enters, and is held against the base it was made on and against others."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from adapters import make_adapter
from peft import LoraConfig, PeftType, get_peft_config
from peft_configs import PEFT_CONFIGS
from tiny_models import config, tokenizer
from transformers import AutoModelForCausalLM

from tunesmith.cluster.base import find_base
from tunesmith.cluster.errors import AdapterError
from tunesmith.serving.bases import BaseFacts, facts_of
from tunesmith.serving.checks import PEFT_TYPES, Rules
from tunesmith.serving.registry import Registry

ALL = "all-linear"
LORAS: dict[str, dict[str, Any]] = {
    "every linear layer": {"target_modules": ALL},
    "dora": {"target_modules": ALL, "use_dora": True},
    "rank pattern": {"target_modules": ALL, "rank_pattern": {"q_proj": 2, r"layers\.1\..*up_proj": 8}},
    "embeddings and head": {"target_modules": ["embed_tokens", "lm_head", "q_proj"]},
    "saved modules": {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
    "bias": {"target_modules": ["q_proj"], "lora_bias": True},
    "an expression": {"target_modules": r".*\.layers\.1\.self_attn\.(q|v)_proj"},
    "new tokens": {"target_modules": ["q_proj"], "trainable_token_indices": [1, 2]},
    "parameters": {"target_modules": [], "target_parameters": ["self_attn.q_proj.weight"]},
}


def base_of(folder: Path, kind: str, **changes: Any) -> Path:
    AutoModelForCausalLM.from_config(config(kind, **changes)).save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder


def facts(folder: Path) -> BaseFacts:
    return facts_of(find_base(str(folder), None, folder.parent))


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("bases")
    made = {kind: base_of(folder / kind, kind) for kind in ("llama", "tied", "mixtral", "qwen3_moe")}
    return {**made, "wide": base_of(folder / "wide", "llama", hidden_size=64, head_dim=16)}


def offer(registry: Path, adapter: Path, base: Path) -> None:
    known = facts(base)
    Registry(str(registry)).add("bot", adapter, rules=Rules(base=known, base_digest=known.digest))


@pytest.mark.parametrize("base", ["llama", "tied"])
@pytest.mark.parametrize("kind", LORAS)
def test_every_shape_of_lora_enters_on_its_base_and_on_no_wider_one(
    tmp_path: Path, bases: dict[str, Path], base: str, kind: str
) -> None:
    lora = LoraConfig(r=4, task_type="CAUSAL_LM", **LORAS[kind])
    adapter = Path(make_adapter(bases[base], tmp_path / "adapter", lora).folder)
    (adapter / "README.md").unlink(missing_ok=True)
    offer(tmp_path / "registry", adapter, bases[base])
    with pytest.raises(AdapterError, match="in the base"):
        offer(tmp_path / "other", adapter, bases["wide"])


@pytest.mark.parametrize("base", ["mixtral", "qwen3_moe"])
@pytest.mark.parametrize(
    "targets", [{"target_modules": ["q_proj"]}, {"target_parameters": ["experts.down_proj"]}, {"target_modules": ALL}]
)
def test_experts_enter(tmp_path: Path, bases: dict[str, Path], base: str, targets: dict[str, Any]) -> None:
    lora = LoraConfig(r=4, task_type="CAUSAL_LM", **targets)
    offer(tmp_path / "registry", Path(make_adapter(bases[base], tmp_path / "adapter", lora).folder), bases[base])


@pytest.mark.parametrize("kind", [kind for kind in PEFT_CONFIGS if kind != "ADAPTION_PROMPT"])
def test_every_kind_that_peft_trains_enters(tmp_path: Path, bases: dict[str, Path], kind: str) -> None:
    settings = get_peft_config({"peft_type": kind, "task_type": "CAUSAL_LM", **PEFT_CONFIGS[kind]})
    adapter = Path(make_adapter(bases["llama"], tmp_path / "adapter", settings).folder)
    offer(tmp_path / "registry", adapter, bases["llama"])


def test_shapes_of_a_base_that_is_packed_on_disk_are_not_compared(bases: dict[str, Path], tmp_path: Path) -> None:
    folder = base_of(tmp_path / "packed", "llama")
    assert facts(folder).shapes == facts(bases["llama"]).shapes
    text = (folder / "config.json").read_text()
    (folder / "config.json").write_text(text.replace("{", '{"quantization_config": {"bits": 4},', 1))
    assert facts(folder).shapes is None


def test_the_kinds_that_may_enter_are_those_that_peft_has() -> None:
    assert {kind.value for kind in PeftType} == PEFT_TYPES
