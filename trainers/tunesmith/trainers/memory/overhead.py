"""What a device holds beside PyTorch's tensors. Estimates, and said to be so: only a run on the device can measure them."""

from __future__ import annotations

from collections import Counter

from tunesmith.cluster.fleet import GIB
from tunesmith.trainers.memory.tracker import Bytes

CUDA_CONTEXT = round(0.5 * GIB)
"""Driver, kernels and cuBLAS workspaces of one process: 0.4 to 0.6 GiB from Ampere to Hopper."""
NCCL = round(0.35 * GIB)
"""Channels and buffers of one communicator between several GPUs."""
FRAGMENTATION = 0.03
"""Of the activations, that PyTorch's allocator holds without being asked for it."""
PROCESS = round(0.9 * GIB)
"""Resident memory of a worker on CPUs before it has a model: Python, PyTorch, Transformers, DeepSpeed and Ray (measured)."""


def overhead(on_gpu: bool, workers: int, activations: int, gathered: int) -> Bytes:
    """Bytes by cause that one worker's device holds besides tensors.

    Args:
        workers: that exchange messages.
        activations: bytes of them at the worst moment.
        gathered: bytes of weights that ZeRO-3 has gathered. They come and go in blocks of all sizes, of which the allocator
            keeps about as many again.
    """
    if not on_gpu:
        return Counter({"process": PROCESS})
    return Counter(
        {
            "CUDA context": CUDA_CONTEXT,
            "NCCL": NCCL if workers > 1 else 0,
            "fragmentation": round(FRAGMENTATION * activations) + gathered,
        }
    )
