"""What the official OpenAI client is to get from the service, whichever client's version runs this file.

Tests call the functions; as a program, `python openai_checks.py URL KEY` calls all of them under another version.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from itertools import pairwise
from typing import Any, Literal

import openai
from openai import OpenAI
from pydantic import BaseModel, ConfigDict

MODEL, BASE = "small", "tiny"
QUESTION = "What is it?"
COUNT = 24


def chat(client: OpenAI, **settings: object) -> Any:
    asked = {"model": MODEL, "max_tokens": COUNT, "temperature": 0, **settings}
    return client.chat.completions.create(messages=[{"role": "user", "content": QUESTION}], **asked)  # type: ignore[call-overload]


def complete(client: OpenAI, **settings: object) -> Any:
    asked = {"model": MODEL, "prompt": "one two", "max_tokens": COUNT, "temperature": 0, **settings}
    return client.completions.create(**asked)  # type: ignore[call-overload]


def chats_whole(client: OpenAI) -> None:
    answer = chat(client)
    assert answer.object == "chat.completion"
    assert answer.model == MODEL
    assert answer.id.startswith("chatcmpl-")
    assert answer.choices[0].message.role == "assistant"
    assert answer.choices[0].message.content
    assert answer.choices[0].finish_reason in ("stop", "length")
    assert answer.system_fingerprint.count("-") == 2
    assert answer.usage.prompt_tokens > len(QUESTION)
    assert 1 <= answer.usage.completion_tokens <= COUNT
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens


def chats_streamed(client: OpenAI) -> None:
    whole = chat(client)
    chunks = list(chat(client, stream=True, stream_options={"include_usage": True}))
    assert chunks[-1].choices == []
    assert chunks[-1].usage == whole.usage
    assert chunks[0].choices[0].delta.role == "assistant"
    assert len({(one.id, one.system_fingerprint) for one in chunks}) == 1
    assert "".join(one.choices[0].delta.content or "" for one in chunks[:-1]) == whole.choices[0].message.content
    ends = [one.choices[0].finish_reason for one in chunks[:-1] if one.choices[0].finish_reason]
    assert ends == [whole.choices[0].finish_reason]
    assert all(one.usage is None for one in chunks[:-1])


def several_answers(client: OpenAI) -> None:
    answers = chat(client, n=3, temperature=1.0, seed=1)
    assert [one.index for one in answers.choices] == [0, 1, 2]
    texts = [one.message.content for one in answers.choices]
    assert len(set(texts)) == 3, "samples are not all the same"
    assert answers.usage.completion_tokens > max(len(text) for text in texts) / 4
    chunks = list(chat(client, n=3, temperature=1.0, seed=1, stream=True))
    streamed = ["", "", ""]
    for chunk in chunks:
        for choice in chunk.choices:
            streamed[choice.index] += choice.delta.content or ""
    assert streamed == texts, "the same seed gives the same answers, streamed too"


def seeds(client: OpenAI) -> None:
    first, again, other = (chat(client, temperature=1.0, seed=seed).choices[0].message.content for seed in (7, 7, 8))
    assert first == again != other


def stops(client: OpenAI) -> None:
    text = chat(client).choices[0].message.content
    stop = text[len(text) // 2 : len(text) // 2 + 2]
    cut = chat(client, stop=[stop, "never said"])
    assert cut.choices[0].message.content == text[: text.index(stop)]
    assert cut.choices[0].finish_reason == "stop"
    streamed = "".join(one.choices[0].delta.content or "" for one in chat(client, stop=stop, stream=True))
    assert streamed == text[: text.index(stop)]


def logprobs(client: OpenAI) -> None:
    answer = chat(client, logprobs=True, top_logprobs=4, max_tokens=5)
    tokens = answer.choices[0].logprobs.content
    assert len(tokens) == answer.usage.completion_tokens
    for one in tokens:
        assert one.logprob <= 0
        assert len(one.top_logprobs) == 4
        assert math.isclose(one.logprob, max(top.logprob for top in one.top_logprobs)), "greedy takes the likeliest"
        assert all(a.logprob >= b.logprob for a, b in pairwise(one.top_logprobs))


def completions(client: OpenAI) -> None:
    answer = complete(client, prompt=["one two", "three"], n=2, temperature=1.0, seed=3, logprobs=2)
    assert answer.object == "text_completion"
    assert answer.id.startswith("cmpl-")
    assert [one.index for one in answer.choices] == [0, 1, 2, 3]
    assert all(one.logprobs.token_logprobs for one in answer.choices)
    echoed = complete(client, echo=True)
    assert echoed.choices[0].text == "one two" + complete(client).choices[0].text


def models(client: OpenAI) -> None:
    listed = {one.id for one in client.models.list()}
    assert {"tiny", "small", "medium", "large", "support"} <= listed
    assert "secret" not in listed
    assert client.models.retrieve("small").id == "small"


def streamed_completions_fit_the_client_but_for_its_strictness(client: OpenAI) -> None:
    """OpenAI's own server too sends null for a finish that has not come; the client's type has no null there."""
    lenient = client.with_options(_extra_kwargs={"_strict_response_validation": False})
    text = "".join(one.choices[0].text for one in complete(lenient, stream=True))
    assert text == complete(client).choices[0].text
    expect(openai.APIResponseValidationError, lambda: list(complete(client, stream=True)))


def a_first_token_has_no_logprob_which_the_strict_client_does_not_know(client: OpenAI) -> None:
    lenient = client.with_options(_extra_kwargs={"_strict_response_validation": False})
    found = complete(lenient, echo=True, logprobs=1, max_tokens=1).choices[0].logprobs.token_logprobs
    assert found[0] is None
    assert all(one <= 0 for one in found[1:])
    expect(openai.APIResponseValidationError, lambda: complete(client, echo=True, logprobs=1, max_tokens=1))


def errors(client: OpenAI) -> None:
    unknown = expect(openai.NotFoundError, lambda: chat(client, model="nobody"))
    assert (unknown.code, unknown.param) == ("model_not_found", "model")
    wrong = expect(openai.BadRequestError, lambda: chat(client, temperature=9))
    assert wrong.param == "temperature"
    tools = expect(
        openai.BadRequestError, lambda: chat(client, tools=[{"type": "function", "function": {"name": "f"}}])
    )
    assert tools.code == "unsupported_parameter"
    long = expect(openai.BadRequestError, lambda: complete(client, prompt="word " * 1000))
    assert long.code == "context_length_exceeded"
    streamed = expect(openai.BadRequestError, lambda: list(complete(client, prompt="word " * 1000, stream=True)))
    assert streamed.code == "context_length_exceeded", "before the first byte a stream has a status too"
    expect(openai.AuthenticationError, lambda: chat(client.with_options(api_key="ts-" + "0" * 12 + "-" + "0" * 64)))
    expect(openai.NotFoundError, lambda: client.embeddings.create(model=MODEL, input="one"))
    nonsense = {"type": "json_schema", "json_schema": {"name": "a", "schema": {"type": "nonsense"}}}
    expect(openai.BadRequestError, lambda: chat(client, response_format=nonsense))


def embeddings(client: OpenAI) -> None:
    texts = ["a", "what is it?"]
    answer = client.embeddings.create(model="vectors", input=texts, encoding_format="float")
    assert [one.index for one in answer.data] == [0, 1]
    assert answer.usage.prompt_tokens == sum(map(len, texts)), "the tokenizer is one of bytes"
    alone = [client.embeddings.create(model="vectors", input=text, encoding_format="float") for text in texts]
    for one, other in zip(answer.data, alone, strict=True):
        assert all(
            math.isclose(a, b, abs_tol=1e-5) for a, b in zip(one.embedding, other.data[0].embedding, strict=True)
        )
    assert answer.data[0].embedding != answer.data[1].embedding


class Thing(BaseModel):
    """What the client's own helper makes a schema of."""

    model_config = ConfigDict(extra="forbid")

    colour: Literal["red", "green"]
    many: Literal[1, 2]


def schemas(client: OpenAI) -> None:
    asked: Any = {"model": MODEL, "messages": [{"role": "user", "content": QUESTION}], "max_tokens": 80, "seed": 2}
    answer = client.chat.completions.parse(**asked, response_format=Thing)
    assert answer.choices[0].message.parsed == Thing.model_validate_json(answer.choices[0].message.content or "")
    chunks = client.chat.completions.create(
        **asked,
        stream=True,
        response_format={"type": "json_schema", "json_schema": {"name": "thing", "schema": Thing.model_json_schema()}},
    )
    assert Thing.model_validate_json("".join(one.choices[0].delta.content or "" for one in chunks))


def expect(kind: type[Exception], work: Callable[[], object]) -> Any:
    try:
        work()
    except kind as error:
        return error
    raise AssertionError(f"no {kind.__name__} came")


CHECKS = (
    chats_whole,
    chats_streamed,
    several_answers,
    seeds,
    stops,
    logprobs,
    schemas,
    embeddings,
    completions,
    models,
    streamed_completions_fit_the_client_but_for_its_strictness,
    a_first_token_has_no_logprob_which_the_strict_client_does_not_know,
    errors,
)

if __name__ == "__main__":
    url, key = sys.argv[1:]
    strict = OpenAI(base_url=url, api_key=key, _strict_response_validation=True, max_retries=0, timeout=60)
    for check in CHECKS:
        check(strict)
    print(openai.__version__)
