"""Hostile bytes end as a RequestError, whatever they are."""

from __future__ import annotations

import json
import random
import time

import pytest

from tunesmith.cluster.errors import RequestError
from tunesmith.serving.body import parse_body
from tunesmith.serving.protocol import ChatRequest, CompletionRequest
from tunesmith.serving.protocol_inputs import EmbeddingRequest

MIB = 1024 * 1024
GOOD = {"model": "m", "messages": [{"role": "user", "content": "hi"}]}


def refused(raw: bytes, type=ChatRequest) -> RequestError:
    with pytest.raises(RequestError) as caught:
        parse_body(raw, type, 4 * MIB)
    assert 400 <= caught.value.status < 500
    assert len(caught.value.what) < 1000
    return caught.value


def chat(**fields) -> bytes:
    return json.dumps({**GOOD, **fields}).encode()


@pytest.mark.parametrize(
    ("raw", "said"),
    [
        (b"", "not JSON"),
        (b"[]", "JSON object"),
        (b"null", "JSON object"),
        (b"\xff\xfe{}", "not UTF-8 at byte 0"),
        (b"\xef\xbb\xbf{}", "not JSON"),
        (b'{"model": "m", "model": "n"}', '"model" twice'),
        (b'{"messages": [{"role": "user", "role": "system"}]}', '"role" twice'),
        (b'{"temperature": NaN}', "NaN is not JSON"),
        (b'{"temperature": -Infinity}', "-Infinity is not JSON"),
        (b'{"temperature": 1e999}', "out of range"),
        (b'{"seed": ' + b"9" * 100_000 + b"}", "100000 digits"),
        (b'{"a": "\\ud800"}', "surrogate pair (U+D800)"),
        (b'{"\\udfff": 1}', "surrogate pair (U+DFFF)"),
        (b"[" * 1_000_000, "opening brackets"),
        (b"[" * 100_000, "64 levels"),
        (b'{"a":' * 100 + b"1" + b"}" * 100, "64 levels"),
        (b'{"a": ' + b"[" * 64 + b"]" * 64 + b"}", "64 levels"),
        (b'{"a": 1} {"b": 2}', "Extra data"),
    ],
)
def test_what_is_no_proper_json_is_refused_with_its_reason(raw: bytes, said: str):
    error = refused(raw)
    assert (error.status, error.code) == (400, "invalid_json")
    assert said in error.what


def test_a_body_that_is_too_long_is_refused_unread():
    with pytest.raises(RequestError) as caught:
        parse_body(b"\xff" * 101, ChatRequest, 100)
    assert caught.value.status == 413
    assert "101 bytes and may have 100" in caught.value.what


@pytest.mark.parametrize(
    ("raw", "type"),
    [
        (b'{"model": "m", "prompt": [' + b'"a",' * 1_000_000 + b'"a"]}', CompletionRequest),
        (b'{"model": "m", "prompt": [' + b"-1," * 1_300_000 + b"-1]}", CompletionRequest),
        (b'{"model": "m", "prompt": [' + b"[]," * 199_000 + b"[]]}", CompletionRequest),
        (b'{"model": "m", "messages": [' + b"{}," * 199_000 + b"{}]}", ChatRequest),
        (b'{"' + b"k" * 4_000_000 + b'": 1}', ChatRequest),
        (b"{" + b",".join(b'"%d":1' % index for index in range(300_000)) + b"}", ChatRequest),
        (b'{"model": "m", "input": ' + b"[" * 60 + b"]" * 60 + b"}", EmbeddingRequest),
    ],
)
def test_a_body_of_megabytes_of_mistakes_is_answered_in_seconds(raw: bytes, type):
    began = time.perf_counter()
    refused(raw, type)
    assert time.perf_counter() - began < 5  # some 0.5 s where nothing else runs


def test_mistakes_name_the_parameter_and_not_the_branch_of_a_type():
    assert refused(chat(temperature="hot")).param == "temperature"
    assert refused(chat(messages=[{"role": "user", "content": 5}])).param == "messages.0.content"
    assert refused(chat(temprature=1)).param == "temprature"
    assert refused(chat(temprature=1)).code == "unknown_parameter"
    assert refused(chat(stop=["a", 5])).param == "stop.1"
    assert (
        refused(chat(messages=[{"role": "user", "content": "x", "tool_calls": [{}]}])).param == "messages.0.tool_calls"
    )
    missing = refused(b'{"model": "m"}')
    assert (missing.param, missing.code) == ("messages", "missing_required_parameter")
    tokens = json.dumps({"model": "m", "prompt": [1, 2, -3]}).encode()
    assert refused(tokens, CompletionRequest).param == "prompt.2"
    mixed = json.dumps({"model": "m", "prompt": ["a", [1]]}).encode()
    assert refused(mixed, CompletionRequest).param == "prompt.1"


def test_a_message_never_quotes_the_prompt():
    secret = "my secret " * 10
    assert "secret" not in refused(chat(messages=[{"role": "wizard", "content": secret}])).what
    assert "secret" not in refused(chat(seed=secret)).what


def _anything(dice: random.Random, depth: int = 0):
    kind = dice.randrange(9 if depth < 5 else 7)
    if kind == 7:
        return [_anything(dice, depth + 1) for _ in range(dice.randrange(4))]
    if kind == 8:
        keys = ["role", "content", "type", "text", "schema", "$ref", "x", "", "\ud800", "é"]
        return {dice.choice(keys): _anything(dice, depth + 1) for _ in range(dice.randrange(4))}
    return dice.choice(
        [None, True, -1, 2**70, 0.5, 1e308, "", "user", "text", "json_schema", "\ud800", "\x00", "é" * 50, "1", []]
    )


@pytest.mark.parametrize("type", [ChatRequest, CompletionRequest, EmbeddingRequest])
def test_fuzzed_bodies_are_parsed_or_refused_and_nothing_else(type):
    dice = random.Random(7)
    fields = [*type.model_fields, *type.refused, *type.unheard, "model", "messages", "prompt", "input"]
    base = {"model": "m", "messages": [{"role": "user", "content": "hi"}], "prompt": "p", "input": ["i"]}
    base = {key: value for key, value in base.items() if key in type.model_fields}
    parsed, codes = 0, set()
    for _ in range(4000):
        tree = {**base, **{dice.choice(fields): _anything(dice) for _ in range(dice.randrange(3))}}
        raw = json.dumps(tree).encode()
        for _ in range(dice.choice([0, 0, 1, 3])):  # bytes that flip, go and come
            at = dice.randrange(len(raw))
            raw = raw[:at] + dice.randbytes(dice.randrange(3)) + raw[at + dice.randrange(3) :]
        try:
            parse_body(raw, type, MIB)
            parsed += 1
        except RequestError as error:
            codes.add((error.status, error.code))
            error.what.encode()
    assert {status for status, _ in codes} == {400}
    assert {"invalid_json", "invalid_value", "unknown_parameter"} <= {code for _, code in codes}
    assert parsed > 200, "the fuzzer makes nothing that is right"
