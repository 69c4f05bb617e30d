"""The fast engine behind the service: adapters of several ranks in one batch, and answers that fit a schema."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from adapters import make_adapter
from peft import LoraConfig, TaskType
from serving_load import a_client
from serving_service import QUESTION, RANKS, Service, oracle, processes, serving
from transformers import AutoTokenizer

from tunesmith.cluster.session import RaySession
from tunesmith.serving.answers import token_name
from tunesmith.serving.checks import Rules
from tunesmith.serving.engines.protocol import TokenLogprob
from tunesmith.serving.engines.text import spelled

pytest.importorskip("vllm")
PROMPTS = [[5, 9, 30, 31, 32, 40], [7, 8, 60, 61, 62, 63, 64, 65, 66], [100, 101, 102]]
COUNT = 16
SCHEMA = {
    "type": "object",
    "properties": {"colour": {"enum": ["red", "green"]}, "many": {"type": "boolean"}},
    "required": ["colour", "many"],
    "additionalProperties": False,
}


@pytest.fixture(scope="module")
def fast(ray_session: RaySession, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    base = {"engine": "vllm", "dtype": "fp32", "max_batch": 16, "max_rank": 16}
    with serving(ray_session, tmp_path_factory.mktemp("fast"), {"bases": {"tiny": base}}) as running:
        yield running


def test_a_batch_of_mixed_ranks_answers_as_plain_peft_does_for_each_alone(fast: Service) -> None:
    names = [None, *RANKS]

    async def ask(client: Any, name: str | None, prompt: list[int]) -> list[str]:
        body = {"model": name or "tiny", "prompt": prompt, "max_tokens": COUNT, "temperature": 0, "ignore_eos": True,
                "logprobs": 0}  # fmt: skip
        answer = await client.post(f"{fast.url}/completions", json=body)
        assert answer.status_code == 200, answer.text
        return answer.json()["choices"][0]["logprobs"]["tokens"]

    async def all_at_once() -> list[list[str]]:
        async with a_client(fast, 32) as client:
            return await asyncio.gather(*(ask(client, name, prompt) for prompt in PROMPTS for name in names))

    found = iter(asyncio.run(all_at_once()))
    tokenizer = AutoTokenizer.from_pretrained(fast.bases["tiny"])
    for prompt in PROMPTS:
        for name in names:
            expected = oracle(fast.bases["tiny"], fast.folders[name] if name else None, prompt, COUNT)
            spelt = [token_name(TokenLogprob(token, "", 0.0, spelled(token, tokenizer)[1])) for token in expected]
            assert next(found) == spelt, (name, prompt)


@pytest.mark.parametrize("stream", [False, True])
def test_an_answer_fits_its_schema(fast: Service, stream: bool) -> None:
    wanted: Any = {"type": "json_schema", "json_schema": {"name": "thing", "schema": SCHEMA, "strict": True}}
    asked: Any = {"model": "medium", "messages": QUESTION, "max_tokens": 500, "response_format": wanted, "seed": 1}
    client = fast.client()
    if stream:
        chunks = client.chat.completions.create(**asked, stream=True)
        text = "".join(one.choices[0].delta.content or "" for one in chunks)
    else:
        text = client.chat.completions.create(**asked).choices[0].message.content
    thing = json.loads(text)
    assert thing.keys() == {"colour", "many"}
    assert thing["colour"] in ("red", "green")


def test_an_adapter_that_it_does_not_serve_is_refused_each_time_and_nothing_else_suffers(
    fast: Service, tmp_path: Path
) -> None:
    config = LoraConfig(r=4, target_modules="all-linear", use_dora=True, task_type=TaskType.CAUSAL_LM)
    version = make_adapter(fast.bases["tiny"], tmp_path / "dora", config)
    fast.registry.add("dora", Path(version.folder), rules=Rules(trust_base=True))
    asked: Any = {"model": "dora", "prompt": "a", "max_tokens": 2}
    time.sleep(1.5)  # until the desk has looked
    for _ in range(3):
        answer = fast.post("/v1/completions", asked)
        assert answer.status_code == 422, answer.text
        assert "does not serve DoRA" in answer.json()["error"]["message"]
    assert fast.post("/v1/completions", {**asked, "model": "medium"}).status_code == 200


@pytest.mark.parametrize("stream", [False, True])
def test_several_greedy_answers_are_all_the_likeliest(fast: Service, stream: bool) -> None:
    asked: Any = {"model": "medium", "prompt": PROMPTS[0], "max_tokens": 6, "temperature": 0}
    one = fast.post("/v1/completions", asked).json()["choices"][0]["text"]
    texts = dict.fromkeys(range(3), "")
    client = fast.client(_strict_response_validation=False)
    made = client.completions.create(**asked, n=3, stream=stream)
    for chunk in made if stream else [made]:
        for choice in chunk.choices:
            texts[choice.index] += choice.text
    assert texts == dict.fromkeys(range(3), one)


def test_a_replica_ends_with_its_engine_and_a_new_one_answers(fast: Service) -> None:
    """The last test here: the replica that comes has loaded nothing."""
    replica = processes("ray::ServeReplica:tunesmith:engine-tiny")[0]
    processes("VLLM::EngineCore")[0].kill()
    answers = [fast.post("/v1/completions", {"model": "medium", "prompt": "a", "max_tokens": 2}) for _ in range(3)]
    assert [answer.status_code for answer in answers] == [200] * 3
    assert not replica.is_running()
