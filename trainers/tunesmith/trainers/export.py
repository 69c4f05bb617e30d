"""The artifact: a plain PEFT or Hugging Face folder that any tool loads, with its receipts, card and signature."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from pydantic import BaseModel
from torch import Tensor, nn

from tunesmith.cluster.artifacts import ParityReceipt
from tunesmith.cluster.base import BaseRef
from tunesmith.cluster.errors import ReceiptError
from tunesmith.cluster.metrics import read_metrics
from tunesmith.cluster.recipe.load import recipe_hash
from tunesmith.cluster.recipe.schema import Adapter, Recipe
from tunesmith.cluster.runs import RunFolder
from tunesmith.cluster.storage import commit_folder
from tunesmith.trainers import card
from tunesmith.trainers.checkpoint_files import tensor_bytes
from tunesmith.trainers.data.prepare import Prepared
from tunesmith.trainers.figures import workers_by_step
from tunesmith.trainers.models import load_tokenizer
from tunesmith.trainers.ranks import on_first
from tunesmith.trainers.receipts import parity
from tunesmith.trainers.receipts.fingerprint import fingerprint

ADAPTER_WEIGHTS = "adapter_model.safetensors"


def write_artifact(
    engine: Any, recipe: Recipe, base: BaseRef, run: RunFolder, data: Prepared, device: torch.device
) -> ParityReceipt:
    """Writes `run.artifact` from the weights that the engine holds now. Collective.

    The parity receipt is made from the folder before it is signed and lies in it either way.

    Args:
        engine: the DeepSpeed engine around a `Policy`.
        run: its metrics, and the mask receipt in its `receipts/`, go into the artifact.
        data: held-out rows for the parity receipt; its template goes into the artifact's tokenizer.
        device: where the artifact is reloaded for comparison.

    Raises:
        ReceiptError: on every worker, once the artifact is written, when it is not the model that was trained.
        DiskFullError, StorageError: on every worker; an earlier artifact is untouched.
    """
    split, store, rows = parity.choose_rows(data, recipe.eval.parity_rows)
    trained = parity.training_logps(engine, store, rows, data.report.max_length, device)
    model = engine.module.model
    is_adapter = isinstance(recipe.adaptation, Adapter)
    weights = whole_weights(model, _is_adapter if is_adapter else _is_any, every_name=is_adapter)
    dtype = next(parameter.dtype for parameter in model.parameters() if parameter.requires_grad)

    def write() -> ParityReceipt:
        about: dict[str, Any] = {"kind": "artifact"}
        needed = tensor_bytes(weights)
        with commit_folder(run.artifact, about, needed) as folder:
            save_weights(model, weights, folder, data.report.end_of_turn)
            save_tokenizer(base, data.report.chat_template, folder)
            weights.clear()
            receipt = parity.compare(
                trained, folder, base, store, rows, quantization=recipe.model.quantization, dtype=dtype, device=device
            )
            scored = parity.scored_rows(trained, store, rows, recipe.model.quantization, dtype)
            sketch = fingerprint(data.train, load_tokenizer(base))
            _save_receipts(run, {"parity": receipt, "parity_rows": scored, "fingerprint": sketch}, folder)
            about |= _about(recipe, base, data, receipt)
            about["workers"] = workers_by_step(read_metrics(run.metrics))
            (folder / "README.md").write_text(
                card.card(recipe, base, run, data, receipt, split, sketch), encoding="utf-8"
            )
        return receipt

    receipt = on_first(write)
    if not receipt.passed:
        raise ReceiptError(
            f"the parity receipt failed: {'; '.join(receipt.problems)}",
            f"The artifact is in {run.artifact}, with the receipt; do not serve it before this is explained.",
        )
    return receipt


def whole_weights(
    model: nn.Module, wanted: Callable[[str, nn.Parameter], bool], every_name: bool = False
) -> dict[str, Tensor]:
    """Copies of the wanted parameters, and of saved buffers, on rank 0's CPU; empty elsewhere. Collective.

    ZeRO-3 shards are gathered one parameter at a time.

    Args:
        wanted: by name and parameter.
        every_name: whether a tensor that goes by several names appears under each of them, as the tensors that an
            adapter's layers share do; else tied parameters appear once.
    """
    is_first = _rank() == 0
    weights: dict[str, Tensor] = {}
    copies: dict[int, Tensor] = {}
    for name, parameter in model.named_parameters(remove_duplicate=not every_name):
        if not wanted(name, parameter):
            continue
        if id(parameter) not in copies:
            with _whole(parameter):
                copies[id(parameter)] = parameter.detach().to("cpu", copy=True) if is_first else torch.empty(0)
        if is_first:
            weights[name] = copies[id(parameter)]
    if is_first:
        kept = model.state_dict().keys()
        copies = {id(buffer): buffer.detach().cpu().clone() for buffer in model.buffers()}
        named = model.named_buffers(remove_duplicate=not every_name)
        weights |= {name: copies[id(buffer)] for name, buffer in named if name in kept}
    return weights


def save_weights(model: Any, weights: dict[str, Tensor], folder: Path, end_of_turn: int | None) -> None:
    """Saves an adapter as PEFT does, a whole model as Transformers does (sharded, in the layout of its architecture).

    Args:
        model: the model that was trained, for its configs; its own weights are not read.
        end_of_turn: token at which generation shall stop, besides the model's own.
    """
    _stop_at(model, end_of_turn)
    if not hasattr(model, "peft_config"):
        model.save_pretrained(folder, state_dict=weights)
        return
    if getattr(model, "generation_config", None) is not None:
        model.generation_config.save_pretrained(folder)
    from peft import get_peft_model_state_dict
    from safetensors.torch import save_file

    adapter = get_peft_model_state_dict(model, state_dict=weights, save_embedding_layers=False)
    apart = {name: tensor.clone(memory_format=torch.contiguous_format) for name, tensor in adapter.items()}
    save_file(apart, folder / ADAPTER_WEIGHTS, {"format": "pt"})
    settings = model.peft_config["default"].to_dict() | {"inference_mode": True}
    text = json.dumps({key: _plain(value) for key, value in settings.items()}, indent=2, sort_keys=True)
    (folder / "adapter_config.json").write_text(text + "\n", encoding="utf-8")


def save_tokenizer(base: BaseRef, chat_template: str | None, folder: Path) -> None:
    """Saves the base's tokenizer with the very template that trained, if there was one."""
    tokenizer = load_tokenizer(base)
    if chat_template:
        tokenizer.chat_template = chat_template
    tokenizer.save_pretrained(folder)


def _stop_at(model: Any, end_of_turn: int | None) -> None:
    settings = getattr(model, "generation_config", None)
    if settings is None or end_of_turn is None:
        return
    own = settings.eos_token_id
    tokens = {end_of_turn, *([own] if isinstance(own, int) else own or [])}
    settings.eos_token_id = sorted(tokens) if len(tokens) > 1 else end_of_turn


def _is_adapter(_name: str, parameter: nn.Parameter) -> bool:
    return parameter.requires_grad


def _is_any(_name: str, _parameter: nn.Parameter) -> bool:
    return True


def _whole(parameter: nn.Parameter) -> Any:
    """Within it a parameter that ZeRO-3 has sharded is whole on every worker."""
    if not hasattr(parameter, "ds_id"):
        return nullcontext()
    from deepspeed import zero

    return zero.GatheredParameters([parameter])


def _rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def _save_receipts(run: RunFolder, made: Mapping[str, BaseModel], folder: Path) -> None:
    receipts = folder / "receipts"
    if run.receipts.is_dir():
        shutil.copytree(run.receipts, receipts)
    receipts.mkdir(exist_ok=True)
    for name, receipt in made.items():
        indent = 1 if name == "parity" else None  # people read that one
        (receipts / f"{name}.json").write_text(receipt.model_dump_json(indent=indent) + "\n", encoding="utf-8")


def _about(recipe: Recipe, base: BaseRef, data: Prepared, receipt: ParityReceipt) -> dict[str, Any]:
    """What the manifest says besides its files."""
    return {
        "run": recipe.name,
        "objective": recipe.objective.kind,
        "adaptation": recipe.adaptation.kind,
        "base": {"reference": base.reference, "revision": base.revision, "digest": base.digest},
        "recipe_sha256": recipe_hash(recipe),
        "data_sha256": data.fingerprint,
        "parity_passed": receipt.passed,
        "elastic": recipe.cluster.is_elastic,
        "versions": card.versions(),
    }


def _plain(value: Any) -> Any:
    """Sets in sorted order and enumerations by value: the same adapter is the same file."""
    if isinstance(value, set | frozenset):
        return sorted(value)
    return getattr(value, "value", value)
