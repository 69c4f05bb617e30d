"""The parity receipt: the artifact is the model that was trained, and not the one it was trained from.

The same held-out rows are scored four ways: by the training forward (packed, label-only, sharded), by the artifact as
plain Transformers and PEFT load it (one row at a time, no packing), by the adapter merged into its base, and by the base.
Shape suffix: L labelled tokens of one example.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tunesmith.cluster.artifacts import ParityReceipt, ParityRows, ScoredRow
from tunesmith.cluster.base import BaseRef
from tunesmith.trainers.batch import collate
from tunesmith.trainers.data.prepare import Prepared
from tunesmith.trainers.data.tokens import TokenStore
from tunesmith.trainers.packing import pack
from tunesmith.trainers.policy import score

Logps = list[np.ndarray]
"""For each example its labels' log-probabilities, float32 [L], in nats."""


@dataclass(frozen=True)
class Tolerance:
    """How far apart the log-probabilities (nats) of two right ways to compute the same thing may lie."""

    mean: float
    largest: float


TOLERANCES = {
    # sums in another order (packed and single rows, fused and plain attention) move a float32 logit by some 1e-6 of its
    # size for each layer; a wrong mask, position or weight moves it by far more
    torch.float32: Tolerance(mean=1e-4, largest=1e-3),
    # float16 keeps 11 bits: 2^-11 of an activation at every operation, through every layer
    torch.float16: Tolerance(mean=5e-3, largest=1e-1),
    # bfloat16 keeps 8 bits, and merging an adapter rounds the sum to them: a single rare token can move by half a nat
    # while the mean moves by hundredths
    torch.bfloat16: Tolerance(mean=3e-2, largest=5e-1),
}
INT8_TOLERANCE = Tolerance(mean=1e-1, largest=1.0)
"""LLM.int8 rounds every activation to 7 bits and a sign, whatever the training format. Which columns it leaves unrounded
depends on all tokens of a row, so packed and single rows differ, and the merged model rounds none. Measured on tiny models:
0.03 and 0.16 at most; weights read as codes are off by more than a nat on average."""
LEAST_CHANGE = 1e-6
"""Nats. The artifact and the base are scored by the same code on the same rows, so weights that changed nothing give
exactly 0; the floor leaves room for kernels that do not repeat themselves to the last bit."""


def choose_rows(data: Prepared, count: int) -> tuple[str, TokenStore, list[int]]:
    """The rows to compare: the first with labels from the validation split, else test, else train.

    Returns:
        The split's name, its store, and indices of at most `count` examples.
    """
    for name, store in (("validation", data.validation), ("test", data.test), ("train", data.train)):
        rows = np.flatnonzero(store.trained_counts > 0)[:count]
        if len(rows):
            return name, store, rows.tolist()
    raise AssertionError("no example has a label, and yet the run was trained")


@torch.no_grad()
def training_logps(engine: Any, store: TokenStore, rows: list[int], capacity: int, device: torch.device) -> Logps:
    """Scores the rows with the training forward, packed. Collective: every worker scores all of them.

    Args:
        engine: the DeepSpeed engine around a `Policy`, or the policy itself.
        capacity: tokens of a packed row.
    """
    was_training = engine.training
    engine.eval()
    found: dict[int, np.ndarray] = {}
    for packed in pack(np.asarray(rows, dtype=np.int64), store.lengths, capacity):
        logps_L = score(engine, collate(store, [packed], 1.0).to(device)).logps.float().cpu().numpy()
        ends = np.cumsum([store.trained_counts[row] for row in packed])
        found.update(zip(packed, np.split(logps_L, ends[:-1]), strict=True))
    engine.train(was_training)
    return [found[row] for row in rows]


def compare(
    trained: Logps,
    artifact: Path,
    base: BaseRef,
    store: TokenStore,
    rows: list[int],
    quantization: str | None,
    dtype: torch.dtype,
    device: torch.device,
) -> ParityReceipt:
    """Reloads the artifact with plain Transformers and PEFT and compares; holds one reloaded model at a time.

    Args:
        trained: what `training_logps` gave.
        artifact: the artifact's folder, not yet signed.
        quantization: `model.quantization` of the recipe: the base is reloaded as it was trained on.
        dtype: the training format.
        device: where the reloaded model is put; the CPU if it does not fit there.
    """
    unmerged: list[str] = []
    scored = dict(_reloaded(artifact, base, store, rows, quantization, dtype, device, unmerged))
    untuned = scored.pop("base")
    tolerance = INT8_TOLERANCE if quantization == "int8" else TOLERANCES[dtype]
    problems = []
    for way, logps in scored.items():
        mean, largest = _distance(trained, logps)
        if not (mean <= tolerance.mean and largest <= tolerance.largest):  # a NaN is no agreement
            problems.append(
                f"{way}: log-probabilities differ from the training forward by {mean:.2g} nats on average and "
                f"{largest:.2g} at most, where {dtype} allows {tolerance.mean:g} and {tolerance.largest:g}"
            )
    change = _distance(scored["artifact"], untuned)[1]
    if not change > LEAST_CHANGE:
        problems.append(f"the tuned model is its base: no log-probability differs by more than {LEAST_CHANGE:g} nats")
    return ParityReceipt(
        passed=not problems,
        problems=problems,
        rows=len(rows),
        tokens=sum(len(logps) for logps in trained),
        tolerance=tolerance.largest,
        differences={way: _distance(trained, logps)[1] for way, logps in scored.items()},
        base_difference=change,
        unmerged="".join(unmerged),
    )


def scored_rows(
    trained: Logps, store: TokenStore, rows: list[int], quantization: str | None, dtype: torch.dtype
) -> ParityRows:
    """The rows with what the training forward said of them, to hold a service against."""
    tolerance = INT8_TOLERANCE if quantization == "int8" else TOLERANCES[dtype]
    scored = []
    for row, logps in zip(rows, trained, strict=True):
        tokens, is_trained = store.example(row)
        positions = (np.flatnonzero(is_trained[1:]) + 1).tolist()
        scored.append(ScoredRow(tokens=tokens.tolist(), positions=positions, logprobs=np.round(logps, 6).tolist()))
    return ParityRows(tolerance_mean=tolerance.mean, tolerance=tolerance.largest, rows=scored)


def _reloaded(
    artifact: Path,
    base: BaseRef,
    store: TokenStore,
    rows: list[int],
    quantization: str | None,
    dtype: torch.dtype,
    device: torch.device,
    unmerged: list[str],
) -> Iterator[tuple[str, Logps]]:
    """The rows' log-probabilities by each way of loading: `artifact`, `base`, and for an adapter `merged`.

    An adapter that cannot be merged has no `merged`; PEFT's reason is put into `unmerged` instead.
    """
    device = _roomy(device, Path(base.path))
    if not (artifact / "adapter_config.json").is_file():
        for way, folder in (("artifact", artifact), ("base", Path(base.path))):
            yield way, plain_logps(_load(folder, None, dtype, device), store, rows)
            _collect()
        return
    from peft import PeftModel

    model: Any = PeftModel.from_pretrained(_load(Path(base.path), quantization, dtype, device), str(artifact))
    yield "artifact", plain_logps(model, store, rows)
    with model.disable_adapter():
        yield "base", plain_logps(model, store, rows)
    if quantization:
        # PEFT would round the merged weights to 4 bits again; merged models are served from whole weights
        del model
        _collect()
        whole = _load(Path(base.path), quantization, dtype, device).dequantize(dtype)
        model = PeftModel.from_pretrained(whole, str(artifact))
    merged = _merged(model, unmerged)
    if merged is not None:
        yield "merged", plain_logps(merged, store, rows)
    del model, merged
    _collect()


def _merged(model: Any, unmerged: list[str]) -> Any:
    """The base with the adapter merged into it; None, with the reason in `unmerged`, when PEFT says it cannot be."""
    if not hasattr(model, "merge_and_unload"):
        unmerged.append("PEFT merges no adapter of this type")
        return None
    try:
        return model.merge_and_unload()
    except torch.OutOfMemoryError:
        raise
    except (ValueError, RuntimeError) as error:  # PEFT's ways of saying that it cannot
        unmerged.append(" ".join(str(error).split()))
        return None


@torch.no_grad()
def plain_logps(model: Any, store: TokenStore, rows: list[int]) -> Logps:
    """Scores the rows one at a time with the model's own forward and its own attention."""
    model.eval()
    found = []
    for row in rows:
        tokens, trained = store.example(row)
        tokens_T = torch.from_numpy(tokens.astype(np.int64)).to(model.device)
        at_L = torch.from_numpy(np.flatnonzero(trained[1:])).to(model.device)
        logits_LV: Tensor = model(input_ids=tokens_T[None], use_cache=False).logits[0, at_L].float()
        logps_L = torch.log_softmax(logits_LV, dim=-1).gather(1, tokens_T[1:][at_L][:, None])[:, 0]
        found.append(logps_L.cpu().numpy())
    return found


def _load(folder: Path, quantization: str | None, dtype: torch.dtype, device: torch.device) -> Any:
    from transformers import AutoModelForCausalLM

    from tunesmith.trainers.models import keep_codes, quantization_config

    model = AutoModelForCausalLM.from_pretrained(
        folder, dtype=dtype, quantization_config=quantization_config(quantization, dtype), device_map={"": device}
    )
    keep_codes(model)
    return model


def _roomy(device: torch.device, folder: Path) -> torch.device:
    """The device if a model of this folder fits on it beside what is there, else the CPU."""
    if device.type != "cuda":
        return device
    from tunesmith.cluster.base import weight_files

    needed = sum(path.stat().st_size for path in weight_files(folder))
    return device if torch.cuda.mem_get_info(device)[0] > 1.3 * needed else torch.device("cpu")


def _distance(one: Logps, other: Logps) -> tuple[float, float]:
    """Mean and largest absolute difference, in nats; NaN when either holds one."""
    difference = np.abs(np.concatenate(one).astype(np.float64) - np.concatenate(other).astype(np.float64))
    return float(difference.mean()), float(difference.max())


def _collect() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
