"""A tiny model that all injected faults befall."""

from __future__ import annotations

from pathlib import Path

import pytest
import tiny_models


@pytest.fixture(scope="session")
def tiny_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama with a byte tokenizer."""
    return tiny_models.make("llama", tmp_path_factory.mktemp("base"))
