"""The service while aliases move, processes die, clients leave, and far more is asked than can be answered."""

from __future__ import annotations

import asyncio
import itertools
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import httpx
import psutil
import pytest
from ray import serve
from serving_load import Outcome, a_client, arriving, ask, percentile, streaming
from serving_service import QUESTION, Service, free_port, processes, serving

from tunesmith.cluster.session import RaySession

REPLICA, DESK, GATEWAY, PROXY = (
    "ray::ServeReplica:tunesmith:engine-tiny",
    "ray::DeskActor",
    "ray::ServeReplica:tunesmith:gateway",
    "ray::ProxyActor",
)
DEADLINE_S = 4.0
LONG = {"model": "narrow", "messages": QUESTION, "max_tokens": 1900, "ignore_eos": True}
"""Takes seconds on a base that has one slot."""
GREEDY: dict[str, Any] = {"max_tokens": 16, "temperature": 0}
"""An answer that is always the same; a sampled one is now and then empty, which is no proposal."""
WORK: dict[str, Any] = {"max_tokens": 400, "ignore_eos": True}
MOVES = """
import sys, time
from tunesmith.serving.registry import Registry
registry = Registry(sys.argv[1])
for index in range(int(sys.argv[2])):
    registry.move("support", "prod", sys.argv[3 + index % 2])
    time.sleep(0.2)
"""


@pytest.fixture(scope="module")
def stalled() -> Iterator[int]:
    """The port of an endpoint that takes every connection and never answers."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        yield listener.getsockname()[1]


@pytest.fixture(scope="module", params=["transformers", pytest.param("vllm", marks=pytest.mark.matrix)])
def service(
    ray_session: RaySession, tmp_path_factory: pytest.TempPathFactory, stalled: int, request: pytest.FixtureRequest
) -> Iterator[Service]:
    settings = {
        "bases": {
            "tiny": {"engine": request.param, "replicas": 2, "max_batch": 8},
            "narrow": {"engine": request.param, "max_batch": 1},
        },
        "endpoints": {
            "stalled": {"url": f"http://127.0.0.1:{stalled}/v1"},
            "dead": {"url": f"http://127.0.0.1:{free_port()}/v1"},
        },
        "agents": {
            "panel": {
                "layers": [[{"model": "small"}, {"model": "medium"}, {"model": "a", "endpoint": "stalled"},
                            {"model": "b", "endpoint": "dead"}]],
                "aggregator": {"model": "tiny"},
                "deadline_s": DEADLINE_S,
            },
            "impatient": {"layers": [[{"model": "tiny"}, {"model": "narrow"}]], "deadline_s": 2},
        },
        "http": {"gateways": 2},
    }  # fmt: skip
    with serving(ray_session, tmp_path_factory.mktemp("service"), settings) as running:
        yield running


def answers_of(service: Service, **settings: Any) -> dict[str, str]:
    """Each version's own greedy answer, by its digest."""
    digests = [service.digests["support-1"], service.digests["support-2"]]

    async def all_of_them() -> list[Outcome]:
        async with a_client(service, 1) as client:
            return [await ask(client, service, f"support@{digest}", **settings) for digest in digests]

    texts = {one.version: one.text for one in asyncio.run(all_of_them())}
    assert len(set(texts.values())) == 2, "versions are told apart by their answers"
    return texts


def assert_versions_in_order(outcomes: list[Outcome]) -> None:
    """Once an answer has begun with a generation, no request that is sent later gets an earlier one."""
    headed = sorted((one for one in outcomes if one.generation >= 0), key=lambda one: one.headed)
    newest = list(itertools.accumulate((one.generation for one in headed), max))
    at = 0
    for one in sorted(headed, key=lambda one: one.sent):
        while at < len(headed) and headed[at].headed < one.sent:
            at += 1
        assert at == 0 or one.generation >= newest[at - 1], (one, newest[at - 1])


def test_a_hundred_moves_of_an_alias_are_noticed_by_nobody(service: Service) -> None:
    texts = answers_of(service)
    digests = list(texts)
    moved: list[tuple[float, int]] = []
    with streaming(service, 16, "support") as load:
        elsewhere = subprocess.Popen([sys.executable, "-c", MOVES, service.registry.root, "50", *digests])
        for index in range(50):
            answer = httpx.put(
                f"{service.root}/admin/adapters/support/aliases/prod",
                json={"version": digests[index % 2]}, headers=service.headers(), timeout=30,
            )  # fmt: skip
            assert answer.status_code == 200, answer.text
            moved.append((time.monotonic(), answer.json()["generation"]))
            time.sleep(0.2)
        assert elsewhere.wait(60) == 0
    assert load.broken == []
    assert len(load.outcomes) > 100
    assert {one.version for one in load.outcomes} == set(digests)
    assert [one for one in load.outcomes if one.text != texts[one.version]] == []
    assert len({one.generation for one in load.outcomes}) > 20
    assert_versions_in_order(load.outcomes)
    for at, generation in moved:
        assert all(one.generation >= generation for one in load.outcomes if one.sent > at)


def test_a_killed_replica_loses_its_own_requests_only_and_comes_back(service: Service) -> None:
    texts, before = answers_of(service), service.registry.read()
    with streaming(service, 16, "support", max_tokens=48, ignore_eos=True) as load:
        time.sleep(3)
        victim = processes(REPLICA)[0]
        orphans = victim.children(recursive=True)
        victim.kill()
        killed = time.monotonic()
        wait_until(lambda: victim.pid not in {one.pid for one in processes(REPLICA)} and running("engine-tiny") == 2)
        time.sleep(3)
    assert psutil.wait_procs(orphans, 30)[1] == [], "an engine's own processes end with it"
    assert len(load.broken) <= 16
    assert [one for one in load.broken if not one.sent < killed < one.ended] == []
    assert any(one.sent > killed and one.is_whole for one in load.outcomes)
    assert service.registry.read() == before
    assert answers_of(service) == texts


def test_a_killed_desk_is_noticed_by_nobody(service: Service) -> None:
    before = service.registry.read()
    with streaming(service, 16, "support") as load:
        time.sleep(2)
        (victim,) = processes(DESK)
        victim.kill()
        wait_until(lambda: [one.pid for one in processes(DESK)] not in ([], [victim.pid]))
        time.sleep(3)
    assert load.broken == []
    assert service.registry.read() == before
    assert_versions_in_order(load.outcomes)


@pytest.mark.matrix
def test_a_killed_proxy_is_replaced_in_seconds(service: Service) -> None:
    (victim,) = processes(PROXY)
    victim.kill()
    killed = time.monotonic()
    wait_until(service.is_ready, 60)
    assert time.monotonic() - killed < 15


def test_a_client_that_leaves_gives_its_slot_back_within_a_second(service: Service) -> None:
    """The base has one slot at the desk and one in the engine, so that the next request shows when both are free."""
    lone = first_token(service)
    with long_answer(service):
        pass
    assert first_token(service) < lone + 1
    with pytest.raises(httpx.ReadTimeout):
        post(service, LONG, 0.5)
    assert first_token(service) < lone + 1


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_leaves_the_queue_leaves_no_gap(service: Service, stream: bool) -> None:
    with long_answer(service):
        for _ in range(3):
            with pytest.raises(httpx.ReadTimeout):
                post(service, {**LONG, "stream": stream}, 0.3)
    assert first_token(service) < 2


def test_a_proposer_that_is_given_up_while_it_waits_leaves_no_gap(service: Service) -> None:
    with long_answer(service):
        answer = post(service, {"model": "impatient", "messages": QUESTION, **GREEDY}, 30)
        assert answer.status_code == 200, answer.text
        assert answer.json()["mixture"]["timed_out"] == ["narrow"]
    assert first_token(service) < 2


@contextmanager
def long_answer(service: Service) -> Iterator[None]:
    """A client that has begun to read the answer of the narrow base, and leaves at the end of the block."""
    body = {**LONG, "stream": True}
    url = f"{service.url}/chat/completions"
    with httpx.stream("POST", url, json=body, headers=service.headers(), timeout=30, verify=False) as answer:
        lines = answer.iter_lines()
        assert next(lines).startswith("data: ")
        yield


def post(service: Service, body: dict[str, Any], patience_s: float) -> httpx.Response:
    url = f"{service.url}/chat/completions"
    # nothing here is encrypted, and to read all certificates takes longer than an answer
    return httpx.post(url, json=body, headers=service.headers(), timeout=patience_s, verify=False)


def first_token(service: Service) -> float:
    """Seconds that the next request for the narrow base takes."""
    began = time.monotonic()
    answer = post(service, {**LONG, "max_tokens": 1}, 90)
    assert answer.status_code == 200, answer.text
    return time.monotonic() - began


# Who asks and who answers share the cores, so this needs a machine that does nothing else.
@pytest.mark.matrix
@pytest.mark.parametrize(("seconds", "times"), [(20, 6), (60, 3)])
def test_ten_times_the_load_that_can_be_answered(service: Service, seconds: int, times: float) -> None:
    async def alone() -> list[Outcome]:
        async with a_client(service, 1) as client:
            return [await ask(client, service, "narrow", **WORK) for _ in range(10)]

    asyncio.run(alone())
    unloaded = asyncio.run(alone())
    with streaming(service, 2, "narrow", **WORK) as full:
        time.sleep(8)
    capacity = sum(one.is_whole for one in full.outcomes) / 8
    watched = processes(DESK) + processes(GATEWAY)
    before = sum(one.memory_info().rss for one in watched)
    outcomes = asyncio.run(arriving(service, "narrow", 10 * capacity, seconds, **WORK))
    after = sum(one.memory_info().rss for one in watched)
    accepted = [one for one in outcomes if one.status == 200]
    assert {one.status for one in outcomes} <= {200, 429, 503}
    assert [one for one in outcomes if one.status != 200 and not one.retry_after] == []
    assert [one for one in accepted if not one.is_whole] == []
    assert len(accepted) > capacity * seconds / 2
    assert after - before < 100 * 2**20
    slowest = percentile([one.seconds for one in accepted], 0.99)
    assert slowest < times * percentile([one.seconds for one in unloaded], 0.99)


def test_a_mixture_with_a_stalled_and_a_dead_proposer_answers_by_the_deadline(service: Service) -> None:
    client = service.client()
    began = time.monotonic()
    answer = client.chat.completions.create(model="panel", messages=QUESTION, **GREEDY)
    assert time.monotonic() - began < DEADLINE_S + 2
    assert answer.choices[0].message.content
    assert answer.model_extra is not None
    mixture = answer.model_extra["mixture"]
    assert (mixture["timed_out"], mixture["failed"]) == (["a"], ["b"])
    assert mixture["answered_by"] == "aggregator"
    chunks = list(client.chat.completions.create(model="panel", messages=QUESTION, stream=True, **GREEDY))
    flagged: Any = [one.model_extra for one in chunks if one.model_extra]
    assert flagged[-1]["mixture"]["timed_out"] == ["a"]


def running(deployment: str) -> int:
    """Replicas that take requests."""
    states: Any = serve.status().applications["tunesmith"].deployments[deployment].replica_states
    return states.get("RUNNING", 0)


def wait_until(is_so: Any, seconds: float = 90) -> None:
    deadline = time.monotonic() + seconds
    while not is_so():
        assert time.monotonic() < deadline, f"still not so after {seconds} s"
        time.sleep(0.2)
