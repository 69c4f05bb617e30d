"""A running service over tiny models, as tests of it share one: its bases, adapters, keys, clients and processes."""

from __future__ import annotations

import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import psutil
import tiny_models
from adapters import make_adapter
from openai import OpenAI

from tunesmith.cluster.base import find_base
from tunesmith.cluster.session import RaySession
from tunesmith.cluster.storage import commit_folder
from tunesmith.serving.config import Limits, Serve
from tunesmith.serving.registry import Registry
from tunesmith.serving.serve_command import started
from tunesmith.serving.statelog import StateLog
from tunesmith.serving.tenants import Keys, Scope

RANKS = {"small": 4, "medium": 8, "large": 16}
"""Adapters over `tiny`, and their ranks."""
QUESTION: list[Any] = [{"role": "user", "content": "What is it?"}]
SIZES = {"hidden_size": 64, "head_dim": 32, "num_attention_heads": 2, "num_key_value_heads": 2}
"""Attention heads that vLLM takes."""
CONTEXT = 2048


@dataclass
class Service:
    """One that runs.

    Attributes:
        url: up to and with /v1.
        bases: their folders by name.
        folders: adapters' folders by name.
        digests: versions of `support`, and of every adapter's only version, by name.
    """

    url: str
    registry: Registry
    bases: dict[str, Path]
    folders: dict[str, Path]
    digests: dict[str, str]
    key: str = ""

    @property
    def root(self) -> str:
        return self.url.removesuffix("/v1")

    def new_key(
        self, tenant: str = "acme", limits: Limits | None = None, scopes: tuple[Scope, ...] = ("infer",)
    ) -> str:
        """A key, known to the service once this returns."""
        keys = Keys(StateLog(self.registry.root, "keys"))
        made = keys.create(tenant, time.time(), scopes=scopes, limits=limits or Limits(concurrency=None))
        deadline = time.monotonic() + 10
        while self.get("/v1/models", made).status_code != 200:
            assert time.monotonic() < deadline, "the service does not learn of a new key"
            time.sleep(0.1)
        return made

    def client(self, key: str | None = None, **settings: Any) -> OpenAI:
        """The official client, as strict as it can be."""
        given = {"_strict_response_validation": True, "max_retries": 0, "timeout": 60, **settings}
        return OpenAI(base_url=self.url, api_key=key or self.key, **given)

    def get(self, path: str, key: str | None = None) -> httpx.Response:
        return httpx.get(self.root + path, headers=self.headers(key), timeout=30)

    def post(self, path: str, body: Any, key: str | None = None) -> httpx.Response:
        """`body` as it stands when it is bytes, else as JSON."""
        sent: Any = {"content": body} if isinstance(body, bytes) else {"json": body}
        return httpx.post(self.root + path, headers=self.headers(key), timeout=60, **sent)

    def headers(self, key: str | None = None) -> dict[str, str]:
        return {"Authorization": f"Bearer {key or self.key}"}

    def is_ready(self) -> bool:
        try:
            return self.get("/readyz").status_code == 200
        except httpx.TransportError:
            return False


@contextmanager
def serving(session: RaySession, folder: Path, settings: dict[str, Any]) -> Iterator[Service]:
    """A service with API keys within the block.

    Args:
        settings: of the configuration; a base without a `path` is made here, under its own seed.
    """
    bases = {
        name: Path(own["path"])
        if "path" in own
        else tiny_models.make("llama", folder / "bases" / name, seed, max_position_embeddings=CONTEXT, **SIZES)
        for seed, (name, own) in enumerate(settings["bases"].items())
    }
    registry = Registry(str(folder / "registry"))
    first = next(iter(bases))
    folders, digests = add_adapters(registry, bases[first], folder)
    given = {name: {"cpus": 0.1, "path": str(bases[name]), **own} for name, own in settings["bases"].items()}
    http = {"auth": "keys", "port": free_port(), **settings.get("http", {})}
    config = Serve.model_validate({**settings, "bases": given, "http": http, "registry": registry.root})
    with started(config, session) as url:
        service = Service(url, registry, bases, folders, digests)
        service.key = service.new_key(scopes=("infer", "admin"))
        yield service


def add_adapters(registry: Registry, base: Path, folder: Path) -> tuple[dict[str, Path], dict[str, str]]:
    """Adds an adapter of each rank, `secret` of another tenant, and `support` with two versions; `prod` is the first."""
    from peft import LoraConfig, TaskType

    ref = find_base(str(base), None, folder)
    folders: dict[str, Path] = {}
    digests: dict[str, str] = {}
    for seed, (name, rank) in enumerate({**RANKS, "secret": 4, "support-1": 4, "support-2": 8}.items()):
        config = LoraConfig(r=rank, target_modules="all-linear", task_type=TaskType.CAUSAL_LM)
        folders[name] = Path(make_adapter(base, folder / "peft" / name, config, seed).folder)
        about = {"kind": "artifact", "run": name, "base": {"reference": "tiny", "revision": None, "digest": ref.digest}}
        with commit_folder(folder / "artifacts" / name, {**about, "parity_passed": True}) as temporary:
            for file in ("adapter_config.json", "adapter_model.safetensors"):
                (temporary / file).write_bytes((folders[name] / file).read_bytes())
        owner = "rival" if name == "secret" else None
        digests[name] = registry.add(name.partition("-")[0], folder / "artifacts" / name, owner).digest
    return folders, digests


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def processes(title: str) -> list[psutil.Process]:
    """Processes of the Ray that this process started, by the beginning of the title that Ray gives them."""
    found = []
    for process in psutil.Process().children(recursive=True):
        try:
            if " ".join(process.cmdline()).startswith(title):
                found.append(process)
        except (psutil.NoSuchProcess, psutil.ZombieProcess):
            continue
    return found


def oracle(base: Path, adapter: Path | None, prompt: list[int], count: int) -> list[int]:
    """The greedy continuation by plain PEFT, in fp32."""
    from adapters import greedy, plain_peft

    return greedy(plain_peft(base, adapter), prompt, count)
