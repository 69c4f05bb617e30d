from __future__ import annotations

from collections.abc import Iterator

import pytest
from dashboard import answering_dashboard


@pytest.fixture
def answering() -> Iterator[str]:
    """A cluster's dashboard, HOST:PORT; `dashboard.Answers` says what it answers."""
    with answering_dashboard() as address:
        yield address
