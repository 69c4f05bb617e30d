"""What vLLM by itself lets go and loads again is in the metrics."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families
from serving_service import Service, serving

from tunesmith.cluster.session import RaySession

pytest.importorskip("vllm")


def moves(service: Service, name: str) -> tuple[float, float]:
    """How often an adapter was loaded, and let go."""
    counted = {
        one.name: one.value
        for family in text_string_to_metric_families(service.get("/metrics").text)
        for one in family.samples
        if one.labels.get("adapter") == name
    }
    return counted.get("tunesmith_adapter_loads_total", 0), counted.get("tunesmith_adapter_evictions_total", 0)


@pytest.mark.matrix
def test_what_vllm_lets_go_and_loads_again_is_counted(ray_session: RaySession, tmp_path: Path) -> None:
    base = {"engine": "vllm", "max_adapters": 2, "max_cached_adapters": 2, "max_rank": 16}
    with serving(ray_session, tmp_path, {"bases": {"tiny": base}}) as service:
        for name in ("small", "medium", "large", "small"):  # one more than it holds, and the first again
            before, _ = moves(service, name)
            answer = service.post("/v1/completions", {"model": name, "prompt": "a", "max_tokens": 2})
            assert answer.status_code == 200, answer.text
            deadline = time.monotonic() + 30
            while moves(service, name)[0] == before:
                assert time.monotonic() < deadline, f"loading {name} is not in the metrics"
                time.sleep(0.5)
        assert moves(service, "small") == (2, 1)
        assert moves(service, "medium") == (1, 1)
