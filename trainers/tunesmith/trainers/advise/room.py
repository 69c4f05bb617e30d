"""How much memory each adaptation takes on each GPU: the closed forms that are known before anything is simulated.

They count weights, gradients and optimizer state. What they leave out (activations, logits, buckets, the CUDA context) has to fit
into the share of the memory that `USABLE` keeps free.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Way = Literal["full", "lora", "qlora"]
GIB = 2**30
STATE_BYTES = 16
"""Of a trained parameter under AdamW. In 16 bits: weight 2, gradient 2, fp32 weight 4, two moments 8 (Rajbhandari et al. 2020,
ZeRO, section 3.1). In fp32: weight 4, gradient 4, two moments 8."""
NF4_BYTES = 0.516
"""Of a weight in 4 bits with its doubly quantised scales (Dettmers et al. 2023, QLoRA, section 3): 4.127 bits."""
USABLE = 0.8
"""Share of a GPU's memory that the closed forms may fill."""


@dataclass(frozen=True)
class Size:
    """What a base's geometry says."""

    parameters: int
    """All of them, a tied head counted once."""
    linear: int
    """Those in linear layers other than the head: what NF4 quantises."""
    lora_per_rank: int
    """Parameters that LoRA on these layers adds for each unit of rank: inputs + outputs."""


@dataclass(frozen=True)
class Layout:
    """One way to place an adaptation on a fleet."""

    way: Way
    zero: int
    """ZeRO stage."""
    gib: float
    """On each GPU."""


def layouts(size: Size, rank: int, gpus: int, on_gpu: bool) -> list[Layout]:
    """Every layout, for each adaptation the fastest first.

    Args:
        rank: of LoRA and QLoRA.
        gpus: that share the work; on CPUs, workers.
        on_gpu: 16-bit weights; else all is fp32.
    """
    weight = 2 if on_gpu else 4
    state = STATE_BYTES - weight
    whole, adapter = float(size.parameters), float(rank * size.lora_per_rank)
    beside = weight * adapter + state * adapter / gpus
    quantised = NF4_BYTES * size.linear + weight * (whole - size.linear)
    plain = 0 if gpus == 1 else 2
    options: list[tuple[Way, int, float]] = [
        ("full", plain, weight * whole + state * whole / gpus),
        ("full", 3, STATE_BYTES * whole / gpus),
        ("lora", plain, weight * whole + beside),
        ("lora", 3, (weight * whole + STATE_BYTES * adapter) / gpus),
        ("qlora", plain, quantised + beside),  # every rank loads the quantised base whole, whatever the stage
    ]
    return [Layout(way, zero, size_bytes / GIB) for way, zero, size_bytes in options if zero != 3 or gpus > 1]


def gib(amount: float) -> str:
    """An amount of memory for people."""
    if amount < 0.1:
        return f"{amount * 1024:,.3g} MiB"
    return f"{amount:,.0f} GiB" if amount >= 100 else f"{amount:.3g} GiB"
