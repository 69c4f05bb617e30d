"""What DeepSpeed makes of a simulated step: which bytes each worker holds under a ZeRO stage, and its buffers.

Arithmetic on what the simulation has tracked; each term is named after the buffer of DeepSpeed 0.19 that it stands for,
and a test holds them against tracked runs of every stage.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Literal

from tunesmith.trainers import zero
from tunesmith.trainers.memory.simulate import AFTER, GRADIENTS, OPTIMIZER, WEIGHTS, Keeping, Simulation
from tunesmith.trainers.memory.tracker import ACTIVATIONS, Bytes

ADAPTER, GATHERED, BUCKETS, COPY = "adapter", "gathered window", "buckets", "checkpoint copy"

MOMENTS = {"adamw": 8.0, "adamw_8bit": 2.0 * (1 + 4 / 256)}
"""Bytes of AdamW's two moments for each trained parameter: fp32, or 8 bits with an fp32 scale for each 256."""


DEEPSPEED_REDUCES_ELEMENTS = 500_000_000
"""`MEMORY_OPT_ALLREDUCE_SIZE` of DeepSpeed's engine: gradients that it sums over workers at once without ZeRO-2 or 3."""


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
        recomputes: whether the backward pass repeats the forward one (gradient checkpointing).
    """

    stage: int
    workers: int
    item: int
    optimizer: str = "adamw"
    offload: Literal["none", "cpu", "nvme"] = "none"
    persistence_threshold: int = 100_000
    overlaps: bool = True
    accumulation: int = 1
    recomputes: bool = False

    @property
    def keeping(self) -> Keeping:
        """What happens to a gradient once backward has made it."""
        return "kept" if self.stage < 2 else "freed"

    @property
    def passes(self) -> int:
        """Micro-batches to simulate: two when a later one finds gradients of an earlier one."""
        return 2 if self.accumulation > 1 else 1

    @property
    def sums_in_fp32(self) -> bool:
        """Whether DeepSpeed's bf16 optimizer is at work, which has 16-bit gradients beside their fp32 sum."""
        return self.stage == 1 and self.item == 2


def checkpoint_part(trainable: int, engine: Engine) -> int:
    """Bytes that the first worker writes of a checkpoint, the most of all: the weights, which ZeRO-3 alone leaves to the
    shards, and the optimizer's state, from ZeRO-1 on its shard of it and of the fp32 master weights."""
    weights = engine.item * trainable if engine.stage < 3 else 0
    moments = MOMENTS[engine.optimizer]
    return round(weights + (moments if engine.stage == 0 else (4 + moments) / engine.workers) * trainable)


def shard(simulation: Simulation, engine: Engine) -> dict[str, Bytes]:
    """Bytes by cause that one worker's device holds at the worst moment of each part of the step, `step` included."""
    held = _held(simulation, engine)
    windows = {name: parts + held + _moving(simulation, engine, name) for name, parts in simulation.windows.items()}
    left = Counter({cause: size for cause, size in windows.pop(AFTER, Counter()).items() if cause == ACTIVATIONS})
    if engine.workers > 1:
        windows["reduction"] = held + left + _at_reduction(simulation, engine)
    windows["step"] = held + _at_step(simulation, engine)
    return windows


def _held(simulation: Simulation, engine: Engine) -> Bytes:
    """What is there throughout."""
    trainable = simulation.trainable
    state: Bytes = Counter()
    if engine.stage == 0:
        state[OPTIMIZER] = round(MOMENTS[engine.optimizer] * trainable)
    elif engine.offload == "none":
        state[OPTIMIZER] = round((4 + MOMENTS[engine.optimizer]) * trainable / engine.workers)
    if engine.sums_in_fp32 and engine.offload == "none":
        state[GRADIENTS] = 4 * trainable  # fp32 sums of the whole model
    elif engine.stage == 1 and engine.accumulation > 1:
        state[BUCKETS] = _buckets(simulation, engine)
    elif engine.stage == 2 and engine.accumulation > 1 and engine.offload == "none":
        state[GRADIENTS] = _fp32_shard(simulation, engine)
    elif engine.stage == 3:
        state[BUCKETS] = zero.bucket_elements(trainable) * engine.item
        if engine.offload == "none":
            item = zero.gradient_item(3, engine.item, engine.accumulation)
            state[GRADIENTS] = round(item * trainable / engine.workers)
    return _weights(simulation, engine) + state


def _buckets(simulation: Simulation, engine: Engine) -> int:
    return zero.bucket_elements(simulation.trainable) * engine.item * (2 if engine.overlaps else 1)


def _fp32_shard(simulation: Simulation, engine: Engine) -> int:
    return round(4 * simulation.trainable / engine.workers)


def _weights(simulation: Simulation, engine: Engine) -> Bytes:
    """Weights at rest, those that an adapter has added apart."""
    parts: Bytes = Counter({WEIGHTS: round(simulation.fixed_bytes)})
    for kind, count in simulation.parameters.items():
        size = kind.elements * kind.item * count
        if engine.stage == 3 and kind.elements > engine.persistence_threshold:
            size = 0 if engine.offload != "none" else size / engine.workers
        parts[ADAPTER if kind.is_added else WEIGHTS] += round(size)
    return parts


def _moving(simulation: Simulation, engine: Engine, window: str) -> Bytes:
    """What comes and goes in the forward and backward pass."""
    parts: Bytes = Counter()
    is_reducing = window.startswith("reduce") or (window.startswith("backward") and window != "backward head")
    starts_afresh = engine.accumulation == 1
    is_flushed = simulation.trainable > zero.MOST_BUCKET_ELEMENTS  # else only when backward is over
    if is_reducing and (engine.stage == 2 or (engine.stage == 1 and starts_afresh and not engine.sums_in_fp32)):
        parts[BUCKETS] = _buckets(simulation, engine)
        if engine.stage == 2 and is_flushed:
            parts[BUCKETS] += 4 * zero.MOST_BUCKET_ELEMENTS
            parts[GRADIENTS] = _fp32_shard(simulation, engine) if starts_afresh and engine.offload == "none" else 0
    if engine.stage == 3:
        parts[GATHERED] = _gathered(simulation, engine, window)
        parts[BUCKETS] = engine.item * zero.MOST_BUCKET_ELEMENTS if is_reducing and is_flushed else 0
    return parts


def _gathered(simulation: Simulation, engine: Engine, window: str) -> int:
    """Bytes of weights that ZeRO-3 has gathered: those that are used again soon, and the message that is under way.

    A frozen embedding is used once, unless layers are computed again, and a frozen head not in the backward pass. The last message of the forward pass is
    used up when the head has its weight.
    """

    def bytes_of(*roles: str) -> int:
        return simulation.bytes(
            lambda kind: kind.role in roles and kind.elements > engine.persistence_threshold and not kind.is_trainable
        )

    sharded = simulation.bytes(lambda kind: kind.elements > engine.persistence_threshold)
    item = sharded / (simulation.elements(lambda kind: kind.elements > engine.persistence_threshold) or 1)
    is_forward = window.startswith("forward")
    once = 0 if engine.recomputes or window == "forward embedding" else bytes_of("embedding")
    used = sharded - once - (0 if is_forward else bytes_of("head"))
    live = min(used, round((zero.MOST_LIVE_ELEMENTS + simulation.largest) * item))
    everything_stays = sharded <= zero.MOST_LIVE_ELEMENTS * item
    if everything_stays and (not is_forward or window == "forward logits"):
        return live
    return live + min(sharded, round(zero.PREFETCH_ELEMENTS * item))


def _at_reduction(simulation: Simulation, engine: Engine) -> Bytes:
    """What is there when the last gradients are summed over the workers, and no activations any more.

    Without ZeRO-2 or 3 whole gradients are flattened, unless they lie flat already, and the bf16 optimizer sends a 16-bit
    copy of them. ZeRO-2 sums a copy of its bucket in fp32; ZeRO-3 lays the bucket's shards out one after the other. The last
    gradient is still there.
    """
    trainable, item = simulation.trainable, engine.item
    groups = {kind.is_matrix for kind in simulation.parameters if kind.is_trainable}
    largest = max((kind.elements for kind in simulation.parameters if kind.is_trainable), default=0)
    bucket = zero.bucket_elements(trainable)
    at_once = min(trainable, DEEPSPEED_REDUCES_ELEMENTS)
    if engine.sums_in_fp32:
        return Counter({GRADIENTS: item * trainable, BUCKETS: at_once * (6 if len(groups) > 1 else 2)})
    if engine.stage == 0:
        return Counter({GRADIENTS: item * trainable, BUCKETS: 4 * at_once})
    if engine.stage == 1:
        own = 0 if engine.accumulation > 1 else _buckets(simulation, engine)
        return Counter({GRADIENTS: item * trainable, BUCKETS: own})
    if engine.stage == 2:
        if item == 4:
            return Counter({BUCKETS: _buckets(simulation, engine) + 4 * bucket})
        # the sum of the first micro-batch needs most: the shard that keeps it is made afterwards
        kept = _fp32_shard(simulation, engine) if engine.accumulation > 1 and engine.offload == "none" else 0
        return Counter({BUCKETS: _buckets(simulation, engine) + 4 * bucket - kept + 2 * item * largest})
    gathered = _gathered(simulation, engine, "backward first layer")
    return Counter({GATHERED: gathered, BUCKETS: item * (bucket + largest)})


def _at_step(simulation: Simulation, engine: Engine) -> Bytes:
    """What only the optimizer's step needs."""
    parts: Bytes = Counter()
    if engine.stage == 1 and not engine.sums_in_fp32 and engine.accumulation == 1:
        parts[BUCKETS] = _buckets(simulation, engine)  # where the gradients lie by now
    elif engine.stage < 2:
        parts[GRADIENTS] = engine.item * simulation.trainable
    elif engine.offload != "none":
        return parts
    elif engine.stage == 3:
        parts[OPTIMIZER] = min(_fp32_shard(simulation, engine), 4 * zero.SUBGROUP_ELEMENTS)
    else:
        parts[GRADIENTS] = _fp32_shard(simulation, engine) if engine.accumulation == 1 else 0
        flat = _fp32_shard(simulation, engine) if engine.item == 4 else 0
        largest = max((kind.elements for kind in simulation.parameters if kind.is_trainable), default=0)
        parts[OPTIMIZER] = max(flat, 8 * largest if engine.item == 2 else 0)  # a norm is summed in 64 bits
        if engine.accumulation > 1 and engine.item == 4:
            parts[OPTIMIZER] = max(parts[OPTIMIZER], _buckets(simulation, engine))
    return parts
