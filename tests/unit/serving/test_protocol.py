"""Requests become asks; what cannot be done is refused by name."""

from __future__ import annotations

import json

import pytest

from tunesmith.cluster.errors import RequestError
from tunesmith.serving.body import parse_body
from tunesmith.serving.engines.protocol import Version
from tunesmith.serving.protocol import ChatRequest, CompletionRequest, to_ask, to_asks
from tunesmith.serving.protocol_inputs import EmbeddingRequest

VERSION = Version("d" * 64, "/nowhere")


def chat(**fields) -> ChatRequest:
    body = {"model": "m", "messages": [{"role": "user", "content": "hi"}], **fields}
    return parse_body(json.dumps(body).encode(), ChatRequest, 10**6)


def completion(**fields) -> CompletionRequest:
    return parse_body(json.dumps({"model": "m", "prompt": "p", **fields}).encode(), CompletionRequest, 10**6)


def refused(make, **fields) -> RequestError:
    with pytest.raises(RequestError) as caught:
        make(**fields)
    assert caught.value.status == 400
    return caught.value


def test_a_chat_with_everything_becomes_an_ask():
    schema = {"type": "object", "properties": {"a": {"$ref": "#/$defs/a"}}, "$defs": {"a": {"type": "string"}}}
    asked = to_ask(
        chat(
            messages=[{"role": "developer", "content": "be kind"}, {"role": "user", "content": "hi"}],
            max_completion_tokens=7,
            temperature=0,
            top_p=0.5,
            n=3,
            stop=["\n", "END"],
            seed=11,
            frequency_penalty=0.5,
            presence_penalty=-0.5,
            logprobs=True,
            top_logprobs=4,
            response_format={"type": "json_schema", "json_schema": {"name": "x", "schema": schema, "strict": True}},
        ),
        "id1",
        VERSION,
    )
    assert asked.prompt == [{"role": "system", "content": "be kind"}, {"role": "user", "content": "hi"}]
    assert (asked.id, asked.version, asked.n) == ("id1", VERSION, 3)
    drawn = asked.sampling
    assert (drawn.max_tokens, drawn.temperature, drawn.top_p, drawn.top_k, drawn.seed) == (7, 0, 0.5, 0, 11)
    assert (drawn.frequency_penalty, drawn.presence_penalty, drawn.stop) == (0.5, -0.5, ("\n", "END"))
    assert (drawn.logprobs, drawn.prompt_logprobs, drawn.schema) == (4, None, schema)


def test_what_is_not_given_or_null_is_openais_default():
    for asked in (to_ask(chat(), "i", None), to_ask(chat(temperature=None, n=None, stop=None, seed=None), "i", None)):
        assert (asked.n, asked.sampling.temperature, asked.sampling.top_p, asked.sampling.stop) == (1, 1.0, 1.0, ())
        assert (asked.sampling.max_tokens, asked.sampling.logprobs, asked.sampling.schema) == (None, None, None)
    assert to_asks(completion(), "i", None)[0].sampling.max_tokens == 16


def test_temperature_zero_is_not_taken_for_none():
    assert to_ask(chat(temperature=0), "i", None).sampling.temperature == 0
    assert to_ask(chat(temperature=0.0), "i", None).sampling.temperature == 0


def test_text_parts_are_joined_and_others_refused():
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    assert chat(messages=[{"role": "user", "content": parts}]).conversation == [{"role": "user", "content": "a\nb"}]
    image = [{"type": "image_url", "image_url": {"url": "http://x/y.png"}}]
    error = refused(chat, messages=[{"role": "user", "content": image}])
    assert error.param == "messages.0.content"
    assert "image_url" in error.what


def test_an_answer_of_the_client_can_be_sent_back_as_a_message():
    back = {"role": "assistant", "content": "hello", "refusal": None, "annotations": None, "audio": None}
    back |= {"function_call": None, "tool_calls": None}
    assert chat(messages=[back, {"role": "user", "content": "on"}]).conversation[0]["content"] == "hello"


@pytest.mark.parametrize(
    ("param", "value"),
    [
        ("tools", [{"type": "function", "function": {"name": "f"}}]),
        ("tool_choice", "required"),
        ("functions", [{"name": "f"}]),
        ("audio", {"voice": "alloy"}),
        ("modalities", ["text", "audio"]),
        ("logit_bias", {"5": 100}),
        ("reasoning_effort", "high"),
        ("verbosity", "low"),
        ("web_search_options", {}),
    ],
)
def test_what_is_not_supported_is_refused_by_name(param: str, value):
    error = refused(chat, **{param: value})
    assert (error.param, error.code) == (param, "unsupported_parameter")


def test_what_is_not_supported_passes_when_it_asks_for_nothing():
    chat(tools=[], tool_choice="auto", parallel_tool_calls=False, logit_bias={}, modalities=["text"], functions=None)
    completion(suffix=None, logit_bias=None, best_of=1)
    assert refused(completion, suffix="end").param == "suffix"
    assert "best_of 3" in refused(completion, best_of=3).what
    assert refused(chat, parallel_tool_calls=1).param == "parallel_tool_calls"


def test_bookkeeping_is_passed_over_and_the_user_is_kept():
    assert chat(user="anna", metadata={"a": "b"}, store=True, service_tier="auto", prompt_cache_key="k").user == "anna"


@pytest.mark.parametrize(
    "fields",
    [
        {"n": 17},
        {"n": 0},
        {"n": True},
        {"stop": ["a"] * 5},
        {"stop": ""},
        {"stop": [""]},
        {"stop": "x" * 257},
        {"top_logprobs": 21, "logprobs": True},
        {"top_logprobs": 2},
        {"temperature": 2.1},
        {"temperature": -0.1},
        {"temperature": "0.5"},
        {"top_p": 0},
        {"seed": 2**63},
        {"max_tokens": 0},
        {"max_tokens": 5.5},
        {"max_tokens": 5, "max_completion_tokens": 6},
        {"messages": []},
        {"messages": [{"role": "user", "content": "x"}] * 2049},
        {"messages": [{"role": "tool", "content": "x"}]},
        {"messages": [{"role": "user", "content": None}]},
        {"stream_options": {"include_usage": True}},
        {"response_format": {"type": "json_schema"}},
        {"response_format": {"type": "text", "json_schema": {"name": "x"}}},
        {"model": ""},
        {"model": "m" * 257},
    ],
)
def test_what_is_out_of_bounds_is_refused(fields: dict):
    refused(chat, **fields)


@pytest.mark.parametrize(
    ("schema", "said"),
    [
        ({"$ref": "http://evil/x.json"}, "outside"),
        ({"$ref": "file:secrets"}, "outside"),
        ({"pattern": "a" * 513}, "513"),
        ({"maxItems": 10**9}, "1000000000"),
        ({"anyOf": [{}] * 5001}, "5000"),
        ({"enum": ["x" * 70_000]}, "65536"),
    ],
)
def test_schemas_that_reach_outside_or_blow_up_are_refused(schema: dict, said: str):
    asked = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
    error = refused(chat, response_format=asked)
    assert said in error.what
    assert (error.param or "").startswith("response_format")


def test_json_object_is_the_empty_schema():
    assert to_ask(chat(response_format={"type": "json_object"}), "i", None).sampling.schema == {}
    assert to_ask(chat(response_format={"type": "text"}), "i", None).sampling.schema is None


@pytest.mark.parametrize(
    ("prompt", "prompts"),
    [("a", ["a"]), (["a", "b"], ["a", "b"]), ([1, 2], [[1, 2]]), ([[1], [2, 3]], [[1], [2, 3]])],
)
def test_prompts_are_texts_or_token_ids_one_or_many(prompt, prompts):
    asks = to_asks(completion(prompt=prompt), "c", VERSION)
    assert [one.prompt for one in asks] == prompts
    assert [one.id for one in asks] == [f"c-{index}" for index in range(len(prompts))]
    embedded = parse_body(json.dumps({"model": "m", "input": prompt}).encode(), EmbeddingRequest, 10**6)
    assert embedded.prompts == prompts


@pytest.mark.parametrize(
    "prompt", [[], [[]], [[1], []], ["a", 1], [1, "a"], [1.5], [True], 5, None, [2**31], ["a"] * 129]
)
def test_prompts_of_other_shapes_are_refused(prompt):
    refused(completion, prompt=prompt)


def test_prompts_times_answers_are_bounded():
    assert "1024; 128 at most" in refused(completion, prompt=["a"] * 64, n=16).what


def test_echo_asks_for_the_prompts_log_probabilities_and_scoring_draws_the_one_token_it_must():
    scored = completion(echo=True, logprobs=2, max_tokens=0)
    asked = to_asks(scored, "i", None)[0].sampling
    assert scored.scores_only
    assert (asked.max_tokens, asked.logprobs, asked.prompt_logprobs) == (1, 2, 2)
    assert to_asks(completion(echo=True), "i", None)[0].sampling.prompt_logprobs == 0
    assert to_asks(completion(logprobs=0), "i", None)[0].sampling.logprobs == 0
    assert to_asks(completion(), "i", None)[0].sampling.prompt_logprobs is None
    refused(completion, max_tokens=0)


@pytest.mark.parametrize("type", [ChatRequest, CompletionRequest, EmbeddingRequest])
def test_every_field_is_documented_for_openapi(type):
    schema = type.model_json_schema()
    assert schema["additionalProperties"] is False
    assert [name for name, field in schema["properties"].items() if not field.get("description")] == []


def test_the_document_shows_every_shape_that_is_taken():
    stop = ChatRequest.model_json_schema()["properties"]["stop"]
    assert {"string", "array", "null"} == {one["type"] for one in _flat(stop)}
    content = ChatRequest.model_json_schema()["$defs"]["ChatMessage"]["properties"]["content"]
    assert {"string", "array"} == {one["type"] for one in _flat(content)}


def _flat(schema: dict) -> list[dict]:
    return [leaf for one in schema["anyOf"] for leaf in _flat(one)] if "anyOf" in schema else [schema]
