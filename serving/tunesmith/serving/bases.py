"""What a base model's folder says about itself, as far as an adapter must fit it. Reads headers, never weights."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from tunesmith.cluster.artifacts import read_manifest
from tunesmith.cluster.errors import AdapterError, CheckpointError, ModelError
from tunesmith.cluster.storage import sha256_file
from tunesmith.serving.documents import parse_json
from tunesmith.serving.lora import Shape
from tunesmith.serving.weights import read_header


@dataclass(frozen=True)
class BaseFacts:
    """A base that adapters are compared with.

    Attributes:
        digest: hex sha256 over its weights, as artifacts name their base; None compares no digest.
        shapes: of every weight by its name; None compares no shape.
    """

    digest: str | None = None
    shapes: Mapping[str, Shape] | None = None


def read_base(folder: Path) -> BaseFacts:
    """The facts of a model folder. Its weight files are hashed, unless its manifest has signed them.

    The digest is the sha256 over the sorted sha256 of the weight files: what training writes into an artifact. The
    shapes of a checkpoint that is quantised on disk are those of packed numbers, and left out.

    Raises:
        ModelError: it is no model folder, or a weight file is damaged.
    """
    try:
        config = parse_json((folder / "config.json").read_bytes(), f"{folder}/config.json")
        files = sorted(folder.glob("*.safetensors")) or sorted(folder.glob("pytorch_model*.bin"))
        if not files:
            raise ModelError(f"{folder}: no *.safetensors and no pytorch_model*.bin")
        signed = _signed(folder)
        hashes = sorted(signed.get(file.name) or sha256_file(file) for file in files)
        shapes: dict[str, Shape] | None = None
        if isinstance(config, dict) and not config.get("quantization_config") and files[0].suffix == ".safetensors":
            shapes = {name: tensor.shape for file in files for name, tensor in read_header(file, str(file)).items()}
    except OSError as error:
        raise ModelError(
            f"{error.filename}: {error.strerror}", "Give a folder with config.json and weights."
        ) from error
    except AdapterError as error:
        raise ModelError(error.what, error.fix) from error
    return BaseFacts(hashlib.sha256("\n".join(hashes).encode()).hexdigest(), shapes)


def _signed(folder: Path) -> dict[str, str]:
    try:
        return {name: record.sha256 for name, record in read_manifest(folder).files.items()}
    except CheckpointError:  # none, or not one of ours: the files themselves are hashed
        return {}
