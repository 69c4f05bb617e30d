"""Findings about what is installed on each machine, and whether all machines have the same."""

from __future__ import annotations

from collections.abc import Iterator

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from tunesmith.cluster.doctor.facts import Facts, Machine
from tunesmith.cluster.doctor.finding import Finding, failure, ok, skipped, warning

SAME_EVERYWHERE = ("tunesmith", "ray", "torch", "deepspeed")
"""What one process hands to another of its kind: pickled functions, collectives, shards."""
INSTALL = "Install the pinned set there: pip install --no-deps -r requirements/{}.lock, then tunesmith itself."
OPEN_FILES, FEWEST_OPEN_FILES = 4096, 1024
"""Ray warns of its own accord below the first; a process with many workers or shards comes to the second."""
DRIVER_OF_CUDA = {11: "450.80.02", 12: "525.60.13", 13: "580.65.06"}
"""The oldest driver for each major version of CUDA on Linux (NVIDIA, CUDA Compatibility, minor version compatibility)."""


def python(facts: Facts) -> Iterator[Finding]:
    """Python is one that Tunesmith runs on, and the same minor version everywhere: functions travel pickled."""
    ours = _minor(facts.driver)
    for machine in facts.machines:
        said = f"Python {machine.python}"
        if machine.python not in SpecifierSet(facts.requires_python):
            yield failure(
                "python",
                machine.name,
                f"{said}, and Tunesmith needs {facts.requires_python}",
                f"Install a Python that is {facts.requires_python}.",
            )
        elif _minor(machine) != ours:
            fix = f"Install Python {ours} there, or start the command from a machine with {_minor(machine)}."
            yield failure("python", machine.name, f"{said}, and the driver has {facts.driver.python}", fix)
        else:
            yield ok("python", machine.name, said)


def versions(facts: Facts) -> Iterator[Finding]:
    """Every library is there, within the range that the installed Tunesmith asks for, and as on the driver."""
    for machine in facts.machines:
        fix = INSTALL.format("gpu" if machine.gpu_devices else "cpu")
        wrong = list(_out_of_range(facts, machine))
        if wrong:
            yield failure("versions", machine.name, "; ".join(wrong), fix)
        else:
            yield ok("versions", machine.name, f"{len(facts.requirements)} requirements of Tunesmith are met")
    for machine in facts.nodes:
        ours = facts.driver.versions
        other = {name: has for name, has in machine.versions.items() if has and ours.get(name) and has != ours[name]}
        told = "; ".join(f"{name} {has}, and the driver has {ours[name]}" for name, has in other.items())
        fix = "Install the same set on all machines, from one lock file of requirements/."
        if any(name in SAME_EVERYWHERE for name in other):
            yield failure("same versions", machine.name, told, fix)
        elif other:
            yield warning("same versions", machine.name, told, fix)
        else:
            yield ok("same versions", machine.name, "as on the driver")


def compilers(facts: Facts) -> Iterator[Finding]:
    """What DeepSpeed compiles at first use can be compiled: its operators for CPUs, and with CUDA those for GPUs."""
    for machine in facts.machines:
        bad = False
        if machine.compiler_error:
            bad = True
            what = f"{machine.compiler} does not compile an extension of Python: {machine.compiler_error}"
            fix = "Install g++ and Python's headers (on Debian: apt-get install g++ python3-dev), or set CXX."
            yield failure("compilers", machine.name, what, fix)
        if not machine.ninja:
            bad = True
            what = "ninja is not on the path, and PyTorch compiles extensions with nothing else"
            yield failure("compilers", machine.name, what, "pip install ninja, and put its folder on PATH.")
        if machine.torch and machine.torch.cuda and not machine.torch.error:
            for finding in _cuda_compiler(machine.name, machine.torch.cuda, machine.torch.nvcc, facts.offload):
                bad = True
                yield finding
        if not bad:
            yield ok("compilers", machine.name, f"{machine.compiler} compiles an extension; ninja is there")


def open_files(facts: Facts) -> Iterator[Finding]:
    """A process may hold enough files open."""
    fix = f"Raise it: ulimit -n {16 * OPEN_FILES} where Ray is started, LimitNOFILE of its service, or limits.conf."
    for machine in facts.machines:
        limit = machine.open_files
        if limit < FEWEST_OPEN_FILES:
            what = f"a process may open {limit} files, fewer than {FEWEST_OPEN_FILES}"
            yield failure("open files", machine.name, what, fix)
        elif limit < OPEN_FILES:
            what = f"a process may open {limit} files, and Ray wants {OPEN_FILES}"
            yield warning("open files", machine.name, what, fix)
        else:
            yield ok("open files", machine.name, f"a process may open {limit} files")


def drivers(facts: Facts) -> Iterator[Finding]:
    """The driver describes its GPUs, torch is built for them and can use all, and the driver is new enough."""
    for machine in facts.machines:
        if not machine.gpu_devices and not machine.gpus:
            what = machine.driver_error and f"no GPU: nvidia-smi says {machine.driver_error!r}"
            yield skipped("drivers", machine.name, what or "no GPU")
        else:
            yield from _driver(machine)


def _driver(machine: Machine) -> Iterator[Finding]:
    torch, name = machine.torch, machine.name
    if machine.driver_error:
        fix = "Reinstall the NVIDIA driver, or reboot if it was updated; nvidia-smi has to answer."
        what = f"the kernel shows {machine.gpu_devices} GPUs, and nvidia-smi fails: {machine.driver_error}"
        yield failure("drivers", name, what, fix)
    elif torch is None or torch.error:
        what = f"torch cannot be asked about GPUs: {torch.error if torch else 'it was not'}"
        yield failure("drivers", name, what, INSTALL.format("gpu"))
    elif torch.cuda is None:
        what = f"{len(machine.gpus)} GPUs, and a torch built for CPUs ({machine.versions.get('torch')})"
        yield failure("drivers", name, what, INSTALL.format("gpu"))
    else:
        driver, oldest = machine.gpus[0].driver, DRIVER_OF_CUDA.get(int(torch.cuda.partition(".")[0]), "0")
        if _numbers(driver) < _numbers(oldest):
            what = f"driver {driver} is too old for CUDA {torch.cuda}, which needs {oldest} or newer"
            yield failure(
                "drivers", name, what, f"Install NVIDIA driver {oldest} or newer, or a torch for an older CUDA."
            )
        elif torch.devices < len(machine.gpus):
            what = f"the driver has {len(machine.gpus)} GPUs, and torch can use {torch.devices}"
            fix = (
                "Look at `dmesg | grep -i nvrm` and `nvidia-smi -q`; the fabric manager runs where GPUs have NVSwitch."
            )
            yield failure("drivers", name, what, fix)
        else:
            yield ok("drivers", name, f"driver {driver}, CUDA {torch.cuda}, torch uses {torch.devices} GPUs")


def _out_of_range(facts: Facts, machine: Machine) -> Iterator[str]:
    for line in facts.requirements:
        requirement = Requirement(line)
        has = machine.versions.get(requirement.name)
        if has is None:
            yield f"{requirement.name} is not installed"
        elif not requirement.specifier.contains(has, prereleases=True):
            yield f"{requirement.name} {has}, and Tunesmith needs {requirement.specifier}"


def _cuda_compiler(where: str, cuda: str, nvcc: str | None, offload: bool) -> Iterator[Finding]:
    fix = f"Install the CUDA {cuda} toolkit and set CUDA_HOME to its folder."
    if nvcc is not None and nvcc.partition(".")[0] == cuda.partition(".")[0]:
        return
    has = "there is no nvcc" if nvcc is None else f"nvcc is of CUDA {nvcc}"
    what = f"{has}, and torch was built for CUDA {cuda}; DeepSpeed compiles its optimizer for offloading with it"
    # nothing else that a run needs is compiled with nvcc
    yield (failure if offload else warning)("compilers", where, what, fix)


def _minor(machine: Machine) -> str:
    return ".".join(machine.python.split(".")[:2])


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.split(".") if part.isdigit())
