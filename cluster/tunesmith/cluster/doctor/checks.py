"""Every check, in the order in which it is shown."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from tunesmith.cluster.doctor import between, hardware, software
from tunesmith.cluster.doctor.facts import Facts
from tunesmith.cluster.doctor.finding import Finding, merged

CHECKS: tuple[Callable[[Facts], Iterator[Finding]], ...] = (
    between.address,
    software.python,
    software.versions,
    software.drivers,
    hardware.gpus,
    hardware.resources,
    hardware.disks,
    software.compilers,
    software.open_files,
    between.storage,
    between.clocks,
    between.network,
    between.token,
    between.listeners,
)


def findings(facts: Facts) -> list[Finding]:
    """What is to be said of the facts. Decides everything, and looks at nothing else."""
    return merged(finding for check in CHECKS for finding in check(facts))
