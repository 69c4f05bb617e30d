"""What no client means: every body gets an answer below 500, in OpenAI's shape, and soon."""

from __future__ import annotations

import json
import socket
import time
from typing import Any

import httpx
import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st
from schemathesis import GenerationMode
from serving_service import QUESTION, Service

from tunesmith.serving import wire

CHAT = "/v1/chat/completions"
PATIENCE_S = 15.0
BODIES = {
    "nothing": b"",
    "no JSON": b"{",
    "a list": b"[]",
    "null": b"null",
    "a number": b"1e999",
    "not UTF-8": b'{"model": "\xff\xfe"}',
    "half a surrogate pair": rb'{"model": "small", "messages": [{"role": "user", "content": "\ud800"}]}',
    "a key twice": b'{"model": "small", "model": "medium", "messages": [{"role": "user", "content": "x"}]}',
    "deep lists": b'{"messages": ' + b"[" * 100_000 + b"]" * 100_000 + b"}",
    "deep objects": b'{"a":' * 5_000 + b"1" + b"}" * 5_000,
    "many digits": b'{"model": "small", "max_tokens": ' + b"9" * 100_000 + b"}",
    "NaN": b'{"model": "small", "temperature": NaN}',
    "3 MB of text": json.dumps({"model": "small", "messages": [{"role": "user", "content": "a" * 3_000_000}]}).encode(),
    "3 MB of keys": json.dumps({str(index): index for index in range(200_000)}).encode(),
    "10 MB": b'{"model": "' + b"a" * 10_000_000 + b'"}',
}
WRONG: dict[str, Any] = {
    "model": [None, 1, "", [], {}, "a" * 10_000, "../../etc/passwd", "small@../x", "small@", "@", "\0", "ｓmall", "%2e"],
    "messages": [None, {}, "x", [], [None], [[]], [{}], [{"role": "root", "content": "x"}], [{"role": "user"}]],
    "max_tokens": [-1, 0, 1.5, "1", 2**70, True, []],
    "temperature": [-1, 3, "hot", [], True],
    "n": [0, -1, 10**9, 1.0, "2"],
    "stop": [1, [1], [""], ["a"] * 5, "", {}],
    "stream": ["yes", 1, []],
    "stream_options": [{"include_usage": True}, 1],
    "logprobs": [1, "yes"],
    "top_logprobs": [21, -1],
    "seed": [2**63, "1", 1.5],
    "response_format": ["json", {"type": "xml"}, {"type": "json_schema"},
                        {"type": "json_schema", "json_schema": {"name": "a", "schema": {"$ref": "http://127.0.0.1/"}}}],
    "user": [1, "u" * 10_000],
    "tools": [[{"type": "function"}]],
    "nonsense": [1],
}  # fmt: skip


def assert_refused(answer: Any) -> None:
    assert 400 <= answer.status_code < 500, answer.text[:500]
    error = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert len(answer.content) < 3_000, "a refusal does not repeat what was sent"


@pytest.mark.parametrize("body", BODIES.values(), ids=BODIES)
@pytest.mark.parametrize("path", [CHAT, "/v1/completions", "/v1/embeddings", "/classify", "/tokenize"])
def test_bodies_that_are_no_requests_are_refused(service: Service, path: str, body: bytes) -> None:
    began = time.monotonic()
    assert_refused(service.post(path, body))
    assert time.monotonic() - began < PATIENCE_S


@pytest.mark.parametrize("field", WRONG)
def test_fields_of_the_wrong_kind_are_refused(service: Service, field: str) -> None:
    for value in WRONG[field]:
        body = {"model": "small", "messages": QUESTION, "max_tokens": 1, field: value}
        try:
            assert_refused(service.post(CHAT, body))
        except AssertionError as error:
            raise AssertionError(f"{field} = {str(value)[:60]!r}: {error}") from error


def test_operators_mistakes_are_refused_and_change_nothing(service: Service) -> None:
    before = service.registry.read()
    alias = "/admin/adapters/support/aliases"
    with_body: list[tuple[str, Any]] = [
        (f"{alias}/prod", {"version": "../../x"}),
        (f"{alias}/prod", {"version": 1}),
        (f"{alias}/prod", b'{"version": "' + service.digests["support-2"].encode() + b'", "version": "x"}'),
        (f"{alias}/prod", {"version": service.digests["support-2"], "generation": 1}),
        (f"{alias}/latest", {"version": service.digests["support-2"]}),
        (f"{alias}/" + "a" * 300, {"version": service.digests["support-2"]}),
        (f"{alias}/%2e%2e%2fx", {"version": service.digests["support-2"]}),
        (f"{alias}/a%00b", {"version": service.digests["support-2"]}),
        ("/admin/adapters/nobody/aliases/prod", {"version": service.digests["support-2"]}),
        (f"{alias}/prod/split", {"weights": {service.digests["support-2"]: 10**400}}),
        (f"{alias}/prod/split", {"weights": {service.digests["support-2"]: -1}}),
        (f"{alias}/prod/split", {"weights": {}}),
        (f"{alias}/prod/split", {"weights": [1]}),
    ]
    for path, body in with_body:
        sent: Any = {"content": body} if isinstance(body, bytes) else {"content": json.dumps(body)}
        assert_refused(httpx.put(service.root + path, headers=service.headers(), timeout=30, **sent))
    for what in ("prod", service.digests["support-1"], "%2e%2e", "a" * 500):
        deleted = httpx.delete(f"{service.root}/admin/adapters/nobody/{what}", headers=service.headers(), timeout=30)
        assert_refused(deleted)
    assert service.registry.read() == before


def test_unknown_routes_and_methods_are_refused_in_the_same_shape(service: Service) -> None:
    for method, path in (
        ("GET", "/v1/nothing"),
        ("DELETE", CHAT),
        ("PUT", "/v1/models"),
        ("POST", "/"),
        ("PATCH", CHAT),
    ):
        assert_refused(httpx.request(method, service.root + path, headers=service.headers(), timeout=30))


@pytest.mark.matrix
def test_a_body_that_never_ends_is_given_up_and_keeps_nobody_waiting(service: Service) -> None:
    """A byte now and then, as slow-loris does it."""
    host, _, port = service.root.removeprefix("http://").partition(":")
    with socket.create_connection((host, int(port)), timeout=1) as slow:
        key = service.headers()["Authorization"]
        head = f"POST {CHAT} HTTP/1.1\r\nHost: x\r\nAuthorization: {key}\r\nContent-Length: 1000\r\n\r\n"
        slow.sendall(head.encode())
        began, answer = time.monotonic(), b""
        while not answer and time.monotonic() - began < wire.BODY_S + PATIENCE_S:
            slow.sendall(b"{")
            try:
                answer = slow.recv(4096)
            except TimeoutError:
                asked = time.monotonic()
                assert service.get("/v1/models").status_code == 200
                assert time.monotonic() - asked < 2
            slow.settimeout(PATIENCE_S)
            while answer and b"}" not in answer and (more := slow.recv(4096)):  # its body may come after its head
                answer += more
    assert answer.startswith(b"HTTP/1.1 408"), answer
    assert b"body_too_slow" in answer


def test_what_the_openapi_document_allows_never_ends_in_a_failure_of_the_server(service: Service) -> None:
    document = service.get("/openapi.json").json()
    assert {"ChatRequest", "MoveRequest", "Error"} <= set(document["components"]["schemas"])
    schema: Any = schemathesis.openapi.from_dict(document)
    failures: list[str] = []
    statuses: list[int] = []
    for result in schema.get_all_operations():
        operation = result.ok()
        for mode in (GenerationMode.POSITIVE, GenerationMode.NEGATIVE):
            try_all(service, operation, mode, failures, statuses)
    assert not failures, "\n".join(failures[:5])
    assert {200, 400, 404} <= set(statuses), "requests of every kind came through"
    assert service.is_ready()


def try_all(service: Service, operation: Any, mode: GenerationMode, failures: list[str], statuses: list[int]) -> None:
    strategy: st.SearchStrategy[Any] = operation.as_strategy(generation_mode=mode)

    @seed(4)
    @settings(
        max_examples=12,
        deadline=None,
        database=None,
        phases=[Phase.generate],
        suppress_health_check=(HealthCheck.too_slow, HealthCheck.filter_too_much),
    )
    def each(case: Any) -> None:
        if operation.path.startswith("/v1/") and isinstance(case.body, dict):
            case.body |= {"max_tokens": 2, "n": 1} if "max_tokens" in case.body else {}
        began = time.monotonic()
        answer = case.call(base_url=service.root, headers=service.headers(), timeout=30)
        took = time.monotonic() - began
        statuses.append(answer.status_code)
        if answer.status_code >= 500 or took > PATIENCE_S:
            failures.append(f"{case.method} {case.path} {str(case.body)[:300]}: {answer.status_code} in {took:.1f} s")
        elif answer.status_code >= 400 and "error" not in (answer.json() or {}):
            failures.append(f"{case.method} {case.path}: an error of another shape: {answer.text[:200]}")

    given(strategy)(each)()
