"""Finds the base model of a recipe: what `tunesmith.cluster.base` knows, and the builtin models."""

from __future__ import annotations

from pathlib import Path

from tunesmith.cluster.base import BaseRef, base_in, find_base, no_revision


def resolve_base(reference: str, revision: str | None, output_dir: str | Path) -> BaseRef:
    """As `find_base`, and `builtin:NAME`, which is made in `output_dir` when it is not there yet.

    Raises:
        ModelError: nothing is there, or it lacks a config, a tokenizer or whole weights.
    """
    if not reference.startswith("builtin:"):
        return find_base(reference, revision, output_dir)
    from tunesmith.trainers.builtin import builtin_folder

    if revision is not None:
        raise no_revision(reference, revision)
    output = Path(output_dir).expanduser().absolute()
    return base_in(builtin_folder(reference.removeprefix("builtin:"), output), reference, output)
