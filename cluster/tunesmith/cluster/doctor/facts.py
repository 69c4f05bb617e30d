"""What the probes saw. Findings are decided from this alone, so that every one of them is tested on plain values."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict

from tunesmith.cluster.resources import Need, Node


class Fact(BaseModel):
    """Something that was seen; never changed afterwards."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)


class Gpu(Fact):
    """One GPU, as its driver describes it."""

    uuid: str
    name: str
    memory_mib: float
    used_mib: float
    """Memory that somebody holds, in MiB."""
    driver: str
    """Version of the driver."""
    ecc_errors: int | None = None
    """Uncorrected memory errors since the driver was loaded. None where the GPU does not count them."""
    processes: list[str] = []
    """Who computes on it, as `name (pid 123)`."""


class Torch(Fact):
    """What a process that imports torch gets."""

    cuda: str | None = None
    """The CUDA it was built for; None for a build for CPUs."""
    devices: int = 0
    """GPUs that it can use."""
    nccl: str | None = None
    """Version of NCCL in this build."""
    nvcc: str | None = None
    """Version of the CUDA compiler that extensions are compiled with; None when there is none."""
    cuda_home: str | None = None
    """Where it looks for that compiler."""
    error: str = ""
    """Why torch could not be asked."""


class Disk(Fact):
    """A file system."""

    kind: str
    """`output`, `temporary` or `shared memory`."""
    path: str
    total_bytes: int
    free_bytes: int
    """What this user may still write."""


class Listener(Fact):
    """A port that one of Ray's processes listens on."""

    process: str
    pid: int
    address: str
    port: int


class Machine(Fact):
    """What one machine is and has."""

    name: str
    """How messages name it: `this machine`, or `node` with its address."""
    python: str
    versions: dict[str, str | None]
    """Of every library that was asked for; None when it is not installed."""
    gpu_devices: int
    """GPUs that the kernel shows."""
    gpus: list[Gpu]
    driver_error: str = ""
    """Why the driver did not describe its GPUs."""
    torch: Torch | None = None
    """None where there is no GPU, and torch was not asked."""
    disks: list[Disk]
    compiler: str
    """The C++ compiler that extensions are compiled with."""
    compiler_error: str = ""
    """What it said of a small extension; empty when it compiled."""
    ninja: bool
    """Whether ninja is on the path."""
    open_files: int
    """How many files a process may hold open."""
    auth_mode: str
    """RAY_AUTH_MODE of the process that looked; empty when it is not set."""
    token_path: str
    """Where the file of Ray's token would be."""
    token_mode: int | None = None
    """Permission bits of that file; None when it is not there."""
    token_open: bool = False
    """Whether others than its owner may read it, the folders above it considered."""
    listeners: list[Listener]
    """Of Ray's processes."""


class Volume(Fact):
    """What one machine saw of the folder that runs are written to."""

    machine: str
    error: str = ""
    """What reading or writing ended with."""
    reads_ours: bool | None = None
    """Whether it read what the driver wrote. None for the driver itself."""
    we_read: bool | None = None
    """Whether the driver read what it wrote."""
    sees_lock: bool | None = None
    """Whether it was refused a lock that the driver held."""
    write_mb_s: float | None = None
    """10^6 bytes a second, the fsync included."""
    read_mb_s: float | None = None
    """10^6 bytes a second, after the pages of this machine's memory were let go."""


class Clock(Fact):
    """How far one machine's clock is from the driver's."""

    machine: str
    offset_s: float
    """Its time less ours."""
    uncertainty_s: float
    """Half of the shortest round trip: the offset is right within this."""


class Exchange(Fact):
    """An all-reduce between the nodes, one process on each."""

    backend: str
    """`nccl` or `gloo`."""
    machines: list[str]
    bytes: int
    """Of the tensor."""
    seconds: float | None = None
    """Of one all-reduce: the median of several on the slowest machine."""
    error: str = ""
    """Why it was not measured."""

    @property
    def gb_s(self) -> float | None:
        """10^9 bytes a second that each machine sends and receives: 2 (n-1) / n of the tensor in an all-reduce."""
        if self.seconds is None:
            return None
        n = len(self.machines)
        return self.bytes * 2 * (n - 1) / n / self.seconds / 1e9


class Facts(Fact):
    """Everything that was seen."""

    requirements: list[str]
    """What the installed Tunesmith asks for, as in `torch<2.14,>=2.13`."""
    requires_python: str
    driver: Machine
    """The machine that this command runs on."""
    address: str | None = None
    """The cluster that was asked about; None when there is none."""
    address_error: str = ""
    """Why it could not be joined."""
    loopback: bool = True
    """Whether all nodes are on this machine's loopback interface."""
    nodes: list[Machine] = []
    silent: dict[str, str] = {}
    """Nodes that could not be asked, and why."""
    resources: list[Node] = []
    """What each node, or this machine, has for us."""
    need: Need | None = None
    """What the recipe's workers ask for."""
    offload: bool = False
    """Whether the recipe has optimizer state or weights rest on the CPU or on a disk."""
    dashboard: tuple[str, int] | None = None
    """The dashboard's address, and the HTTP status of its jobs for somebody without the token."""
    volumes: list[Volume] = []
    clocks: list[Clock] = []
    exchange: Exchange | None = None
    """None where there are fewer than two nodes."""

    @property
    def machines(self) -> list[Machine]:
        """All that could be asked; the driver's machine among them."""
        return [self.driver, *self.nodes]
