"""This machine as a fleet: its GPUs by their driver's names, or its cores and memory when it has none."""

from __future__ import annotations

import subprocess
import time

from tunesmith.cluster.errors import FleetError
from tunesmith.cluster.fleet import Fleet, FleetBook, Gpu, gpu_of_driver
from tunesmith.cluster.resources import Node, this_machine

CPU_MEMORY_GB_S = 20.0
"""Host memory bandwidth that all cores share: one DDR4-3200 channel gives 25.6 at its peak, and containers rarely get more."""


def this_fleet(book: FleetBook, workers: int = 1) -> Fleet:
    """What this process may use.

    Without GPUs a device is one worker's share of the free host memory and of the matrix rate that is measured here.

    Raises:
        FleetError: the driver does not answer, or names a GPU that is not in the book, or GPUs of two kinds.
    """
    node = this_machine()
    if node.gpus >= 1:
        return of_gpus(node, _driver_answer(), book)
    return of_cpus(node, workers, measured_flops())


def of_gpus(node: Node, driver_answer: str, book: FleetBook) -> Fleet:
    """The fleet of a node whose driver answered `name, memory in MiB` on a line for each GPU."""
    lines = [line.rsplit(",", 1) for line in driver_answer.splitlines() if line.strip()]
    kinds = sorted({name.strip() for name, _ in lines})
    if len(kinds) != 1:
        raise FleetError(
            f"this machine has GPUs of {len(kinds)} kinds ({', '.join(kinds)}), and a fleet has one",
            "Name the fleet instead, such as 1xRTX4090, and choose its GPUs with CUDA_VISIBLE_DEVICES when it runs.",
        )
    mebibytes = float(lines[0][1])
    gpu = gpu_of_driver(kinds[0], book.gpus.values())
    if gpu is None:
        raise FleetError(
            f"the driver calls this machine's GPU {kinds[0]!r} ({mebibytes / 1024:.1f} GiB), which no entry knows",
            f"Put it into a fleets file with driver_names: [{kinds[0]}] (--fleets FILE, see docs/fleets.md).",
        )
    # the driver counts what it keeps for itself, so it may only lower the figure of the table
    gpu = gpu.model_copy(update={"memory_gib": min(gpu.memory_gib, mebibytes / 1024)})
    count = int(node.gpus)
    return Fleet("this machine", 1, count, gpu, gpu.network_gb_s, node.memory_gib / count)


def of_cpus(node: Node, workers: int, flops: float) -> Fleet:
    """The fleet of a node without GPUs.

    Args:
        workers: processes that share it.
        flops: matrix operations a second of all its cores together.
    """
    share = 1 / workers
    gpu = Gpu(
        name=f"CPU ({node.cpus * share:g} of {node.cpus:g} cores)" if workers > 1 else f"CPU ({node.cpus:g} cores)",
        memory_gib=node.memory_gib * share,
        tflops=flops * share / 1e12,
        memory_gb_s=CPU_MEMORY_GB_S * share,
        link_gb_s=CPU_MEMORY_GB_S * share / 2,  # a message is written once and read once
        host_gb_s=CPU_MEMORY_GB_S * share,
        link="memory",
        usd_per_hour=None,
    )
    return Fleet("this machine", 1, workers, gpu, gpu.network_gb_s, node.memory_gib * share)


def measured_flops(seconds: float = 0.2) -> float:
    """Operations a second that a large fp32 matrix product reaches on all cores: the best of a few."""
    import numpy as np

    size, best, end = 768, 0.0, time.perf_counter() + seconds
    left, right = np.ones((size, size), np.float32), np.ones((size, size), np.float32)
    np.matmul(left, right)  # the first one starts the threads
    while not best or time.perf_counter() < end:
        start = time.perf_counter()
        np.matmul(left, right)
        best = max(best, 2 * size**3 / (time.perf_counter() - start))
    return best


def _driver_answer() -> str:
    command = ["nvidia-smi", "--query-gpu=name,memory.total", "--format=csv,noheader,nounits"]
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=30, check=True).stdout
    except (OSError, subprocess.SubprocessError) as error:
        raise FleetError(
            f"this machine has GPUs, but nvidia-smi does not say which: {error}",
            "Name the fleet, such as 1xRTX4090, or mend the driver.",
        ) from None
