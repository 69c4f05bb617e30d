"""What a base model says about itself, as far as an adapter must fit it. Reads headers, never weights."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from tunesmith.cluster.base import BaseRef, check_folder, find_base, tensor_shapes
from tunesmith.cluster.errors import ModelError
from tunesmith.serving.lora import Shape

TEXT = ("ForCausalLM", "LMHeadModel", "ForConditionalGeneration")
"""Architectures that continue a text."""

RUNS = "runs"
"""Where `run:NAME` looks, unless a recipe says otherwise."""


def base_of(key: str, reference: str, output: str | Path) -> BaseRef:
    """The base that a key or an option names.

    Args:
        key: as it is called where it was written.
        output: where `run:` looks, and where hashes are kept.

    Raises:
        ModelError: naming the key; nothing is there, or it is no whole model.
    """
    if reference.startswith("builtin:"):
        raise ModelError(f"{key}: {reference} is for training alone", "Give the artifact that was trained: run:NAME.")
    try:
        return find_base(reference, None, output)
    except ModelError as error:  # a recipe calls it model.base
        what, fix = (text.replace("model.base: ", f"{key}: ", 1) for text in (error.what, error.fix))
        raise ModelError(what, fix.replace(", run:NAME or builtin:NAME", " or run:NAME")) from error


@dataclass(frozen=True)
class BaseFacts:
    """A base that adapters are compared with.

    Attributes:
        digest: hex sha256 over its weights, as artifacts name their base; None compares no digest.
        shapes: of every weight by its name; None compares no shape.
    """

    digest: str | None = None
    shapes: Mapping[str, Shape] | None = None


def facts_of(base: BaseRef) -> BaseFacts:
    """The facts of a base that was found. Shapes are None when its files hold packed or pickled numbers.

    Raises:
        ModelError: a weight file is damaged.
    """
    folder = Path(base.path)
    shapes = {name: tuple(shape) for name, shape in tensor_shapes(folder).items()}
    packed = bool(check_folder(folder, base.reference).get("quantization_config"))
    return BaseFacts(base.digest, None if packed or not shapes else shapes)


def writes_text(folder: Path) -> bool:
    """Whether a model's files say that it continues texts, rather than encode or classify them."""
    if (folder / "modules.json").is_file():
        return False
    named = json.loads((folder / "config.json").read_text(encoding="utf-8")).get("architectures") or [TEXT[0]]
    return any(name.endswith(TEXT) for name in named)
