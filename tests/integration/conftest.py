"""One service for all tests of this folder that ask one."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from serving_service import Service, serving

from tunesmith.cluster.session import RaySession

PANEL = {
    "layers": [[{"model": "small", "role": "one"}, {"model": "medium", "role": "two"}]],
    "aggregator": {"model": "tiny"},
    "deadline_s": 30,
}


@pytest.fixture(scope="package")
def service(ray_session: RaySession, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    settings = {"bases": {"tiny": {"engine": "transformers"}}, "agents": {"panel": PANEL}}
    with serving(ray_session, tmp_path_factory.mktemp("service"), settings) as running:
        yield running
