"""Which checkpoints lie in a folder, which of them are kept, and how a damaged one is set aside."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from tunesmith.cluster.artifacts import read_manifest
from tunesmith.cluster.errors import CheckpointError, StorageError

_NAME = re.compile(r"step-(\d{8,})")


def to_remove(steps: Sequence[int], measured: Sequence[tuple[float, int]], keep: int) -> list[int]:
    """Which checkpoints are no longer kept: all but the newest `keep` and the best, by `(metric, step)`."""
    best = {min(measured)[1]} if measured else set()
    return sorted(set(steps) - set(sorted(steps)[-keep:]) - best)


def committed(folder: Path) -> list[tuple[int, Path]]:
    """`(step, path)` of every committed checkpoint, oldest first; whole or not."""
    found = [(match, path) for path in folder.glob("step-*") if (match := _NAME.fullmatch(path.name))]
    return sorted((int(match[1]), path) for match, path in found)


def measured(folder: Path) -> list[tuple[float, int, Path]]:
    """`(metric, step, path)` of every checkpoint whose manifest can be read and names a metric."""
    found = []
    for step, path in committed(folder):
        try:
            metric = read_manifest(path).about.get("metric")
        except CheckpointError:
            continue  # whoever comes to use it sets it aside
        if metric is not None and metric == metric:
            found.append((metric, step, path))
    return found


def set_aside(path: Path) -> Path:
    """Renames a damaged checkpoint so that nothing takes it for one."""
    aside = path.with_name(f"quarantined-{path.name}")
    count = 1
    while aside.exists():
        count += 1
        aside = path.with_name(f"quarantined-{path.name}-{count}")
    try:
        path.rename(aside)
    except OSError as error:
        raise StorageError(f"{path}: damaged, and cannot be set aside: {error.strerror or error}") from error
    return aside
