"""The running service and the clients that people have: OpenAI's, LangChain's, and lm-eval's way of asking."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import openai
import openai_checks
import pytest
from langchain_openai import ChatOpenAI
from openai import OpenAI
from serving_service import QUESTION, RANKS, Service, oracle

from tunesmith.cluster.errors import UsageError
from tunesmith.serving.chat import talk
from tunesmith.serving.config import Limits

PROMPT = [5, 9, 30, 31, 32, 40]


@pytest.mark.parametrize("check", openai_checks.CHECKS, ids=lambda check: check.__name__)
def test_the_official_client(service: Service, check: Callable[[OpenAI], None]) -> None:
    check(service.client())


def test_the_official_client_of_the_version_before(service: Service) -> None:
    folder = os.environ.get("OPENAI_2")
    if not folder:
        pytest.skip("OPENAI_2 names no folder with openai 2.x: pip install --target FOLDER 'openai<3'")
    command = [sys.executable, str(Path(openai_checks.__file__)), service.url, service.key]
    done = subprocess.run(
        command, env={**os.environ, "PYTHONPATH": folder}, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("2.")


def test_langchain(service: Service) -> None:
    chat: Any = ChatOpenAI(model="small", base_url=service.url, api_key=service.key, temperature=0, max_tokens=16)  # type: ignore[arg-type]
    whole = chat.invoke("What is it?")
    assert whole.content
    assert whole.usage_metadata["output_tokens"] <= 16
    assert "".join(str(chunk.content) for chunk in chat.stream("What is it?")) == whole.content
    assert [one.content for one in chat.batch(["What is it?"] * 3)] == [whole.content] * 3


def test_chat_in_the_terminal(service: Service, capsys: pytest.CaptureFixture[str]) -> None:
    said = ["/model nobody", "/foo", "/model medium", "What is it?", "/quit", "never said"]
    talk(service.url, service.key, "small", [f"{line}\n" for line in said])
    shown = capsys.readouterr()
    assert shown.out.strip()
    notes = shown.err.splitlines()
    assert notes[0].startswith("nobody: there are tiny, ")
    assert notes[1:] == ["there is no /foo; /help shows what there is", "now with medium"]
    for key, model, wrong in (
        (None, "small", "no API key was given"),
        ("ts-nonsense", "small", "401 - this API key is not known"),
        (service.key, "smal", "smal is not served; there are tiny, "),
    ):
        with pytest.raises(UsageError, match=wrong):
            talk(service.url, key, model, [])


def test_lm_eval_scores_prompts_of_token_ids(service: Service) -> None:
    """Its `local-completions` sends lists of token ids with echo, and finds the continuation by the tokens' number."""
    model = service.bases["tiny"], service.folders["medium"]
    continuation = oracle(*model, PROMPT, 6)
    for most in (1, 0):
        body = {"model": "medium", "prompt": [PROMPT + continuation, PROMPT], "max_tokens": most, "temperature": 0,
                "logprobs": 1, "seed": 1234, "echo": True}  # fmt: skip
        answer = service.post("/v1/completions", body)
        assert answer.status_code == 200, answer.text
        scored, short = sorted(answer.json()["choices"], key=lambda choice: choice["index"])
        extra = min(most, 1)
        assert len(scored["logprobs"]["token_logprobs"]) == len(PROMPT) + 6 + extra
        assert len(short["logprobs"]["tokens"]) == len(PROMPT) + extra
        assert scored["logprobs"]["token_logprobs"][0] is None
        ours = slice(len(PROMPT), len(PROMPT) + 6)
        pairs = zip(scored["logprobs"]["token_logprobs"][ours], scored["logprobs"]["top_logprobs"][ours], strict=True)
        assert all(math.isclose(one, max(top.values())) for one, top in pairs), "the greedy continuation is greedy"


def test_lm_eval_generates_until_a_stop(service: Service) -> None:
    body = {"model": "medium", "prompt": [PROMPT], "max_tokens": 12, "temperature": 0, "seed": 1234}
    text = service.post("/v1/completions", body).json()["choices"][0]["text"]
    until = text[5:7]
    answer = service.post("/v1/completions", {**body, "stop": [until, "<|endoftext|>"]}).json()
    assert answer["choices"][0]["text"] == text[: text.index(until)]


@pytest.mark.parametrize("name", [None, *RANKS])
def test_each_adapter_answers_as_plain_peft_does(service: Service, name: str | None) -> None:
    folder = service.folders[name] if name else None
    expected = oracle(service.bases["tiny"], folder, PROMPT, 12)
    body = {"model": name or "tiny", "prompt": PROMPT + expected, "max_tokens": 0, "echo": True, "logprobs": 1}
    found = service.post("/v1/completions", body).json()["choices"][0]["logprobs"]
    best = [max(top, key=lambda text, top=top: top[text]) for top in found["top_logprobs"][len(PROMPT) :]]
    assert best == found["tokens"][len(PROMPT) :]


def test_every_answer_says_which_version_gave_it(service: Service) -> None:
    answer = service.post("/v1/chat/completions", {"model": "support", "messages": QUESTION, "max_tokens": 2})
    digest = service.digests["support-1"]
    assert answer.headers["x-tunesmith-version"] == digest
    assert digest[:12] in answer.json()["system_fingerprint"]
    assert answer.headers["x-tunesmith-base"]
    assert int(answer.headers["x-tunesmith-generation"]) > 0


def test_a_mixture_is_a_model_like_any_other(service: Service) -> None:
    answer = service.client().chat.completions.create(model="panel", messages=QUESTION, max_tokens=8, temperature=0)
    assert answer.choices[0].message.content
    assert answer.model_extra is not None
    assert [one["outcome"] for one in answer.model_extra["mixture"]["stages"][0]] == ["answered", "answered"]
    assert answer.usage is not None
    assert answer.usage.completion_tokens > 8, "the proposers' tokens are counted"


def test_without_a_key_nothing_is_told(service: Service) -> None:
    for path in ("/v1/models", "/metrics", "/admin/adapters"):
        for headers in ({}, {"Authorization": "Bearer nonsense"}, {"Authorization": "Basic YTpi"}):
            answer = httpx.get(service.root + path, headers=headers, timeout=30)
            assert answer.status_code == 401, (path, answer.text)
            assert answer.headers["www-authenticate"] == "Bearer"
            assert answer.json()["error"]["code"] == "invalid_api_key"


def test_a_key_for_asking_changes_nothing(service: Service) -> None:
    answer = service.get("/admin/adapters", service.new_key("acme"))
    assert answer.status_code == 403
    assert answer.json()["error"]["code"] == "insufficient_scope"


def test_another_tenants_adapter_does_not_exist(service: Service) -> None:
    rival, stranger = service.client(service.new_key("rival")), service.client(service.new_key("acme"))
    assert "secret" in {one.id for one in rival.models.list()}
    assert rival.chat.completions.create(model="secret", messages=QUESTION, max_tokens=2).choices
    for ask in (
        lambda name: stranger.models.retrieve(name),
        lambda name: stranger.chat.completions.create(model=name, messages=QUESTION),
    ):
        with pytest.raises(openai.NotFoundError) as theirs:
            ask("secret")
        with pytest.raises(openai.NotFoundError) as nobodys:
            ask("secres")
        assert str(theirs.value).replace("secret", "X") == str(nobodys.value).replace("secres", "X")


def test_a_key_that_has_used_its_minute_is_told_when_to_come_again(service: Service) -> None:
    client = service.client(service.new_key(limits=Limits(requests_per_minute=2)))
    for _ in range(2):
        client.chat.completions.create(model="tiny", messages=QUESTION, max_tokens=1)
    with pytest.raises(openai.RateLimitError) as refused:
        client.chat.completions.create(model="tiny", messages=QUESTION, max_tokens=1)
    assert 1 <= int(refused.value.response.headers["retry-after"]) <= 60
    assert refused.value.code == "rate_limit_exceeded"


def test_what_gives_no_text_says_where_to_ask(service: Service) -> None:
    asked = {"model": "vectors", "messages": QUESTION}
    for path, body, said in (
        ("/v1/chat/completions", asked, "vectors gives embeddings, no text: ask /v1/embeddings"),
        ("/v1/chat/completions", {**asked, "stream": True}, "vectors gives embeddings, no text: ask /v1/embeddings"),
        ("/classify", {"model": "vectors", "input": "a"}, "vectors gives embeddings: ask /v1/embeddings"),
        ("/classify", {"model": "tiny", "input": "a"}, "tiny writes text; it gives neither embeddings nor classes"),
        ("/v1/embeddings", {"model": "panel", "input": "a"}, "a mixture of agents gives text alone"),
        ("/v1/completions", {"model": "panel", "prompt": "a"}, "a mixture of agents takes conversations"),
        ("/v1/embeddings", {"model": "vectors", "input": "a" * 99}, "this model takes 64 tokens; the prompt has 99"),
    ):
        answer = service.post(path, body)
        assert 400 <= answer.status_code < 500, answer.text
        assert said in answer.json()["error"]["message"]
