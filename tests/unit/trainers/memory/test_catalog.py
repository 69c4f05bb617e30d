from __future__ import annotations

import pytest

from tunesmith.trainers.memory.catalog import Entry, entries, find, nearest


@pytest.mark.parametrize("entry", entries(), ids=lambda entry: entry.name)
def test_the_shape_has_exactly_the_published_number_of_parameters(entry: Entry):
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**entry.config))
    assert sum(parameter.numel() for parameter in model.parameters()) == entry.parameters


@pytest.mark.parametrize(
    ("reference", "name"),
    [
        ("meta-llama/Llama-3.1-8B-Instruct", "meta-llama/Llama-3.1-8B"),
        ("meta-llama/Meta-Llama-3.1-8B", "meta-llama/Llama-3.1-8B"),
        ("meta-llama/Llama-2-7b-chat-hf", "meta-llama/Llama-2-7b-hf"),
        ("Qwen/Qwen-1_8B-Chat", "Qwen/Qwen-1_8B"),
        ("qwen2.5-7b", "Qwen/Qwen2.5-7B"),
        ("QWEN/QWEN3-8B-BASE", "Qwen/Qwen3-8B"),
        ("Qwen/Qwen3-30B-A3B-Instruct-2507", "Qwen/Qwen3-30B-A3B"),
        ("google/gemma-3-4b-it", "google/gemma-3-4b-pt"),
        ("gpt2", "openai-community/gpt2"),
        ("mistralai/Mistral-7B-Instruct-v0.3", "mistralai/Mistral-7B-v0.3"),
        ("deepseek-ai/DeepSeek-R1-Distill-Qwen-7B", "Qwen/Qwen2.5-7B"),
    ],
)
def test_a_model_is_found_without_owner_case_or_what_it_was_tuned_for(reference: str, name: str):
    entry = find(reference)
    assert entry is not None
    assert entry.name == name


def test_every_name_leads_to_the_entry_that_has_it():
    for entry in entries():
        assert find(entry.name) == entry
        assert all(find(name) == entry for name in entry.also)


def test_names_whose_variants_differ_in_shape_are_kept_apart():
    base, tuned = find("mistralai/Mixtral-8x22B-v0.1"), find("mistralai/Mixtral-8x22B-Instruct-v0.1")
    assert base is not None
    assert tuned is not None
    assert (base.config["vocab_size"], tuned.config["vocab_size"]) == (32000, 32768)


@pytest.mark.parametrize(
    "reference",
    [
        "./gpt2",
        "../gpt2",
        "/models/gpt2",
        "a/b/gpt2",
        "run:gpt2",
        "builtin:tiny",
        "",
        "Qwen2.5-7B-Instruct-AWQ",
        "Llama-3.1-9B",
    ],
)
def test_what_is_no_name_or_not_in_the_catalog_is_not_found(reference: str):
    assert find(reference) is None


def test_the_nearest_names_are_offered():
    assert nearest("meta-llama/Llama-3.1-9B")[0] == "meta-llama/Llama-3.1-8B"
    assert "Qwen/Qwen2.5-7B" in nearest("qwen25-7b-instruct")
    assert nearest("something else entirely") == []
