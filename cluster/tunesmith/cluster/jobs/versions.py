"""Whether two machines run the same program: Tunesmith's own code, and the libraries that decide what a step computes."""

from __future__ import annotations

import hashlib
import importlib.util
import sys
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

LIBRARIES = ("ray", "torch", "deepspeed", "transformers", "peft", "bitsandbytes", "datasets")
PORTIONS = ("cluster", "serving", "trainers", "tuning")
CODE = "tunesmith's code"


def here() -> dict[str, str]:
    """Version of Python, of Tunesmith and of each library, and a digest of Tunesmith's code."""
    found = {
        "python": ".".join(map(str, sys.version_info[:2])),
        "tunesmith": _version("tunesmith"),
        CODE: code_digest(),
    }
    return found | {name: _version(name).partition("+")[0] for name in LIBRARIES}  # 2.13.0+cpu is 2.13.0


def code_digest() -> str:
    """The first digits of a sha256 over the names and contents of all Tunesmith's modules."""
    digest = hashlib.sha256()
    for portion in PORTIONS:
        spec = importlib.util.find_spec(f"tunesmith.{portion}")
        assert spec is not None, f"there is no tunesmith.{portion}"
        folder = Path((spec.submodule_search_locations or [])[0])
        for path in sorted(folder.rglob("*.py")):
            digest.update(f"{portion}/{path.relative_to(folder)}\0".encode() + path.read_bytes() + b"\0")
    return digest.hexdigest()[:12]


def differences(theirs: Mapping[str, str], ours: Mapping[str, str]) -> list[str]:
    """What differs, in words; `theirs` is the submitter's, `ours` the cluster's."""
    return [
        f"{name}: {theirs.get(name, 'not there')} where it was submitted, {ours.get(name, 'not there')} on the cluster"
        for name in dict.fromkeys([*theirs, *ours])
        if theirs.get(name) != ours.get(name)
    ]


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "not there"
