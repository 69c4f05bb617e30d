"""From a conversation, a text or token ids to the tokens that a model is given, by the very template that trained."""

from __future__ import annotations

import asyncio
import json
from collections import OrderedDict
from pathlib import Path
from typing import Any

from tunesmith.cluster.errors import RequestError
from tunesmith.serving.engines.protocol import Ask, Version

LONG = 32_768
"""Characters of a prompt from which on it is not tokenised at once: that many take some hundredths of a second."""


class Tokenizers:
    """The base's tokenizer and those of the versions, which carry the chat template of their training.

    Args:
        most: of versions that are kept, the least recently used leaving first.
    """

    def __init__(self, base_folder: str, most: int) -> None:
        from transformers import AutoTokenizer

        self.base: Any = AutoTokenizer.from_pretrained(base_folder)
        self._most = most
        self._of_versions: OrderedDict[str, Any] = OrderedDict()

    async def of(self, version: Version | None) -> Any:
        """The tokenizer that a version was trained with; the base's when it brings none. Others go on while it loads."""
        if version is None or not (Path(version.folder) / "tokenizer_config.json").is_file():
            return self.base
        found = self._of_versions.get(version.digest)
        if found is None:
            from transformers import AutoTokenizer

            loaded = await asyncio.to_thread(AutoTokenizer.from_pretrained, version.folder)
            found = self._of_versions.setdefault(version.digest, loaded)
        self._of_versions.move_to_end(version.digest)
        if len(self._of_versions) > self._most:
            self._of_versions.popitem(last=False)
        return found


async def tokenised(ask: Ask, tokenizer: Any, max_length: int, vocabulary: int) -> list[int]:
    """As `tokens_of`; a long prompt goes to a thread, for it would keep all others waiting.

    Raises:
        RequestError: as `tokens_of`.
    """
    texts = (
        [ask.prompt] if isinstance(ask.prompt, str) else [one["content"] for one in ask.prompt if isinstance(one, dict)]
    )
    if sum(map(len, texts)) < LONG:
        return tokens_of(ask, tokenizer, max_length, vocabulary)
    return await asyncio.to_thread(tokens_of, ask, tokenizer, max_length, vocabulary)


def tokens_of(ask: Ask, tokenizer: Any, max_length: int, vocabulary: int) -> list[int]:
    """The prompt's token ids.

    Raises:
        RequestError: there is no chat template, the template refuses the conversation, an id is none of the
            vocabulary, or the prompt leaves no room for an answer.
    """
    if isinstance(ask.prompt, str):
        tokens = tokenizer(ask.prompt)["input_ids"]
    elif ask.prompt and isinstance(ask.prompt[0], dict):
        tokens = _of_conversation(ask.prompt, tokenizer)
    else:
        tokens = [int(token) for token in ask.prompt]  # type: ignore[arg-type]
        wrong = next((token for token in tokens if not 0 <= token < vocabulary), None)
        if wrong is not None:
            raise RequestError(f"token id {wrong} is not in the vocabulary of {vocabulary}", param="prompt")
    if not tokens:
        raise RequestError("the prompt is empty", param="prompt")
    wanted = ask.sampling.max_tokens
    room = max_length - len(tokens)
    least = 1 if wanted is None else wanted
    if room < least:
        raise RequestError(
            f"this model takes {max_length} tokens; the prompt has {len(tokens)} and {least} more were asked for",
            param="messages" if ask.prompt and isinstance(ask.prompt[0], dict) else "prompt",
            code="context_length_exceeded",
        )
    return tokens


def _of_conversation(messages: list[Any], tokenizer: Any) -> list[int]:
    from jinja2 import TemplateError

    if tokenizer.chat_template is None:
        raise RequestError(
            "this model has no chat template, so it takes no conversations; use /v1/completions", param="messages"
        )
    try:
        return tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    except (TemplateError, TypeError, ValueError, LookupError, ArithmeticError, RecursionError) as error:
        reason = " ".join(str(error).split())[:300]
        raise RequestError(f"the chat template refuses this conversation: {reason}", param="messages") from error


def stop_tokens(model_folder: str, version: Version | None, tokenizer: Any) -> frozenset[int]:
    """Tokens that end an answer: the base's own, the tokenizer's end, and the ends that a version says it was taught."""
    found: set[int] = set() if tokenizer.eos_token_id is None else {int(tokenizer.eos_token_id)}
    folders = [Path(model_folder), *([Path(version.folder)] if version else [])]
    for file in [folder / "generation_config.json" for folder in folders]:
        if file.is_file():
            ends = json.loads(file.read_text(encoding="utf-8")).get("eos_token_id")
            found |= {ends} if isinstance(ends, int) else set(ends or ())
    return frozenset(found)
