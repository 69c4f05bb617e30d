"""What every test shares: a tiny model, and quiet, offline libraries."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tunesmith.cluster.session import RaySession

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("DS_ACCELERATOR", "cpu")
# As a session does before it imports Ray, which some tests import first: every port on the loopback interface, and no Ray
# that starts unasked.
os.environ.setdefault("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")
os.environ.setdefault("RAY_ENABLE_AUTO_CONNECT", "0")


@pytest.fixture(scope="session", autouse=True)
def no_earlier_simulations(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """What the planner keeps for the next command lies in a folder of these tests; compiled operators stay where they are."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    with pytest.MonkeyPatch.context() as patch:
        if "TORCH_EXTENSIONS_DIR" not in os.environ:
            patch.setenv("TORCH_EXTENSIONS_DIR", str(cache / "torch_extensions"))
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="session")
def tiny_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama with a byte tokenizer."""
    import tiny_models  # not before it is needed: it loads torch

    return tiny_models.make("llama", tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="session")
def ray_session() -> Iterator[RaySession]:
    """A local Ray, as a run starts one; runs in this process then use it and leave it running."""
    with RaySession() as session:
        session.nodes()
        yield session
