"""One Ray for all tests of a session that need one."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tunesmith.cluster.session import RaySession


@pytest.fixture(scope="session")
def ray_session() -> Iterator[RaySession]:
    """A local Ray, as a run starts one; runs in this process then use it and leave it running."""
    with RaySession() as session:
        session.nodes()
        yield session
