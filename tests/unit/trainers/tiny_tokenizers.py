"""Real tokenizers, trained in a moment on a sentence, for the tests of the data package."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

CORPUS = ["The quick brown fox jumps over the lazy dog. What is two plus two? It is four, she said.\n"] * 20

CHATML_PLAIN = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' "
    "+ '\\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
"""ChatML as most hub models carry it: without `{% generation %}`."""

MISTRAL = (
    "{{ bos_token }}{% for message in messages %}{% if message['role'] == 'user' %}{{ '[INST] ' + message['content'] + "
    "' [/INST]' }}{% elif message['role'] == 'assistant' %}{{ ' ' + message['content'] + eos_token }}{% else %}"
    "{{ raise_exception('only user and assistant') }}{% endif %}{% endfor %}"
)
"""Mistral's: the generation prompt is empty and the answer begins with a space."""

THINKING = (
    "{% set last = namespace(user=-1) %}{% for message in messages %}{% if message['role'] == 'user' %}"
    "{% set last.user = loop.index0 %}{% endif %}{% endfor %}{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' }}{% if message['role'] == 'assistant' %}"
    "{% set said = message['content'].split('</think>')[-1].lstrip('\\n') %}"
    "{% if loop.index0 > last.user %}{{ '<think>\\n\\n</think>\\n\\n' }}{% endif %}{{ said }}"
    "{% else %}{{ message['content'] }}{% endif %}{{ '<|im_end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
"""As Qwen3's: thoughts are left out, and the last turn gets an empty one."""

ENDLESS = "{% for message in messages %}{{ message['role'] + ': ' + message['content'] + '\\n' }}{% endfor %}"
"""Nothing says where a turn ends."""


@cache
def byte_level(specials: Sequence[str] = ("<|endoftext|>",), template: str | None = None) -> PreTrainedTokenizerFast:
    """GPT-2's kind: byte-level BPE; the first special token is the eos."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=500, special_tokens=list(specials), initial_alphabet=alphabet)
    tokenizer.train_from_iterator(CORPUS, trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=specials[0])
    fast.chat_template = template
    return fast


@cache
def metaspace(template: str | None = None) -> PreTrainedTokenizerFast:
    """Llama-2's kind: spaces become `▁`, one is put in front, texts begin with <s>."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    trainer = trainers.BpeTrainer(vocab_size=300, special_tokens=["<unk>", "<s>", "</s>"])
    tokenizer.train_from_iterator([*CORPUS, "[INST] hello [/INST] yes <|im_start|>#:\n"], trainer)
    tokenizer.decoder = decoders.Metaspace()
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>")
    fast.chat_template = template
    return fast


def save(folder: Path, tokenizer: PreTrainedTokenizerFast) -> Path:
    """The tokenizer as a model folder holds it."""
    tokenizer.save_pretrained(folder)
    return folder
