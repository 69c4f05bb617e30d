"""The shape of a recipe's base: from a folder's config.json, or from the table of well-known models. No weights."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tunesmith.cluster.errors import ModelError
from tunesmith.trainers.memory import catalog


@dataclass(frozen=True)
class Geometry:
    """What is needed to build a model without its weights."""

    name: str
    """The folder, or the entry of the table."""
    config: Mapping[str, Any]
    """Its config.json, of its text model when it has several."""


def geometry(reference: str, output_dir: str | Path) -> Geometry:
    """The shape of the model that `model.base` names.

    Args:
        reference: a folder, `run:NAME`, `builtin:NAME`, or the name of a well-known model.
        output_dir: `output.dir` of the recipe, where `run:` looks.

    Raises:
        ModelError: nothing is there, or no model of that name is known; the message has the nearest names.
    """
    if reference.startswith(("run:", "builtin:")):
        from tunesmith.trainers.base import resolve_base

        return of_folder(Path(resolve_base(reference, None, output_dir).path), reference)
    folder = Path(reference).expanduser()
    if folder.is_dir():
        return of_folder(folder, reference)
    entry = catalog.find(reference)
    if entry is None:
        near = " or ".join(catalog.nearest(reference))
        raise ModelError(
            f"model.base: {reference!r} is no folder here and not in the table of {len(catalog.entries())} known models",
            f"{f'Did you mean {near}? ' if near else ''}Any other model can be planned from a folder with "
            "its config.json.",
        )
    return Geometry(entry.name, entry.config)


def of_folder(folder: Path, reference: str) -> Geometry:
    """The shape of the model in a folder, of which only config.json is read.

    Raises:
        ModelError: there is none, or it cannot be read.
    """
    path = folder / "config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ModelError(
            f"model.base: {reference} has no config.json", "Is this a Hugging Face model folder?"
        ) from None
    except (OSError, ValueError) as error:
        raise ModelError(f"model.base: {path} cannot be read: {error}") from error
    if not isinstance(config, dict) or "model_type" not in config:
        raise ModelError(f"model.base: {path} names no model_type, so no architecture can be chosen")
    return Geometry(reference, config.get("text_config") or config)
