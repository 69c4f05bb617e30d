"""Answers are OpenAI's, as the official client's own types and its strict mode see them."""

from __future__ import annotations

import base64
import importlib.util
import json
import math
import struct
from typing import Any

import pytest

from tunesmith.cluster.errors import RequestError
from tunesmith.serving.answers import (
    DONE,
    KEEP_ALIVE,
    Answer,
    ChatStream,
    CompletionStream,
    Head,
    chat_answer,
    collect,
    completion_answer,
    embedding_answer,
    error_answer,
    error_headers,
    event,
    model_answer,
    models_answer,
)
from tunesmith.serving.engines.protocol import Piece, TokenLogprob

HEAD = Head("chatcmpl-1", "bot", 1_700_000_000, "base:version:3")
A = TokenLogprob(1, "a", -0.5, b"a", (TokenLogprob(1, "a", -0.5, b"a"), TokenLogprob(2, "b", -math.inf, b"b")))
HALF_TOP = (TokenLogprob(7, "\ufffd", -1.0, b"\xc3"), TokenLogprob(8, "\ufffd", -2.0, b"\xc4"))
HALF = TokenLogprob(7, "\ufffd", -1.0, b"\xc3", HALF_TOP)
REST = TokenLogprob(9, "\ufffd", -1.5, b"\xa9", ())
PIECES = [
    Piece(0, "a", 1, 5, logprobs=(A,)),
    Piece(1, "", 1, 5, logprobs=(HALF,)),
    Piece(1, "é", 1, 5, "stop", (REST,)),
    Piece(0, "a", 1, 5, "length", (A,)),
]
FIRST = TokenLogprob(3, "x", None, b"x")


def test_a_whole_chat_has_its_texts_finishes_usage_and_log_probabilities():
    made = chat_answer(HEAD, collect(PIECES, 2), logprobs=True, extra={"mixture": {"survivor": True}})
    assert [one["message"]["content"] for one in made["choices"]] == ["aa", "é"]
    assert [one["finish_reason"] for one in made["choices"]] == ["length", "stop"]
    assert made["usage"] == {"prompt_tokens": 5, "completion_tokens": 4, "total_tokens": 9}
    assert made["system_fingerprint"] == "base:version:3"
    assert made["mixture"] == {"survivor": True}
    token = made["choices"][0]["logprobs"]["content"][0]
    assert (token["token"], token["logprob"], token["bytes"]) == ("a", -0.5, [97])
    assert token["top_logprobs"][1] == {"token": "b", "logprob": -9999.0, "bytes": [98]}
    half = made["choices"][1]["logprobs"]["content"][0]
    assert (half["token"], half["bytes"]) == ("bytes:\\xc3", [0xC3])


def test_a_streamed_chat_joins_to_the_whole_one():
    stream = ChatStream(HEAD, logprobs=True, include_usage=True)
    chunks = [chunk for piece in PIECES for chunk in stream.chunks(piece)] + stream.end()
    texts, roles, finishes = ["", ""], [0, 0], [[], []]
    for chunk in chunks[:-1]:
        assert chunk["usage"] is None
        (choice,) = chunk["choices"]
        texts[choice["index"]] += choice["delta"].get("content", "")
        roles[choice["index"]] += "role" in choice["delta"]
        finishes[choice["index"]] += [choice["finish_reason"]] if choice["finish_reason"] else []
    assert (texts, roles, finishes) == (["aa", "é"], [1, 1], [["length"], ["stop"]])
    assert chunks[-1]["choices"] == []
    assert chunks[-1]["usage"]["total_tokens"] == 9
    plain = ChatStream(HEAD, False, False)
    text, finish = plain.chunks(Piece(0, "a", 1, 5, "stop"), {"mixture": {"survivor": True}})[1:]
    assert "mixture" not in text
    assert finish["mixture"] == {"survivor": True}
    assert plain.end() == []


def test_a_completion_counts_choices_over_prompts_and_offsets_in_characters():
    asks = [collect(PIECES, 2), collect([Piece(0, "z", 1, 2, "stop"), Piece(1, "y", 1, 2, "stop")], 2)]
    made = completion_answer(HEAD, asks, logprobs=True)
    assert [(one["index"], one["text"]) for one in made["choices"]] == [(0, "aa"), (1, "é"), (2, "z"), (3, "y")]
    assert made["usage"] == {"prompt_tokens": 7, "completion_tokens": 6, "total_tokens": 13}
    first, second = made["choices"][0]["logprobs"], made["choices"][1]["logprobs"]
    assert first["text_offset"] == [0, 1]
    assert first["top_logprobs"][0] == {"a": -0.5, "b": -9999.0}
    assert second["tokens"] == ["bytes:\\xc3", "bytes:\\xa9"]
    assert second["text_offset"] == [0, 0], "both tokens are the one character"
    assert second["top_logprobs"][0] == {"bytes:\\xc3": -1.0, "bytes:\\xc4": -2.0}


@pytest.mark.parametrize(("prompt", "tokens"), [("xa", 2), ([3, 1], 2)])
def test_echo_puts_the_prompt_and_its_log_probabilities_before(prompt, tokens: int):
    piece = Piece(0, "a", 1, tokens, "length", (A,), (FIRST, A))
    whole = completion_answer(HEAD, [collect([piece], 1)], logprobs=True, echo=True, prompts=[prompt])
    stream = CompletionStream(HEAD, 1, logprobs=True, include_usage=True, echo=[prompt])
    (chunk,), (last,) = stream.chunks(0, piece), stream.end()
    for choice in (whole["choices"][0], chunk["choices"][0]):
        assert choice["text"] == "xaa"
        assert choice["logprobs"]["token_logprobs"] == [None, -0.5, -0.5]
        assert choice["logprobs"]["text_offset"] == [0, 1, 2]
    assert whole["usage"] == last["usage"]


def test_a_scored_prompt_comes_without_the_token_that_was_drawn():
    piece = Piece(0, "a", 1, 2, "length", (A,), (FIRST, A))
    whole = completion_answer(HEAD, [collect([piece], 1)], logprobs=True, echo=True, scores_only=True, prompts=["xa"])
    assert whole["choices"][0]["text"] == "xa"
    assert whole["choices"][0]["logprobs"]["tokens"] == ["x", "a"]
    assert whole["usage"]["completion_tokens"] == 0
    stream = CompletionStream(HEAD, 1, True, True, ["xa"], scores_only=True)
    assert stream.chunks(0, piece)[0]["choices"][0]["logprobs"]["tokens"] == ["x", "a"]
    assert stream.end()[0]["usage"]["completion_tokens"] == 0


def test_errors_have_openais_shape_and_say_when_to_come_again():
    error = RequestError("too many", 429, None, "rate_limit_exceeded", 1.2)
    assert error_answer(error)["error"] == {
        "message": "too many",
        "type": "rate_limit_error",
        "param": None,
        "code": "rate_limit_exceeded",
    }
    assert error_headers(error) == {"Retry-After": "2"}
    assert error_headers(RequestError("no key", 401)) == {"WWW-Authenticate": "Bearer"}
    assert error_answer(RequestError("down", 503))["error"]["type"] == "server_error"


def test_base64_vectors_are_32_bit_floats():
    made = embedding_answer("m", [[0.5, -2.0]], 3, "base64")
    assert struct.unpack("<2f", base64.b64decode(made["data"][0]["embedding"])) == (0.5, -2.0)


def test_an_event_is_one_line_and_holds_no_nan():
    assert event({"a": "x\ny"}) == b'data: {"a": "x\\ny"}\n\n'
    with pytest.raises(ValueError, match="float"):
        event({"a": math.nan})


# --- the official client, where it is installed -----------------------------------------------------------------------

openai_needed = pytest.mark.skipif(importlib.util.find_spec("openai") is None, reason="no openai client here")


def strict_client(routes: dict[str, Any]):
    """The client over its own HTTP library's mock transport; 3.x has another library than 2.x."""
    import openai

    http = __import__("httpx2" if int(openai.__version__.split(".")[0]) >= 3 else "httpx")

    def answer(request):
        made = routes[request.url.path]
        made = made(json.loads(request.content)) if callable(made) else made
        if isinstance(made, bytes):
            return http.Response(200, content=made, headers={"content-type": "text/event-stream"})
        if isinstance(made, RequestError):
            return http.Response(made.status, json=error_answer(made), headers=error_headers(made))
        return http.Response(200, content=json.dumps(made, allow_nan=False))

    return openai.OpenAI(
        api_key="k",
        base_url="http://t/v1",
        max_retries=0,
        http_client=http.Client(transport=http.MockTransport(answer)),
        _strict_response_validation=True,
    )


def streamed(chunks: list[dict]) -> bytes:
    return KEEP_ALIVE + b"".join(event(chunk) for chunk in chunks) + KEEP_ALIVE + DONE


@openai_needed
@pytest.mark.parametrize("logprobs", [True, False])
def test_the_strict_client_takes_chats_whole_and_streamed(logprobs: bool):
    messages: Any = [{"role": "user", "content": "hi"}]
    whole = chat_answer(HEAD, collect(PIECES, 2), logprobs, extra={"mixture": {"survivor": True}})
    client = strict_client({"/v1/chat/completions": whole})
    taken = client.chat.completions.create(model="bot", messages=messages)
    assert taken.choices[1].message.content == "é"
    stream = ChatStream(HEAD, logprobs, include_usage=True)
    chunks = [chunk for piece in PIECES for chunk in stream.chunks(piece, {"mixture": {}})] + stream.end()
    client = strict_client({"/v1/chat/completions": streamed(chunks)})
    got = list(client.chat.completions.create(model="bot", messages=messages, stream=True))
    assert "".join(one.choices[0].delta.content or "" for one in got[:-1] if one.choices[0].index == 0) == "aa"
    assert got[-1].usage is not None
    assert got[-1].usage.total_tokens == 9


@openai_needed
def test_the_strict_client_takes_completions_models_embeddings_and_errors():
    whole = completion_answer(HEAD, [collect(PIECES, 2)], logprobs=True)
    models = models_answer([model_answer("bot", 1)])
    overloaded = RequestError("full", 503, None, "overloaded", 3)
    client = strict_client(
        {
            "/v1/completions": whole,
            "/v1/models": models,
            "/v1/models/bot": model_answer("bot", 1),
            "/v1/embeddings": lambda asked: embedding_answer("m", [[0.5]], 1, asked.get("encoding_format")),
            "/v1/chat/completions": overloaded,
        }
    )
    assert client.completions.create(model="bot", prompt="p").choices[0].text == "aa"
    assert [one.id for one in client.models.list()] == ["bot"]
    assert client.models.retrieve("bot").id == "bot"
    assert client.embeddings.create(model="m", input="x", encoding_format="float").data[0].embedding == [0.5]
    import openai

    with pytest.raises(openai.InternalServerError) as caught:
        client.chat.completions.create(model="bot", messages=[{"role": "user", "content": "x"}])
    assert (caught.value.code, caught.value.response.headers["retry-after"]) == ("overloaded", "3")


@openai_needed
def test_only_openais_own_shapes_stay_outside_of_the_clients_types():
    """What the server of OpenAI sends although its client has other types there; see the module's docstring."""
    from openai.types import Completion, CreateEmbeddingResponse
    from pydantic import ValidationError

    def mistakes(data: dict, type: Any = Completion) -> set[str]:
        try:
            type.model_validate(data)
        except ValidationError as error:
            return {".".join(map(str, one["loc"])) for one in error.errors()}
        return set()

    piece = Piece(0, "a", 1, 2, None, (A,), (FIRST, A))
    (chunk,) = CompletionStream(HEAD, 1, True, False).chunks(0, piece)
    assert mistakes(chunk) == {"choices.0.finish_reason"}
    (last,) = CompletionStream(HEAD, 1, True, False).chunks(0, PIECES[-1])
    assert mistakes(last) == set()
    answer = Answer(prompt=(FIRST, A), finish="stop")
    echoed = completion_answer(HEAD, [[answer]], logprobs=True, echo=True, prompts=["xa"])
    assert mistakes(echoed) == {"choices.0.logprobs.token_logprobs.0", "choices.0.logprobs.top_logprobs.0"}
    assert mistakes(embedding_answer("m", [[0.5]], 1, "base64"), CreateEmbeddingResponse) == {"data.0.embedding"}
    assert mistakes(embedding_answer("m", [[0.5]], 1, None), CreateEmbeddingResponse) == set()
