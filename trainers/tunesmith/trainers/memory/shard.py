"""What DeepSpeed makes of a simulated step: which bytes each worker holds under a ZeRO stage, and its buffers.

Arithmetic on what the simulation has tracked; each term is named after the buffer of DeepSpeed 0.19 that it stands for,
and a test holds them against tracked runs of every stage.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Literal

from tunesmith.trainers import zero
from tunesmith.trainers.memory.simulate import GRADIENTS, OPTIMIZER, WEIGHTS, Keeping, Simulation
from tunesmith.trainers.memory.tracker import Bytes

ADAPTER, GATHERED, BUCKETS = "adapter", "gathered window", "buckets"

MOMENTS = {"adamw": 8.0, "adamw_8bit": 2.0 * (1 + 4 / 256)}
"""Bytes of AdamW's two moments for each trained parameter: fp32, or 8 bits with an fp32 scale for each 256."""


@dataclass(frozen=True)
class Engine:
    """How the weights, gradients and optimizer state are held.

    Attributes:
        stage: the ZeRO stage that DeepSpeed is given (`zero.engine_stage`).
        workers: over which state is sharded.
        item: bytes of a weight in the training format.
        optimizer: as the recipe names it.
        offload: where optimizer state, and under ZeRO-3 weights, rest.
        persistence_threshold: under ZeRO-3, smaller parameters stay whole.
        overlaps: whether gradients are reduced while others are made, with a second bucket (on GPUs).
        accumulation: micro-batches of a step.
    """

    stage: int
    workers: int
    item: int
    optimizer: str = "adamw"
    offload: Literal["none", "cpu", "nvme"] = "none"
    persistence_threshold: int = 100_000
    overlaps: bool = True
    accumulation: int = 1

    @property
    def keeping(self) -> Keeping:
        """What happens to a gradient once backward has made it."""
        if self.stage < 2:
            return "kept"
        return "freed_as_fp32" if self.stage == 2 and self.item == 2 else "freed"

    @property
    def passes(self) -> int:
        """Micro-batches to simulate: two when a later one finds gradients of an earlier one."""
        return 2 if self.accumulation > 1 or self.sums_in_fp32 else 1

    @property
    def sums_in_fp32(self) -> bool:
        """Whether DeepSpeed's bf16 optimizer is at work, which keeps 16-bit gradients beside their fp32 sum."""
        return self.stage == 1 and self.item == 2


def shard(simulation: Simulation, engine: Engine) -> dict[str, Bytes]:
    """Bytes by cause that one worker's device holds at the worst moment of each part of the step, `step` included."""
    held = _held(simulation, engine)
    windows: dict[str, Bytes] = {}
    for name, parts in simulation.windows.items():
        is_backward = not name.startswith("forward") and name != "backward head"
        windows[name] = parts + held + _moving(simulation, engine, is_backward, name.startswith("forward"))
    windows["step"] = held + _at_step(simulation, engine)
    return windows


def _held(simulation: Simulation, engine: Engine) -> Bytes:
    """What is there throughout."""
    trainable, workers = simulation.trainable, engine.workers
    weights = _weights(simulation, engine)
    state: Bytes = Counter()
    if engine.stage == 0:
        state[OPTIMIZER] = round(MOMENTS[engine.optimizer] * trainable)
    elif engine.offload == "none":
        state[OPTIMIZER] = round((4 + MOMENTS[engine.optimizer]) * trainable / workers)
    bucket = zero.bucket_elements(trainable) * engine.item
    if engine.sums_in_fp32 and engine.offload == "none":
        state[GRADIENTS] = 4 * trainable  # fp32 sums of the whole model
    elif engine.stage == 1:
        state[BUCKETS] = bucket * (2 if engine.overlaps else 1)
    elif engine.stage == 3:
        state[BUCKETS] = bucket
        if engine.offload == "none":
            state[GRADIENTS] = round(4 * trainable / workers)
    elif engine.stage == 2 and engine.offload == "none" and engine.accumulation > 1:
        state[GRADIENTS] = round(4 * trainable / workers)
    return weights + state


def _weights(simulation: Simulation, engine: Engine) -> Bytes:
    """Weights at rest, those that an adapter has added apart."""
    parts: Bytes = Counter({WEIGHTS: round(simulation.fixed_bytes)})
    for kind, count in simulation.parameters.items():
        size = kind.elements * kind.item * count
        if engine.stage == 3 and kind.elements > engine.persistence_threshold:
            size = 0 if engine.offload != "none" else size / engine.workers
        parts[ADAPTER if kind.is_added else WEIGHTS] += round(size)
    return parts


def _moving(simulation: Simulation, engine: Engine, is_reducing: bool, is_forward: bool) -> Bytes:
    """What comes and goes in the forward and backward pass."""
    parts: Bytes = Counter()
    bucket = zero.bucket_elements(simulation.trainable) * engine.item
    if engine.stage == 2 and is_reducing:
        parts[BUCKETS] = bucket * (2 if engine.overlaps else 1)
        if engine.accumulation == 1 and engine.offload == "none":
            parts[GRADIENTS] = round(4 * simulation.trainable / engine.workers)
    if engine.stage == 3:
        sharded = simulation.bytes(lambda kind: kind.elements > engine.persistence_threshold)
        item = sharded / max(1, simulation.elements(lambda kind: kind.elements > engine.persistence_threshold))
        live = min(sharded, (zero.MOST_LIVE_ELEMENTS + simulation.largest) * item)
        ahead = min(sharded, zero.PREFETCH_ELEMENTS * item)
        everything_stays = sharded <= zero.MOST_LIVE_ELEMENTS * item
        parts[GATHERED] = round(live + (0 if everything_stays and not is_forward else ahead))
    return parts


def _at_step(simulation: Simulation, engine: Engine) -> Bytes:
    """What only the optimizer's step needs."""
    trainable, workers = simulation.trainable, engine.workers
    parts: Bytes = Counter()
    if engine.stage < 2:
        parts[GRADIENTS] = engine.item * trainable
    elif engine.offload == "none" and engine.stage == 3:
        parts[OPTIMIZER] = round(4 * min(trainable / workers, zero.SUBGROUP_ELEMENTS))
    elif engine.offload == "none":
        already = 0 if engine.accumulation > 1 else round(4 * trainable / workers)
        parts[GRADIENTS] = already
        parts[OPTIMIZER] = round(4 * trainable / workers) if engine.item == 4 else 8 * simulation.largest
    return parts
