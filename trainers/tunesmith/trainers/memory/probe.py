"""Before step one: the largest batch of the whole run, so that what does not fit the device fails at once.

What is covered: forward and backward of the micro-batch with most tokens, with everything that DeepSpeed reduces,
shards and gathers on the way; a later micro-batch of a step, which finds the gradients of earlier ones; the bytes that
the optimizer's step adds; the largest batch of an evaluation. Saving and exporting copy one parameter at a time to the
host, which under ZeRO-3 gathers no more than the forward pass does, so they add nothing.

What is left as it was: weights, moments and step counts, for no optimizer step is done; gradients, for every label
weighs nothing, so that all of them are zero, and they are dropped besides; the loop's batches and random numbers,
which follow from the step's number alone.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from tunesmith.cluster.errors import OutOfMemoryError
from tunesmith.trainers import zero
from tunesmith.trainers.batch import Batch, idle
from tunesmith.trainers.policy import sum_negative_logps

_GIB = 2**30


def probe(engine: Any, train: Callable[[Batch], Any], longest: Batch, held_out: Batch | None) -> None:
    """Takes the memory that the run's worst step and evaluation will take, and gives it back. Collective.

    Args:
        engine: a DeepSpeed engine between two optimizer steps.
        train: forward and backward of a micro-batch, as the loop does it.
        longest: the micro-batch with most tokens, on the device.
        held_out: the largest batch of an evaluation, on the device; None without evaluations.

    Raises:
        OutOfMemoryError: the device has too little; no weight was changed.
    """
    device = longest.input_ids.device
    with translated(f"a micro-batch of {len(longest.input_ids):,} tokens, the longest of the run", device):
        engine.train()
        for is_last in (False, True) if engine.gradient_accumulation_steps() > 1 else (True,):
            engine.set_gradient_accumulation_boundary(is_last)
            train(idle(longest))
        engine.set_gradient_accumulation_boundary(None)  # by the engine's own count again
        rest = torch.empty(step_bytes(engine), dtype=torch.uint8, device=device)
        del rest
    drop_gradients(engine)
    if held_out is not None:
        with translated(f"an evaluation batch of {len(held_out.input_ids):,} tokens", device):
            engine.eval()
            sum_negative_logps(engine, held_out)
            engine.train()
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def step_bytes(engine: Any) -> int:
    """Most bytes that an optimizer step adds to what is there after a backward pass.

    Moments that do not exist yet, for an optimizer that makes them in its first step; and under ZeRO an fp32 copy of the
    gradients that this worker updates, with another one for their norm.
    """
    trainable = sum(getattr(p, "ds_numel", p.numel()) for p in engine.module.parameters() if p.requires_grad)
    inner = getattr(engine.optimizer, "optimizer", engine.optimizer)
    if engine.zero_optimization_stage() == 0:
        return 0 if inner.state else 8 * trainable
    if engine.zero_use_cpu_optimizer():
        return 0
    return 8 * min(zero.SUBGROUP_ELEMENTS, -(-trainable // engine.dp_world_size))


def drop_gradients(engine: Any) -> None:
    """Forgets the gradients of all backward passes since the last optimizer step."""
    engine.zero_grad()
    engine.optimizer.zero_grad()
    for name in ("averaged_gradients", "all_grad_tensors"):  # where ZeRO-1 to 3 keep them from backward to the step
        getattr(engine.optimizer, name, {}).clear()


@contextmanager
def translated(what: str, device: torch.device) -> Iterator[None]:
    """Within it a failed allocation becomes an error that says what did not fit.

    Raises:
        OutOfMemoryError: with the numbers, and what to do.
    """
    try:
        yield
    except torch.OutOfMemoryError as error:
        free, total = torch.cuda.mem_get_info(device) if device.type == "cuda" else (0, 0)
        held = torch.cuda.memory_allocated(device) if device.type == "cuda" else 0
        raise out_of_memory(what, str(error), held, free, total) from error


def out_of_memory(what: str, asked: str, held: int, free: int, total: int) -> OutOfMemoryError:
    """The error for a device that has too little.

    Args:
        what: was tried.
        asked: PyTorch's own message, whose first sentence says what was asked for.
        held, free, total: bytes that tensors hold, that are free, and that the device has.
    """
    sentence = " ".join(asked.split()).removeprefix("CUDA out of memory. ").partition(". ")[0]
    return OutOfMemoryError(
        f"{what} does not fit: {sentence}; tensors hold {held / _GIB:.2f} GiB, {free / _GIB:.2f} of "
        f"{total / _GIB:.2f} GiB are free. No step was done.",
        "Lower data.max_length or train.per_device_train_batch_size, set train.gradient_checkpointing: true, a higher "
        "cluster.zero, adaptation: lora or model.quantization: nf4, or take more or larger GPUs.",
    )
