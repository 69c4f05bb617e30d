"""What the first steps of a training really took: on CPUs by the tracker that predicts, on GPUs by PyTorch's allocator."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from tunesmith.trainers.batch import Batch
from tunesmith.trainers.memory.shard import ADAPTER
from tunesmith.trainers.memory.simulate import OPTIMIZER, WEIGHTS, Shape
from tunesmith.trainers.memory.tracker import Bytes, MemoryTracker

STEPS = 2
"""Optimizer steps that are measured: some engines make their state in the first, so the second may hold more."""
HELD, MADE = "held besides", "made in the step"
"""Causes: what else was there when a step began, and what came in it (activations, gradients, gathered weights)."""


class StepMeter:
    """Measures the first steps of an attempt on one worker, and is off afterwards.

    Args:
        engine: the DeepSpeed engine that trains.
        device: of its weights.
        keep: what is done with the figures after each measured step, such as writing them down.

    Attributes:
        causes: bytes by cause at the worst moment so far; empty before the first step.
        shape: of the micro-batch with most tokens in the measured steps, by labels among equals; None before the first.
        steps: measured so far.
        wanted: steps to measure.
    """

    def __init__(
        self, engine: Any, device: torch.device, keep: Callable[[StepMeter], None] = lambda _meter: None
    ) -> None:
        self.engine, self.device, self._keep = engine, device, keep
        self.causes: Bytes = Counter()
        self.shape: Shape | None = None
        self.steps, self.wanted = 0, STEPS
        self._is_on = False

    @contextmanager
    def step(self) -> Iterator[None]:
        """Put it around every optimizer step; only the first ones are measured."""
        if self.steps >= self.wanted:
            yield
            return
        self._is_on = True
        try:
            if self.device.type == "cuda":
                with self._allocated():
                    yield
            else:
                with self._tracked():
                    yield
        finally:
            self._is_on = False
        self.steps += 1
        self._keep(self)

    def saw(self, batch: Batch) -> None:
        """Notes the shape of a micro-batch, if it belongs to a measured step."""
        if not self._is_on:
            return
        shape = Shape(batch.forest.lengths, len(batch.targets))
        if self.shape is None or (shape.tokens, shape.labels) > (self.shape.tokens, self.shape.labels):
            self.shape = shape

    @contextmanager
    def _tracked(self) -> Iterator[None]:
        tracker = MemoryTracker()
        for cause, tensors in held_by(self.engine).items():
            tracker.claim(tensors, cause)
        tracker.claim_everything_alive(HELD)
        with tracker, tracker.causing(MADE):
            yield
        self._note(tracker.peak)

    @contextmanager
    def _allocated(self) -> Iterator[None]:
        torch.cuda.reset_peak_memory_stats(self.device)
        began = torch.cuda.memory_allocated(self.device)
        causes = _sizes(held_by(self.engine), self.device)
        causes[HELD] = began - causes.total()
        yield
        causes[MADE] = torch.cuda.max_memory_allocated(self.device) - began
        self._note(causes)

    def _note(self, causes: Bytes) -> None:
        if causes.total() > self.causes.total():
            self.causes = causes


def held_by(engine: Any) -> dict[str, list[Tensor]]:
    """Tensors of the optimizer and of the model, by cause. One that is in two lists belongs to the later cause."""
    inner = getattr(engine.optimizer, "optimizer", engine.optimizer)
    values = [value for state in inner.state.values() for value in state.values()]
    grouped = [parameter for group in inner.param_groups for parameter in group["params"]]
    state = [tensor for tensor in (*inner.state, *values, *grouped) if isinstance(tensor, Tensor)]
    is_peft = hasattr(engine.module.model, "peft_config")
    added = [p for p in engine.module.parameters() if is_peft and p.requires_grad]
    weights = [p for p in engine.module.parameters() if not (is_peft and p.requires_grad)]
    weights += list(engine.module.buffers())
    return {OPTIMIZER: state, WEIGHTS: _with_shards(weights), ADAPTER: _with_shards(added)}


def _with_shards(tensors: list[Tensor]) -> list[Tensor]:
    """And the shards in which ZeRO-3 keeps them."""
    return tensors + [tensor.ds_tensor for tensor in tensors if hasattr(tensor, "ds_tensor")]  # pyright: ignore[reportAttributeAccessIssue]


def _sizes(held: dict[str, list[Tensor]], device: torch.device) -> Bytes:
    """Bytes by cause on the device, every storage once."""
    storages = {
        tensor.untyped_storage()._cdata: (cause, tensor.untyped_storage().nbytes())
        for cause, tensors in held.items()
        for tensor in tensors
        if tensor.device.type == device.type
    }
    sizes: Bytes = Counter()
    for cause, size in storages.values():
        sizes[cause] += size
    return sizes
