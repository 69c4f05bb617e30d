"""Every request is counted once, under the version that answered, and no traffic makes /metrics grow without end."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import tiny_adapters
from desk_backend import InProcess, desk, samples
from traffic import Traffic, reference

from tunesmith.cluster.errors import RequestError
from tunesmith.serving.desk import Desk, Entry
from tunesmith.serving.drift import WINDOW
from tunesmith.serving.engines.diary import News
from tunesmith.serving.gateway import Gateway
from tunesmith.serving.metrics import OTHER, Labels, LabelSets, Metrics, Report, status_of

SUPPORT = Labels("tiny", "support", "0123456789ab", "acme")
TALK = [{"role": "user", "content": "hi"}]


def test_a_report_is_counted_under_its_labels() -> None:
    metrics = Metrics()
    metrics.began(SUPPORT, 0.3, 1.0)
    metrics.ended(SUPPORT, Report(5, 9, 1, first_s=0.2, total_s=1.0), 1.0)
    seen = samples(metrics.text({"tiny": 2}, {"tiny": 1}))
    assert seen["tunesmith_requests_total", *SUPPORT, "2xx"] == 1
    assert seen["tunesmith_prompt_tokens_total", *SUPPORT] == 5
    assert seen["tunesmith_completion_tokens_total", *SUPPORT] == 9
    assert seen["tunesmith_time_to_first_token_seconds_sum", *SUPPORT] == pytest.approx(0.2)
    assert seen["tunesmith_time_per_output_token_seconds_sum", *SUPPORT] == pytest.approx(0.1)  # 8 further tokens
    assert seen["tunesmith_request_seconds_sum", *SUPPORT] == 1
    assert seen["tunesmith_queue_seconds_bucket", *SUPPORT, "0.25"] == 0
    assert seen["tunesmith_queue_seconds_bucket", *SUPPORT, "0.5"] == 1
    assert (seen["tunesmith_requests_open", "tiny"], seen["tunesmith_requests_waiting", "tiny"]) == (2, 1)


def test_time_per_token_is_that_of_one_answer_however_many_are_written_at_once() -> None:
    assert Report(1, 20, answers=2, first_s=1.0, total_s=2.8).token_s == pytest.approx(0.2)
    assert Report(1, 1, first_s=1.0, total_s=1.0).token_s is None
    assert Report(1, 9, total_s=1.0).token_s is None, "an answer in one piece says nothing of its tokens"


def test_loads_and_evictions_are_counted_by_version() -> None:
    metrics = Metrics()
    metrics.adapters([SUPPORT, SUPPORT], [SUPPORT], 1.0)
    seen = samples(metrics.text({}, {}))
    assert seen["tunesmith_adapter_loads_total", *SUPPORT] == 2
    assert seen["tunesmith_adapter_evictions_total", *SUPPORT] == 1


@pytest.mark.parametrize(
    ("error", "status"), [(RequestError("no", 429), 429), (asyncio.CancelledError(), 499), (KeyError("x"), 500)]
)
def test_an_exception_amounts_to_a_status(error: BaseException, status: int) -> None:
    assert status_of(error) == status


def test_a_label_beyond_its_bound_is_other_and_the_rest_of_the_set_stays() -> None:
    sets = LabelSets(most_values=2)
    for tenant in ("a", "b", "c"):
        admitted, _ = sets.admit(SUPPORT._replace(tenant=tenant), 0)
    assert admitted == SUPPORT._replace(tenant=OTHER)
    assert sets.admit(SUPPORT._replace(tenant="b"), 0)[0].tenant == "b"


def test_sets_beyond_the_bound_are_other_throughout() -> None:
    sets = LabelSets(most_values=100, most_sets=3)
    admitted = {sets.admit(SUPPORT._replace(version=str(v), tenant=str(v)), 0)[0] for v in range(50)}
    assert admitted == {SUPPORT._replace(version=str(v), tenant=str(v)) for v in range(3)} | {
        Labels("tiny", OTHER, OTHER, OTHER)
    }


def test_metrics_of_a_hundred_thousand_versions_stay_small() -> None:
    metrics = Metrics(LabelSets(most_values=5, most_sets=8))
    for number in range(100_000 // 100):
        labels = Labels("tiny", f"a{number}", f"v{number}", f"t{number}")
        metrics.began(labels, 0.1, float(number))
        metrics.ended(labels, Report(1, 2, 1, 0.1, 0.2), float(number))
    text = metrics.text({}, {})
    assert len(text.splitlines()) < 10 * 100
    assert sum(v for k, v in samples(text).items() if k[0] == "tunesmith_requests_total") == 1000, "none is lost"


def test_what_nobody_has_asked_for_in_an_hour_makes_room_for_the_newest_version() -> None:
    metrics = Metrics(LabelSets(most_values=2, idle_s=3600))
    for version, now in (("old", 0.0), ("kept", 3000.0)):
        metrics.refused(SUPPORT._replace(version=version), 503, now)
        metrics.ended(SUPPORT._replace(version=version), Report(), now)
    metrics.ended(SUPPORT._replace(version="early"), Report(), 3500.0)
    metrics.ended(SUPPORT._replace(version="new"), Report(), 3700.0)
    versions = {key[3] for key in samples(metrics.text({}, {})) if key[0].startswith("tunesmith_requests_total")}
    assert versions == {"kept", OTHER, "new"}


@pytest.fixture
def at(tmp_path: Path) -> Desk:
    made = desk(
        tmp_path / "registry",
        tiny_adapters.BASE_DIGEST,
        agents={"panel": {"layers": [[{"model": "support"}, {"model": "tiny"}]], "aggregator": {"model": "tiny"}}},
    )
    made.registry.add("support", tiny_adapters.artifact(tmp_path / "a"))
    made.look()
    return made


async def asked(backend: InProcess, *bodies: dict[str, Any]) -> dict[tuple[str, ...], float]:
    app = Gateway(backend.desk.config, backend, "gateway").app()
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test") as client:
        for body in bodies:
            path = "/v1/chat/completions" if "messages" in body else "/v1/completions"
            await client.post(path, json=body)
        await asyncio.gather(*backend.leaving)
        answer = await client.get("/metrics")
    assert answer.headers["content-type"].startswith("text/plain; version=0.0.4")
    return samples(answer.text)


def test_requests_through_the_application_are_counted_by_version_and_outcome(at: Desk) -> None:
    version = at.registry.read()[1].adapter("support").versions[0].digest
    support = ("tiny", "support", version[:12], "anyone")
    seen = asyncio.run(
        asked(
            InProcess(at, pace=0.01),
            {"model": "support", "messages": TALK, "stream": True},
            {"model": "support", "messages": TALK},
            {"model": "tiny", "prompt": ["a", "b"], "n": 2, "stream": True},
            {"model": "nobody", "messages": TALK},
        )
    )
    assert seen["tunesmith_requests_total", *support, "2xx"] == 2
    assert seen["tunesmith_requests_total", "none", "none", "none", "anyone", "4xx"] == 1
    assert (seen["tunesmith_prompt_tokens_total", *support], seen["tunesmith_completion_tokens_total", *support]) == (
        10,
        6,
    )
    assert seen["tunesmith_completion_tokens_total", "tiny", "none", "none", "anyone"] == 2 * 2 * 3
    assert seen["tunesmith_prompt_tokens_total", "tiny", "none", "none", "anyone"] == 2 * 5
    assert seen["tunesmith_time_to_first_token_seconds_count", *support] == 1, "only what streams has a first token"
    assert 0.005 < seen["tunesmith_time_per_output_token_seconds_sum", *support] < 0.1
    assert seen["tunesmith_queue_seconds_count", *support] == 2
    assert seen["tunesmith_requests_open", "tiny"] == 0


def test_what_fails_once_the_stream_has_begun_is_no_success(at: Desk) -> None:
    seen = asyncio.run(asked(InProcess(at, dies_after=1), {"model": "tiny", "messages": TALK, "stream": True}))
    outcomes = {key[-1]: value for key, value in seen.items() if key[0] == "tunesmith_requests_total"}
    assert outcomes == {"5xx": 1}


def test_a_mixture_is_counted_and_so_are_its_members(at: Desk) -> None:
    seen = asyncio.run(asked(InProcess(at), {"model": "panel", "messages": TALK, "stream": True}))
    requests = {key[1:3]: value for key, value in seen.items() if key[0] == "tunesmith_requests_total"}
    assert requests == {("mixture", "panel"): 1, ("tiny", "support"): 1, ("tiny", "none"): 2}
    assert seen["tunesmith_completion_tokens_total", "mixture", "panel", "none", "anyone"] == 9


def test_a_client_that_leaves_is_told_apart_from_one_that_was_answered(at: Desk) -> None:
    async def leave_early() -> list[Report]:
        backend = InProcess(at, words=1000, pace=0.01)
        app = Gateway(at.config, backend, "gateway").app()
        began, body = (
            asyncio.Event(),
            b'{"model": "tiny", "stream": true, "messages": [{"role": "user", "content": ""}]}',
        )
        sent = iter([{"type": "http.request", "body": body, "more_body": False}])

        async def receive() -> Any:
            if message := next(sent, None):
                return message
            await began.wait()
            return {"type": "http.disconnect"}

        async def send(message: Any) -> None:
            if message["type"] == "http.response.body":
                began.set()

        scope = {
            "type": "http", "method": "POST", "path": "/v1/chat/completions", "headers": [], "query_string": b"",
            "asgi": {"version": "3.0", "spec_version": "2.3"}, "http_version": "1.1", "scheme": "http",
        }  # fmt: skip
        await asyncio.wait_for(app(scope, receive, send), 5)
        await asyncio.gather(*backend.leaving)
        return backend.reports

    (report,) = asyncio.run(leave_early())
    assert report.status == 499
    assert 0 < report.completion_tokens < 1000


def test_a_gateway_that_is_gone_leaves_failed_requests_behind(at: Desk) -> None:
    async def lose() -> str:
        await at.enter(Entry("one", "gateway", None, "tiny"))
        at.clock = lambda: 1e9
        await at.drop_silent()
        return at.metrics(None)

    assert samples(asyncio.run(lose()))["tunesmith_requests_total", "tiny", "none", "none", "anyone", "5xx"] == 1


def test_news_of_a_replica_is_counted_and_a_shift_is_logged_with_its_numbers_and_no_text(
    at: Desk, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    digest = at.registry.read()[1].adapter("support").versions[0].digest
    usual, random = Traffic(), np.random.default_rng(0)
    trained = {digest: reference(tmp_path / "trained", usual, 500)}
    support = ("tiny", "support", digest[:12], "none")
    at.read_news("tiny", News((digest,), (digest,), {digest: usual.sketch(WINDOW, random)}), trained)
    seen = samples(at.metrics(None))
    assert seen["tunesmith_adapter_loads_total", *support] == seen["tunesmith_adapter_evictions_total", *support] == 1
    assert seen["tunesmith_drift_divergence", *support, "answer_tokens", "training"] < 0.05
    assert seen["tunesmith_drift_alarms_total", *support, "answer_tokens", "training"] == 0
    assert caplog.messages == []
    at.read_news("tiny", News(sketches={digest: usual.but(first_token=20_000).sketch(WINDOW, random)}), trained)
    seen = samples(at.metrics(None))
    for against in ("training", "window"):
        assert seen["tunesmith_drift_divergence", *support, "answer_tokens", against] > 0.3
        assert seen["tunesmith_drift_alarms_total", *support, "answer_tokens", against] == 1
    assert f"the traffic of support {digest[:12]} drifts: prompt_tokens against the training: 0." in caplog.text


def test_versions_without_a_fingerprint_are_not_watched(at: Desk) -> None:
    at.read_news("tiny", News(sketches={"f" * 64: Traffic().sketch(WINDOW, np.random.default_rng(0))}), {})
    assert not [key for key in samples(at.metrics(None)) if key[0].startswith("tunesmith_drift")]


def test_what_a_client_without_a_key_sends_is_not_read(tmp_path: Path) -> None:
    backend = InProcess(desk(tmp_path / "registry", tiny_adapters.BASE_DIGEST, http={"auth": "keys"}))
    read = []

    async def body() -> AsyncIterator[bytes]:
        read.append(1)
        yield b"{"

    async def main() -> None:
        app = Gateway(backend.desk.config, backend, "gateway").app()
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://here") as client:
            for method, path in (
                ("POST", "/v1/chat/completions"),
                ("POST", "/tokenize"),
                ("PUT", "/admin/adapters/a/aliases/b"),
            ):
                answer = await client.request(method, path, content=body())
                assert (answer.status_code, answer.json()["error"]["code"]) == (401, "invalid_api_key")

    asyncio.run(main())
    assert not read
