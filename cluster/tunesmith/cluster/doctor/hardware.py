"""Findings about GPUs and disks."""

from __future__ import annotations

from collections.abc import Iterator

from tunesmith.cluster.doctor.facts import Disk, Facts
from tunesmith.cluster.doctor.finding import Finding, failure, ok, skipped, warning
from tunesmith.cluster.errors import ResourceError
from tunesmith.cluster.resources import GIB, require_resources

HELD_MIB = 1024
"""Memory that somebody may hold on an idle GPU: a display, a context or two."""
LEAST_FREE = {"output": 1, "temporary": 1, "shared memory": 0.125}
"""GiB without which nothing goes: checkpoints and spilled objects; Docker's 64 MiB of shared memory, below the 75 MiB that
Ray's object store takes at the least."""
FREE = {"output": 10, "temporary": 5, "shared memory": 1}
"""GiB below which it may not last: a checkpoint of all weights and moments has 14 GB for 10^9 parameters."""
RAY_FULL = 0.95
"""Ray makes no more objects on a disk that is fuller than this (local_fs_capacity_threshold)."""
MORE_SHARED = (
    "Give the container more shared memory: docker run --shm-size=16g; in Kubernetes an emptyDir of medium Memory."
)
MORE_SPACE = {
    "output": "Free some space, or put output.dir on a larger disk.",
    "temporary": "Free some space, or set TMPDIR to a folder on a larger disk before Ray is started.",
    "shared memory": MORE_SHARED,
}


def resources(facts: Facts) -> Iterator[Finding]:
    """The recipe's workers have room on the machines."""
    where = "cluster" if facts.nodes else facts.driver.name
    if facts.need is None:
        yield skipped("resources", where, "no recipe was given")
        return
    if facts.address_error:
        yield skipped("resources", "cluster", "what it has is not known: it could not be joined")
        return
    need = facts.need
    try:
        require_resources(need, facts.resources)
    except ResourceError as error:
        yield failure("resources", where, error.what, error.fix)
    else:
        yield ok("resources", where, f"{need} {'has' if need.workers == 1 else 'have'} room")


def gpus(facts: Facts) -> Iterator[Finding]:
    """GPUs have no memory errors, nobody else computes on them, and all nodes have the same."""
    machines = facts.nodes or [facts.driver]
    for machine in machines:
        if not machine.gpus:
            yield skipped("gpus", machine.name, "no GPU")
            continue
        bad = False
        for number, gpu in enumerate(machine.gpus):
            label = f"GPU {number} ({gpu.name})"
            if gpu.ecc_errors:
                bad = True
                what = f"{label}: {gpu.ecc_errors} uncorrected memory errors since its driver was loaded"
                fix = f"Take the node out and reset it (nvidia-smi -r -i {number}); have the GPU replaced if they come back."
                yield failure("gpus", machine.name, what, fix)
            if gpu.processes or gpu.used_mib > HELD_MIB:
                bad = True
                who = ", ".join(gpu.processes) or "processes that the driver does not name here"
                what = f"{label}: {gpu.used_mib:.0f} of {gpu.memory_mib:.0f} MiB are held by {who}"
                yield warning("gpus", machine.name, what, "Wait for them or end them, unless they are a run of yours.")
        if not bad:
            yield ok("gpus", machine.name, f"{_shown([gpu.name for gpu in machine.gpus])}: idle, no memory errors")
    yield from _same_gpus(facts)


def disks(facts: Facts) -> Iterator[Finding]:
    """There is room for checkpoints, for Ray's files and for shared memory."""
    for machine in facts.machines:
        for disk in machine.disks:
            yield _disk(machine.name, disk)


def _disk(where: str, disk: Disk) -> Finding:
    free, total = disk.free_bytes / GIB, disk.total_bytes / GIB
    what = f"{disk.kind} ({disk.path}): {free:.3g} of {total:.3g} GiB free"
    fix = MORE_SPACE[disk.kind]
    if free < LEAST_FREE[disk.kind]:
        return failure("disks", where, f"{what}, less than {LEAST_FREE[disk.kind]:g} GiB", fix)
    if disk.kind == "temporary" and 1 - disk.free_bytes / disk.total_bytes > RAY_FULL:
        return failure(
            "disks", where, f"{what}: more than {RAY_FULL:.0%} full, so Ray makes no more objects there", fix
        )
    if free < FREE[disk.kind]:
        return warning("disks", where, f"{what}, less than {FREE[disk.kind]:g} GiB", fix)
    return ok("disks", where, what)


def _same_gpus(facts: Facts) -> Iterator[Finding]:
    having = [machine for machine in facts.nodes if machine.gpus]
    if len(having) < 2:
        return
    kinds = {machine.name: _shown([gpu.name for gpu in machine.gpus]) for machine in having}
    drivers = {machine.name: machine.gpus[0].driver for machine in having}
    nccls = {machine.name: machine.torch.nccl for machine in having if machine.torch and machine.torch.nccl}
    if len(set(kinds.values())) > 1:
        what = "; ".join(f"{name}: {kind}" for name, kind in kinds.items())
        fix = "Workers wait for the slowest: run on nodes of one kind, or set cluster.workers to fit those."
        yield warning("same gpus", "cluster", what, fix)
    if len(set(drivers.values())) > 1:
        what = "; ".join(f"{name}: driver {version}" for name, version in drivers.items())
        yield warning("same gpus", "cluster", what, "Install one version of the driver on all nodes.")
    if len(set(nccls.values())) > 1:
        what = "; ".join(f"{name}: NCCL {version}" for name, version in nccls.items())
        fix = "NCCL talks to its own version only: " + "install the same torch on all nodes (requirements/gpu.lock)."
        yield failure("same gpus", "cluster", what, fix)
    if all(len(set(seen.values())) <= 1 for seen in (kinds, drivers, nccls)):
        nccl = f", NCCL {next(iter(nccls.values()))}" if nccls else ""
        yield ok("same gpus", "cluster", f"{len(having)} nodes of {kinds[having[0].name]}{nccl}")


def _shown(names: list[str]) -> str:
    return ", ".join(f"{names.count(name)} × {name}" for name in dict.fromkeys(names))
