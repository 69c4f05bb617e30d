"""The base and the adapters of the serving benchmarks: real shapes, random weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any


def make_base(folder: Path) -> int:
    """Saves a Llama of some 70M parameters with a tokenizer of bytes; returns its parameters."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=32_000, hidden_size=512, intermediate_size=1408, num_hidden_layers=12, num_attention_heads=8,
        num_key_value_heads=4, max_position_embeddings=1024, eos_token_id=0, initializer_range=0.05,
    )  # fmt: skip
    model: Any = LlamaForCausalLM(config)
    model.save_pretrained(folder)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    letters = {letter: index for index, letter in enumerate(alphabet)}
    rest = {f"<{index}>": index for index in range(len(letters), 32_000)}
    core = Tokenizer(models.BPE(vocab={**letters, **rest}, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<256>").save_pretrained(folder)
    return model.num_parameters()


def make_adapters(base: Path, folder: Path, ranks: list[int]) -> list[Path]:
    """Saves a LoRA adapter on every linear layer for each rank; returns their folders."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    made = []
    for index, rank in enumerate(ranks):
        model: Any = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
        torch.manual_seed(index + 1)
        tuned = get_peft_model(model, LoraConfig(r=rank, target_modules="all-linear", task_type="CAUSAL_LM"))
        for name, parameter in tuned.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.05)
        made.append(folder / f"{index:03}-r{rank}")
        tuned.save_pretrained(made[-1])
    return made
