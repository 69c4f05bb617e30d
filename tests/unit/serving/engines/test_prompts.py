"""Prompts become tokens without keeping other requests waiting."""

from __future__ import annotations

import asyncio
import threading

import pytest

from tunesmith.cluster.errors import RequestError
from tunesmith.serving.engines import prompts
from tunesmith.serving.engines.protocol import Ask, Sampling


class Tokenizer:
    """One token a character; knows the threads that asked."""

    def __init__(self) -> None:
        self.threads: list[int] = []
        self.chat_template = ""

    def __call__(self, text: str) -> dict[str, list[int]]:
        self.threads.append(threading.get_ident())
        return {"input_ids": [1] * len(text)}

    def apply_chat_template(self, messages: list[dict[str, str]], **_settings: object) -> list[int]:
        return self("".join(one["content"] for one in messages))["input_ids"]


@pytest.mark.parametrize("prompt", ["a" * prompts.LONG, [{"role": "user", "content": "a" * prompts.LONG}]])
def test_a_long_prompt_is_tokenised_beside_the_loop_and_a_short_one_in_it(prompt: str | list[dict[str, str]]) -> None:
    tokenizer, sampling = Tokenizer(), Sampling(max_tokens=1)

    async def main() -> None:
        assert await prompts.tokenised(Ask("1", "abc", sampling=sampling), tokenizer, 10, 10) == [1, 1, 1]
        assert len(await prompts.tokenised(Ask("2", prompt, sampling=sampling), tokenizer, 10**6, 10)) == prompts.LONG

    asyncio.run(main())
    assert tokenizer.threads[0] == threading.get_ident() != tokenizer.threads[1]


@pytest.mark.parametrize("error", [OverflowError("range too big"), ZeroDivisionError(), IndexError(), RecursionError()])
def test_what_a_template_fails_with_is_the_requests_failure(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_given: object, **_settings: object) -> list[int]:
        raise error

    monkeypatch.setattr(Tokenizer, "apply_chat_template", fails)
    with pytest.raises(RequestError, match="the chat template refuses this conversation"):
        prompts.tokens_of(Ask("1", [{"role": "user", "content": "a"}]), Tokenizer(), 10, 10)
