"""Tokens spelled alone: whole texts, and bytes that are parts of a character, in both ways that vocabularies have."""

from __future__ import annotations

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from tunesmith.serving.engines.text import spelled

GPT2 = {character: index for index, character in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
FALLBACK = {"<unk>": 0, "a": 1} | {f"<0x{byte:02X}>": byte + 2 for byte in range(256)}


def of_gpt2() -> PreTrainedTokenizerFast:
    made = Tokenizer(models.BPE(GPT2, []))
    made.pre_tokenizer, made.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=made)


def with_byte_fallback() -> PreTrainedTokenizerFast:
    made = Tokenizer(models.BPE(FALLBACK, [], unk_token="<unk>", byte_fallback=True))
    made.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
    return PreTrainedTokenizerFast(tokenizer_object=made)


@pytest.mark.parametrize("make", [of_gpt2, with_byte_fallback])
def test_the_bytes_of_all_tokens_together_are_those_of_the_text(make) -> None:
    tokenizer = make()
    for text in ("a", "é", "€a", "🙂", "한a"):
        alone = [spelled(token, tokenizer) for token in tokenizer(text)["input_ids"]]
        assert b"".join(raw for _, raw in alone) == text.encode(), alone


def test_a_replacement_character_of_the_text_itself_keeps_its_bytes() -> None:
    tokenizer = of_gpt2()
    tokenizer.add_tokens("\ufffd")
    [token] = tokenizer("\ufffd")["input_ids"]
    assert spelled(token, tokenizer) == ("\ufffd", "\ufffd".encode())
