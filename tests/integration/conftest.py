"""A service for the tests of each module that asks one: two cannot run in one Ray."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import tiny_models
from serving_service import Service, serving

from tunesmith.cluster.session import RaySession

PANEL = {
    "layers": [[{"model": "small", "role": "one"}, {"model": "medium", "role": "two"}]],
    "aggregator": {"model": "tiny"},
    "deadline_s": 30,
}


@pytest.fixture(scope="module")
def service(ray_session: RaySession, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    folder = tmp_path_factory.mktemp("service")
    vectors = {"path": str(tiny_models.make_encoder(folder / "vectors"))}
    settings = {"bases": {"tiny": {"engine": "transformers"}, "vectors": vectors}, "agents": {"panel": PANEL}}
    with serving(ray_session, folder, settings) as running:
        yield running
