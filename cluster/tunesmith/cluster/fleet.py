"""Fleets: which GPUs, how many, how they are joined. Plain numbers for the planner; nothing here touches a GPU.

A fleet is written `8xH100-80GB` (one node) or `2x8xA100-80GB` (two), named in a file of the user's, or `this machine`.
"""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from pydantic import BaseModel, ConfigDict, NonNegativeFloat, PositiveFloat, PositiveInt

from tunesmith.cluster.errors import FleetError

GIB = 2**30
MOST_GPUS = 16_384
"""Of a fleet: as many as the largest runs whose throughput is published; no figure here is checked beyond."""
THIS_MACHINE = ("this machine", "this-machine", "here", "local")


class _Table(BaseModel):
    """Strict, immutable entry of a fleets file."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, strict=True, use_attribute_docstrings=True, allow_inf_nan=False
    )


class GpuFigures(_Table):
    """One device and the links it hangs on. Rates are published peaks, of which programs reach a part."""

    memory_gib: PositiveFloat
    """What the driver gives a program, in GiB; less than the figure on the box."""
    tflops: PositiveFloat
    """10^12 dense matrix operations a second with 16-bit inputs and fp32 sums."""
    memory_gb_s: PositiveFloat
    """Memory bandwidth in 10^9 bytes a second."""
    link_gb_s: PositiveFloat
    """To the other GPUs of its node, in 10^9 bytes a second and one direction."""
    host_gb_s: PositiveFloat
    """To host memory, in 10^9 bytes a second and one direction."""
    link: str = "pcie"
    """What joins the GPUs of a node: nvlink, infinity fabric, pcie or memory."""
    bf16: bool = True
    """Whether it computes in bf16; without, `tflops` is for fp16."""
    network_gb_s: PositiveFloat = 12.5
    """Of a node with such GPUs, in 10^9 bytes a second and one direction, for fleets that do not say."""
    most_per_node: PositiveInt = 16
    """GPUs in the largest node there is."""
    usd_per_hour: NonNegativeFloat | None = None
    """Price of one for an hour. None prices nothing."""
    also: list[str] = []
    """Other names."""
    driver_names: list[str] = []
    """What `nvidia-smi` calls it."""

    @property
    def memory_bytes(self) -> int:
        return int(self.memory_gib * GIB)

    @property
    def flops(self) -> float:
        """Peak operations a second."""
        return self.tflops * 1e12

    @property
    def is_cpu(self) -> bool:
        return self.link == "memory"


class Gpu(GpuFigures):
    """A device with its name."""

    name: str
    """How fleets name it."""


class FleetShape(_Table):
    """A named fleet of a fleets file."""

    gpu: str
    """Name of the GPU."""
    nodes: PositiveInt = 1
    """Machines."""
    gpus_per_node: PositiveInt = 1
    """GPUs in each."""
    network_gb_s: PositiveFloat | None = None
    """Between nodes, of one node, in 10^9 bytes a second and one direction. None takes the GPU's usual one."""
    host_memory_gib: PositiveFloat | None = None
    """Host memory of one node that training may use, in GiB. None is unknown."""
    usd_per_gpu_hour: NonNegativeFloat | None = None
    """Price. None takes the GPU's."""


@dataclass(frozen=True)
class Fleet:
    """Equal nodes with equal GPUs. On CPUs a `gpu` is one worker's share of the machine."""

    name: str
    nodes: int
    gpus_per_node: int
    gpu: Gpu
    network_gb_s: float
    """Between nodes, of one node, in 10^9 bytes a second and one direction."""
    host_memory_gib_per_gpu: float | None = None
    """None is unknown."""

    @property
    def gpus(self) -> int:
        return self.nodes * self.gpus_per_node

    @property
    def collective_bytes_s(self) -> float:
        """Peak rate of a collective over all GPUs: a ring is as fast as its slowest hop.

        Every byte of a ring over several nodes leaves each node once, through that node's whole network; inside a node
        each GPU sends it on over its own link.
        """
        links = [self.gpu.link_gb_s] if self.gpus_per_node > 1 or self.nodes == 1 else []
        networks = [self.network_gb_s] if self.nodes > 1 else []
        return min(links + networks) * 1e9

    @property
    def usd_per_hour(self) -> float | None:
        """Of the whole fleet."""
        return None if self.gpu.usd_per_hour is None else self.gpu.usd_per_hour * self.gpus


@dataclass(frozen=True)
class FleetBook:
    """The GPUs that are known and the fleets that have names."""

    gpus: Mapping[str, Gpu]
    fleets: Mapping[str, FleetShape] = field(default_factory=dict)


def parse_fleet(text: str, extra: FleetBook | None = None, workers: int = 1) -> Fleet:
    """The fleet that a text names: `8xH100-80GB`, `2x8xA100-80GB`, `L40S`, a name of the user's, or `this machine`.

    Args:
        text: as a user writes it; case, dashes and blanks do not matter, nor does a memory size that leaves no doubt.
        extra: known GPUs and named fleets, from `fleet_file.load_fleets`; None takes the table that comes with Tunesmith.
        workers: processes that share the memory and cores of `this machine` when it has no GPU.

    Raises:
        FleetError: no such GPU (with the nearest names), a name that fits two, or a shape that no machine has.
    """
    if extra is None:
        from tunesmith.cluster.fleet_file import load_fleets

        extra = load_fleets()
    written = " ".join(text.split())
    named = {name.lower(): name for name in extra.fleets}
    if written.lower() in named:
        return _named_fleet(named[written.lower()], extra)
    if written.lower() in THIS_MACHINE:
        from tunesmith.cluster.fleet_machine import this_fleet

        return this_fleet(extra, workers)
    match = re.fullmatch(r"(?:(-?\d+)\s*[x×*]\s*)?(?:(-?\d+)\s*[x×*]\s*)?(\S.*)", written, re.IGNORECASE)
    if not match:
        raise FleetError("a fleet is empty", "Write one like 8xH100-80GB, 2x8xA100-80GB or `this machine`.")
    first, second, name = match.groups()
    nodes, per_node = (int(first), int(second)) if second else (1, int(first or 1))
    gpu = find_gpu(name, extra)
    _check_shape(written, nodes, per_node, gpu)
    return Fleet(_shown(nodes, per_node, gpu.name), nodes, per_node, gpu, gpu.network_gb_s)


def find_gpu(name: str, book: FleetBook) -> Gpu:
    """The GPU of this name.

    Raises:
        FleetError: there is none, or several of different memory; the message names the nearest, or all of them.
    """
    wanted = _plain(name)
    whole = {_plain(other): gpu for gpu in book.gpus.values() for other in [*gpu.also, gpu.name]}
    if wanted in whole:
        return whole[wanted]
    fitting = [gpu for gpu in book.gpus.values() if wanted == _plain(_without_memory(gpu.name))]
    if len(fitting) == 1:
        return fitting[0]
    if fitting:
        names = " or ".join(gpu.name for gpu in fitting)
        raise FleetError(f"{name} is made in {len(fitting)} sizes of memory", f"Write {names}.")
    near = difflib.get_close_matches(wanted, whole, n=3, cutoff=0.5)
    names = list(dict.fromkeys(whole[key].name for key in near)) or list(book.gpus)
    raise FleetError(
        f"no GPU is known as {name}",
        f"{'Did you mean ' + ' or '.join(names) + '?' if near else 'Known are ' + ', '.join(names) + '.'} "
        "A GPU of your own goes into a fleets file (--fleets FILE, see docs/fleets.md).",
    )


def gpu_of_driver(driver_name: str, gpus: Iterable[Gpu]) -> Gpu | None:
    """The GPU that the driver reports under this name, or None."""
    return next((gpu for gpu in gpus if driver_name in gpu.driver_names), None)


def _named_fleet(name: str, book: FleetBook) -> Fleet:
    shape = book.fleets[name]
    gpu = find_gpu(shape.gpu, book)
    if shape.usd_per_gpu_hour is not None:
        gpu = gpu.model_copy(update={"usd_per_hour": shape.usd_per_gpu_hour})
    _check_shape(name, shape.nodes, shape.gpus_per_node, gpu)
    host = shape.host_memory_gib / shape.gpus_per_node if shape.host_memory_gib else None
    network = shape.network_gb_s or gpu.network_gb_s
    return Fleet(name, shape.nodes, shape.gpus_per_node, gpu, network, host)


def _check_shape(written: str, nodes: int, per_node: int, gpu: Gpu) -> None:
    if nodes < 1 or per_node < 1:
        raise FleetError(f"{written}: {nodes} nodes × {per_node} GPUs is no fleet", f"Write 1x{gpu.name} or more.")
    if per_node > gpu.most_per_node:
        enough = math.ceil(per_node * nodes / gpu.most_per_node)
        raise FleetError(
            f"{written}: {per_node} {gpu.name} in one node, and the largest there is holds {gpu.most_per_node}",
            f"Write {_shown(enough, gpu.most_per_node, gpu.name)} for {enough} nodes, or raise most_per_node of "
            f"{gpu.name} in a fleets file.",
        )
    if nodes * per_node > MOST_GPUS:
        raise FleetError(
            f"{written}: {nodes} nodes × {per_node} = {nodes * per_node} GPUs, more than the {MOST_GPUS} "
            "that the largest runs with published throughput had",
            f"Write at most {_shown(MOST_GPUS // per_node, per_node, gpu.name)}.",
        )


def _shown(nodes: int, per_node: int, name: str) -> str:
    return f"{nodes}x{per_node}x{name}" if nodes > 1 else f"{per_node}x{name}"


def _plain(name: str) -> str:
    """A name without what people write differently: case, blanks, dashes, makers, sockets, the unit of memory."""
    plain = re.sub(r"([\s_\-]\d+)\s*gi?b?$", r"\1", name.lower())
    plain = re.sub(r"[\s_\-]+", "", plain)
    plain = re.sub(r"^(nvidia|amd)?(geforce|tesla|instinct)?(rtx(?=a?\d))?", "", plain)
    return re.sub(r"sxm\d?", "", plain)


def _without_memory(name: str) -> str:
    return re.sub(r"-\d+GB$", "", name)
