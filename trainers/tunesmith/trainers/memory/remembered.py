"""Simulations that were made before: a plan of the same model on another fleet needs only arithmetic.

They lie in the user's cache folder by a hash of all they depend on: the settings, the model's config, the versions of the libraries
that were simulated, and our own code.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.metadata
import json
import os
from collections import Counter
from functools import cache
from pathlib import Path
from typing import Any

from tunesmith.cluster.storage import write_atomic
from tunesmith.trainers.memory.simulate import ParameterKind, Simulation

LIBRARIES = ("torch", "transformers", "peft", "bitsandbytes")


def recall(settings: Any) -> Simulation | None:
    """The simulation of these settings, or None."""
    try:
        saved = json.loads(_path(settings).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return Simulation(
        {name: Counter(parts) for name, parts in saved["windows"].items()},
        {ParameterKind(*kind): count for *kind, count in saved["parameters"]},
        saved["fixed_bytes"],
        saved["largest"],
    )


def remember(settings: Any, simulation: Simulation) -> None:
    """Keeps a simulation. A home that cannot be written to costs seconds, not the plan."""
    saved = {
        "windows": simulation.windows,
        "parameters": [[*kind, count] for kind, count in simulation.parameters.items()],
        "fixed_bytes": simulation.fixed_bytes,
        "largest": simulation.largest,
    }
    path = _path(settings)
    with contextlib.suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(path, json.dumps(saved))


def _path(settings: Any) -> Path:
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    key = hashlib.sha256(json.dumps([settings, _code()], sort_keys=True, default=str).encode()).hexdigest()
    return Path(home) / "tunesmith" / "simulations" / f"{key[:40]}.json"


@cache
def _code() -> list[str]:
    """Versions of the libraries, and a hash of this package's own sources."""
    sources = hashlib.sha256()
    for path in sorted(Path(__file__).parents[1].rglob("*.py")):
        sources.update(path.read_bytes())
    return [*(f"{name} {importlib.metadata.version(name)}" for name in LIBRARIES), sources.hexdigest()]
