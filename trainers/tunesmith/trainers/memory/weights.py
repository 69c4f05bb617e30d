"""How large a base's weights are, from its files or the table of well-known models. Loads no torch."""

from __future__ import annotations

from pathlib import Path

from tunesmith.cluster.base import WEIGHTS
from tunesmith.cluster.errors import ModelError
from tunesmith.cluster.fleet import GIB
from tunesmith.trainers.memory import catalog


def weights_gib(key: str, reference: str) -> float:
    """GiB of a base in 16 bits: what its table entry's parameters take, or its files.

    Args:
        key: as the base is called where it was written.
        reference: a folder, `run:NAME` below `runs`, or the name of a well-known model.

    Raises:
        ModelError: neither is here.
    """
    folder = (
        Path("runs", reference.removeprefix("run:"), "artifact") if reference.startswith("run:") else Path(reference)
    )
    size = sum(file.stat().st_size for pattern in WEIGHTS for file in folder.expanduser().glob(pattern))
    if size:
        return size / GIB
    entry = catalog.find(reference)
    if entry is None:
        raise ModelError(
            f"{key}: {reference} is neither a folder here nor one of {len(catalog.entries())} known models, so nobody "
            "knows how much memory its replicas need",
            "Say it: --weights NAME=GIB, with the size of its weight files.",
        )
    return entry.parameters * 2 / GIB
