"""What is known of a base without downloading anything: its weights, its config, or its shape by name."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tunesmith.cluster.base import TOKENIZER, BaseRef, context_length, weight_files
from tunesmith.cluster.errors import ModelError
from tunesmith.cluster.recipe.schema import Model
from tunesmith.trainers.advise.rules import Size
from tunesmith.trainers.base import resolve_base
from tunesmith.trainers.memory import catalog
from tunesmith.trainers.memory.geometry import Geometry, of_folder


@dataclass(frozen=True)
class Base:
    """A base model as far as it is at hand."""

    reference: str
    """As the recipe names it; the hub's name when the recipe has that without its owner."""
    shape: Geometry
    """From its config.json, or the catalog."""
    known_from: str
    """For people: what that was read from."""
    weights: BaseRef | None
    """Set when the weights are on this machine."""
    tokenizer: BaseRef | None
    """Set when a tokenizer is; its digest is empty when the weights are not."""


def find_base(model: Model, output_dir: str | Path) -> Base:
    """Looks for the base on this machine, then for its shape in the catalog.

    Raises:
        ModelError: it is neither here nor a known name; the message has the nearest names.
    """
    reference = model.base
    if reference.startswith(("run:", "builtin:")):
        return _with_weights(resolve_base(reference, model.revision, output_dir))
    folder = Path(reference).expanduser()
    folder = folder if folder.is_dir() else _in_hub_cache(reference, model.revision)
    if folder is not None and weight_files(folder):
        return _with_weights(resolve_base(reference, model.revision, output_dir))
    if folder is not None:
        return _without_weights(reference, folder)
    entry = catalog.find(reference)
    if entry is not None:
        is_it = entry.name.rpartition("/")[2].lower() == reference.lower()
        name = entry.name if is_it else reference
        return Base(
            name, Geometry(entry.name, entry.config), f"the shape of {entry.name}; its weights are not here", None, None
        )
    near = " or ".join(catalog.nearest(reference))
    raise ModelError(
        f"model.base: {reference!r} is no folder, not in this machine's cache of the hub, and no name in the catalog",
        f"{'Did you mean ' + near + '? ' if near else ''}Else download it first (hf download {reference}), or name a folder, "
        "run:NAME or builtin:NAME.",
    )


def size_of(base: Base) -> Size:
    """Counts the base's parameters on a model without weights.

    Raises:
        ModelError: Transformers does not know the architecture.
    """
    import torch
    from torch import nn
    from transformers import AutoConfig, AutoModelForCausalLM

    try:
        with torch.device("meta"):
            model: Any = AutoModelForCausalLM.from_config(AutoConfig.for_model(**base.shape.config))
    except (ValueError, KeyError, TypeError) as error:
        reason = " ".join(str(error).split())[:300]
        raise ModelError(f"model.base: no model can be built from the config of {base.reference}: {reason}") from error
    head = model.get_output_embeddings()
    linear = [layer for layer in model.modules() if isinstance(layer, nn.Linear) and layer is not head]
    return Size(
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        lora_per_rank=sum(layer.in_features + layer.out_features for layer in linear),
    )


def _with_weights(ref: BaseRef) -> Base:
    return Base(ref.reference, of_folder(Path(ref.path), ref.reference), "its weights are here", ref, ref)


def _without_weights(reference: str, folder: Path) -> Base:
    shape = of_folder(folder, reference)
    has_tokenizer = any((folder / name).is_file() for name in TOKENIZER)
    context = context_length(dict(shape.config))
    tokenizer = BaseRef(reference, str(folder.absolute()), "", context) if has_tokenizer else None
    return Base(reference, shape, "its config.json; its weights are not here", None, tokenizer)


def _in_hub_cache(reference: str, revision: str | None) -> Path | None:
    """The folder of a hub id in the local cache, whole or not; nothing is downloaded."""
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        found = try_to_load_from_cache(reference, "config.json", revision=revision)
    except HFValidationError:
        return None
    return Path(found).parent if isinstance(found, str) else None
