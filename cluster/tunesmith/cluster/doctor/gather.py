"""Gathers the facts: of this machine, and of a cluster's nodes where there is one."""

from __future__ import annotations

import contextlib
import fcntl
import os
import secrets
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from importlib.metadata import PackageNotFoundError, metadata, requires
from ipaddress import ip_address
from pathlib import Path
from typing import TYPE_CHECKING

import httpx
from packaging.requirements import Requirement

from tunesmith.cluster.doctor import probe
from tunesmith.cluster.doctor.facts import Facts, Machine, Volume
from tunesmith.cluster.errors import ResourceError
from tunesmith.cluster.recipe.schema import Recipe
from tunesmith.cluster.resources import needs, this_machine
from tunesmith.cluster.session import RaySession

if TYPE_CHECKING:
    from tunesmith.cluster.doctor.census import Census

HERE = "this machine"
MEASURED_BYTES = 64 * 2**20
"""Enough that a second's fraction is measured, and little enough to be written anywhere."""
HTTP_PATIENCE_S = 5.0

Tell = Callable[[str], None]


def gather(address: str | None, folder: Path, recipe: Recipe | None, tell: Tell) -> Facts:
    """Looks at this machine, and at the cluster at `address`, which may be `local`: a Ray of our own, started for this.

    Args:
        folder: where runs are written.
        recipe: whose needs are compared with what there is.
        tell: hears what is being done.
    """
    wanted, requires_python = requirements()
    libraries = [Requirement(line).name for line in wanted]
    facts = Facts(
        requirements=wanted,
        requires_python=requires_python,
        driver=Machine.model_validate(probe.look(HERE, libraries, str(folder), "")),
        address=address,
        resources=[this_machine()],
        offload=recipe is not None and recipe.cluster.offload != "none",
    )
    if address is None:
        with scratch(folder) as (shared, error):
            facts = facts.model_copy(update={"volumes": [_here(shared, error)]})
    else:
        with RaySession(address) as session:
            facts = _ask_cluster(session, facts, libraries, folder, tell)
    need = None
    if recipe is not None:  # an elastic run begins with the fewest
        need = replace(needs(recipe.cluster, facts.resources), workers=recipe.cluster.fewest_workers)
    return facts.model_copy(update={"need": need})


def requirements() -> tuple[list[str], str]:
    """What the installed Tunesmith asks for, and of Python. An extra counts when its library is there.

    Tunesmith itself is the first, so that a machine where it is not installed is said to lack it.
    """
    try:
        wanted = [Requirement(line) for line in requires("tunesmith") or []]
        python = metadata("tunesmith")["Requires-Python"]
    except PackageNotFoundError:
        return ["tunesmith"], ""
    found = ["tunesmith"]
    for one in wanted:
        if one.marker is None or one.marker.evaluate({"extra": ""}) or probe.version_of(one.name):
            found.append(f"{one.name}{one.specifier}")
    return found, python


@contextlib.contextmanager
def scratch(folder: Path) -> Iterator[tuple[Path, str]]:
    """A folder of our own below the output folder, gone afterwards with whatever was made for it; or why there is none."""
    made = [one for one in (folder, *folder.parents) if not one.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        shared = Path(tempfile.mkdtemp(prefix=".tunesmith-doctor-", dir=folder))
        shared.chmod(0o777)  # a cluster's nodes may run as another user
    except OSError as error:
        yield folder, f"{error.filename or folder}: {error.strerror or error}"
        return
    try:
        yield shared, ""
    finally:
        shutil.rmtree(shared, ignore_errors=True)
        for one in made:
            with contextlib.suppress(OSError):  # something else lives there by now
                one.rmdir()


def _here(shared: Path, error: str) -> Volume:
    measured = {"error": error} if error else probe.measure_storage(str(shared), "here", MEASURED_BYTES)
    return Volume.model_validate({"machine": HERE, **measured})


def _ask_cluster(session: RaySession, facts: Facts, libraries: Sequence[str], folder: Path, tell: Tell) -> Facts:
    tell(f"joining {facts.address}")
    try:
        resources = session.nodes()
    except ResourceError as error:
        return facts.model_copy(update={"address_error": error.what})
    from tunesmith.cluster.doctor.census import Census

    with Census() as census:
        tell(f"looking at {len(census.addresses)} nodes")
        nodes = census.machines(list(libraries), str(folder))
        tell("writing and reading the output folder")
        with scratch(folder) as (shared, error):
            volumes = [Volume(machine=HERE, error=error)] if error else _volumes(census, shared)
        tell("reading clocks, and exchanging tensors between the nodes")
        with_gpus = [node for node in nodes if node.gpus and node.torch and node.torch.cuda]
        return facts.model_copy(
            update={
                "nodes": nodes,
                "silent": census.silent,
                "resources": resources,
                "loopback": all(ip_address(address).is_loopback for address in census.addresses.values()),
                "dashboard": _dashboard(census.dashboard()),
                "volumes": volumes,
                "clocks": census.clocks(),
                "exchange": census.exchange(cuda=len(with_gpus) > 1),
            }
        )


def _volumes(census: Census, shared: Path) -> list[Volume]:
    """What each node saw of our file and our lock, and whether what it wrote is here."""
    nonce = secrets.token_hex(16)
    probe.write_durably(shared / "driver", nonce.encode())
    with open(shared / "lock", "wb") as lock:
        os.fchmod(lock.fileno(), 0o666)
        fcntl.flock(lock, fcntl.LOCK_EX)
        seen, answers = census.readings(str(shared), nonce)
    measured = census.speeds(str(shared), MEASURED_BYTES)
    volumes = []
    for name, saw in seen.items():
        path = shared / answers[name]
        we_read = path.is_file() and path.read_text() == answers[name]
        volumes.append(Volume.model_validate({**measured.get(name, {}), **saw, "machine": name, "we_read": we_read}))
    return volumes


def _dashboard(url: str | None) -> tuple[str, int] | None:
    """What the jobs API answers to somebody without a token; status 0 when nothing answers."""
    if not url:
        return None
    try:
        with httpx.Client(timeout=HTTP_PATIENCE_S, trust_env=False) as client:
            return url, client.get(f"http://{url}/api/jobs/").status_code
    except httpx.TransportError:
        return url, 0
