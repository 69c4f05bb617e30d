"""How long a step takes, what a run costs and what it leaves on disk: arithmetic on plain numbers.

A step is bound by the slowest of what runs at once: matrix products, memory traffic, messages (the roofline model, Williams
et al. 2009). What runs afterwards, the optimizer, is added. Every time is given with a band, because how much of a published
peak a program reaches is not known before it runs; the band is what is known of that.

Symbols in the formulas: P parameters, A those that a token meets, T trainable, N GPUs.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from tunesmith.cluster.fleet import Fleet

Place = Literal["none", "cpu", "nvme"]


@dataclass(frozen=True)
class Reached:
    """The share of a peak that programs reach: usually, at best, at worst."""

    usual: float
    best: float
    worst: float


UTILISATION = Reached(0.40, 0.50, 0.30)
"""Of the matrix peak, recomputation counted as work. Published trainings: Llama 2 7B and 70B on A100 0.41 and 0.44 (Touvron et
al. 2023, Table 2), Llama 3 405B on H100 0.38 to 0.43 (Dubey et al. 2024, Table 4), PaLM 540B 0.46 (Chowdhery et al. 2022)."""
MEMORY = Reached(0.75, 0.90, 0.60)
"""Of memory bandwidth, by kernels that stream."""
LINKS = Reached(0.70, 0.90, 0.40)
"""Of links: collectives over NVLink reach 0.8 of it; over PCIe without direct access between GPUs under half."""
HOST_ADAM_BYTES_S = 100e9
"""Host memory that the optimizer streams through on the CPUs of one node: DeepSpeed's CPU Adam takes about a quarter of a second
for 1e9 parameters (Ren et al. 2021, ZeRO-Offload, Table 4) at 28 bytes each."""
NVME_BYTES_S = 5e9
"""Reading or writing, of one node: a PCIe 4 drive."""


@dataclass(frozen=True)
class Work:
    """One optimizer step, of which every GPU does an equal share."""

    parameters: float
    """P: all that the model holds, adapters included."""
    active: float
    """A: those that a token is multiplied with. Without the table of input embeddings (unless it is the head too), and of
    experts only as many as a token is sent to. The head counts: it is a product like any other."""
    trainable: float
    """T: those with a gradient."""
    active_trainable: float
    """Those of `active` with a gradient. P = A = T for a dense model that is trained in full, but for its embeddings."""
    layers: int
    """Attention layers."""
    attention_width: int
    """Heads × size of a head."""
    context: float
    """Tokens of the sequence that a token lies in, the mean over tokens; what it attends to is half of them."""
    tokens: float
    """Of one GPU in one step, over all passes."""
    passes: int = 1
    """Forward and backward passes in one step (gradient accumulation)."""
    zero_stage: int = 0
    """0 to 3."""
    gradient_checkpointing: bool = False
    """Whether the backward pass repeats the forward one."""
    weight_bytes: float = 2.0
    """Of one weight as it is stored, the mean over all: 2 for bf16, 4 for fp32, 0.516 for NF4 with double quantisation."""
    gradient_bytes: float = 2.0
    """Of one gradient as it is sent."""
    offload_optimizer: Place = "none"
    """Where the optimizer's state rests."""
    offload_weights: Place = "none"
    """Where the shards of the weights rest (ZeRO-3)."""


@dataclass(frozen=True)
class StepTime:
    """Seconds of one optimizer step."""

    seconds: float
    """With the usual share of every peak."""
    low: float
    """With the best share, and everything hidden behind the slowest."""
    high: float
    """With the worst share, and nothing hidden."""
    bound_by: str
    """The largest piece: compute, memory, communication or optimizer."""
    pieces: dict[str, float]
    """Seconds of each by itself, with the usual share."""


@dataclass(frozen=True)
class RunTime:
    """A run's optimizer steps; loading, evaluation and checkpoints come on top."""

    seconds: float
    low: float
    high: float
    usd: float | None
    """None when the fleet has no price."""
    usd_low: float | None
    usd_high: float | None


@dataclass(frozen=True)
class Disk:
    """Bytes that a run writes."""

    checkpoint: float
    """Of one."""
    artifact: float
    """What is left in the end: the adapter, or the whole model."""
    peak: float
    """The most at any time: all that are kept, the best one, the one being written, and the artifact."""


def flops_per_token(work: Work) -> float:
    """Operations that one token costs in one step.

    Products with weights: 2·A forward, 2·A for the gradients of activations, 2·(A's trainable part) for the gradients of
    weights (Kaplan et al. 2020, section 2.1): 6·P in full fine-tuning, 4·P + 6·(adapter) with a frozen base.
    Attention: 4·layers·width·context forward for a token that sees all of its sequence and half of that under the causal
    mask, twice as much backward (Chowdhery et al. 2022, appendix B, has 12 for all three without the mask).
    Gradient checkpointing repeats the forward part.
    """
    attention = 2 * work.layers * work.attention_width * work.context
    forward = 2 * work.active + attention
    backward = 2 * work.active + 2 * work.active_trainable + 2 * attention
    return forward * (2 if work.gradient_checkpointing else 1) + backward


def memory_bytes(work: Work, gpus: int) -> float:
    """Bytes of weights and gradients that one GPU reads and writes in the passes of a step; activations are in UTILISATION.

    Each pass reads the weights forward, backward and, with gradient checkpointing, once more; weights of under two bytes
    are first written out as 16 bits and read from there. It writes and reads each gradient and adds it to an fp32 sum.
    """
    reads = 3 if work.gradient_checkpointing else 2
    one_read = work.weight_bytes + (4 if work.weight_bytes < 2 else 0)
    summed = work.trainable / (gpus if work.zero_stage >= 2 else 1)
    a_pass = reads * one_read * work.parameters + 2 * work.gradient_bytes * work.trainable + 8 * summed
    return a_pass * work.passes


def optimizer_bytes(work: Work, gpus: int) -> float:
    """Bytes that AdamW moves on one GPU: reads the sum, the master weight and two moments, writes the last three and a
    16-bit weight, 30 a parameter, sharded from ZeRO-1 on."""
    return 30 * work.trainable / (gpus if work.zero_stage >= 1 else 1)


def sent_bytes(work: Work, gpus: int) -> float:
    """Bytes that each GPU sends in a step (Rajbhandari et al. 2020, ZeRO, section 7), a ring's (N-1)/N included.

    Stages 0 and 1: 2·T, a reduction and a gathering. Stage 2 reduces in every pass: (passes + 1)·T. Stage 3 gathers all
    weights, frozen ones too, forward and backward, and reduces gradients, in every pass: 2·P + T each, 3·P in full
    fine-tuning. Frozen weights below stage 3 are whole everywhere and send nothing.
    """
    gradients = work.trainable * work.gradient_bytes
    if work.zero_stage == 3:
        total = work.passes * (2 * work.parameters * work.weight_bytes + gradients)
    else:
        total = gradients * (work.passes if work.zero_stage == 2 else 1) + work.trainable * 2
    return total * (gpus - 1) / gpus


def step_time(work: Work, fleet: Fleet, utilisation: Reached = UTILISATION) -> StepTime:
    """The time of one optimizer step on a fleet, every GPU of which takes part."""

    def pieces(compute: float, memory: float, links: float) -> dict[str, float]:
        return {
            "compute": flops_per_token(work) * work.tokens / (fleet.gpu.flops * compute),
            "memory": memory_bytes(work, fleet.gpus) / (fleet.gpu.memory_gb_s * 1e9 * memory),
            "communication": sent_bytes(work, fleet.gpus) / (fleet.collective_bytes_s * links)
            + _weights_from_host(work, fleet, links),
            "optimizer": _optimizer_seconds(work, fleet, memory, links),
        }

    usual = pieces(utilisation.usual, MEMORY.usual, LINKS.usual)
    best = pieces(utilisation.best, MEMORY.best, LINKS.best)
    worst = pieces(utilisation.worst, MEMORY.worst, LINKS.worst)
    return StepTime(
        seconds=_overlapped(usual),
        low=_overlapped(best),
        high=sum(worst.values()),
        bound_by=max(usual, key=lambda piece: usual[piece]),
        pieces=usual,
    )


def run_time(step: StepTime, steps: int, fleet: Fleet) -> RunTime:
    """Of all optimizer steps, with what the fleet costs meanwhile in USD."""
    seconds, low, high = (each * steps for each in (step.seconds, step.low, step.high))
    rate = fleet.usd_per_hour
    usd = [None if rate is None else each / 3600 * rate for each in (seconds, low, high)]
    return RunTime(seconds, low, high, *usd)


def disk(
    *,
    parameters: float,
    trainable: float,
    whole_model: bool,
    save_total_limit: int,
    mixed: bool = True,
    moments: float = 8.0,
) -> Disk:
    """What a run leaves on disk, in bytes.

    Args:
        parameters, trainable: P and T.
        whole_model: whether the artifact is the whole model rather than an adapter.
        save_total_limit: newest checkpoints kept; the best one is kept besides.
        mixed: 16-bit training, with fp32 master weights; else all is fp32.
        moments: bytes of the optimizer's two for each trained parameter.
    """
    weight, state = (2, 4 + moments) if mixed else (4, moments)  # state: master weight if there is one, and moments
    checkpoint = trainable * (weight + state)
    artifact = (parameters if whole_model else trainable) * weight
    return Disk(checkpoint, artifact, checkpoint * (save_total_limit + 2) + artifact)


def _overlapped(pieces: dict[str, float]) -> float:
    return max(pieces["compute"], pieces["memory"], pieces["communication"]) + pieces["optimizer"]


def _weights_from_host(work: Work, fleet: Fleet, links: float) -> float:
    """Seconds to bring this GPU's shard of the weights up for each gathering."""
    if work.offload_weights == "none":
        return 0.0
    shard = work.parameters * work.weight_bytes / fleet.gpus
    slowest = fleet.gpu.host_gb_s * 1e9 * links
    if work.offload_weights == "nvme":
        slowest = min(slowest, NVME_BYTES_S * links / fleet.gpus_per_node)
    return 2 * work.passes * shard / slowest


def _optimizer_seconds(work: Work, fleet: Fleet, memory: float, links: float) -> float:
    """On the GPU; or gradients to the host in every pass, Adam there, and 16-bit weights back (ZeRO-Offload)."""
    if work.offload_optimizer == "none":
        return optimizer_bytes(work, fleet.gpus) / (fleet.gpu.memory_gb_s * 1e9 * memory)
    shard = work.trainable / (fleet.gpus if work.zero_stage >= 1 else 1)
    moved = shard * (work.passes * work.gradient_bytes + 2) / (fleet.gpu.host_gb_s * 1e9 * links)
    on_node = shard * fleet.gpus_per_node
    adam = 28 * on_node / (HOST_ADAM_BYTES_S * memory / MEMORY.usual)
    if work.offload_optimizer == "nvme":
        adam += 24 * on_node / (NVME_BYTES_S * links / LINKS.usual)  # fp32 master and two moments, in and out again
    return moved + adam
