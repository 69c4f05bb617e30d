"""Findings about what lies between machines: the address, ports, storage, clocks, the network."""

from __future__ import annotations

from collections.abc import Iterator
from ipaddress import ip_address

from tunesmith.cluster.doctor.facts import Facts, Listener, Volume
from tunesmith.cluster.doctor.finding import Finding, failure, ok, skipped, warning

LEAST_GB_S = {"nccl": 1.0, "gloo": 0.1}
"""10^9 bytes a second that a machine must send in an all-reduce. 10 Gbit Ethernet carries 1.25 and NCCL gets most of it over TCP,
so GPUs with less talk over a wrong interface; gigabit Ethernet carries 0.125, and no two machines should have less."""
LEAST_MB_S = 100.0
"""10^6 bytes a second: what one disk, or a file server behind gigabit Ethernet, gives. A checkpoint of all weights and moments
has 14 GB for 10^9 parameters, so with less it takes minutes."""
SKEW_S, MOST_SKEW_S = 1.0, 300.0
"""Clocks that are kept by NTP agree within milliseconds. Kerberos, and NFS with it, refuses those that are five minutes off."""
OPEN_STATUS = 400
"""An HTTP status below is an answer."""
START_WITH_TOKEN = (
    "Make a token (ray get-auth-token --generate), give every node the same, and start Ray with RAY_AUTH_MODE=token."
)


def address(facts: Facts) -> Iterator[Finding]:
    """The cluster can be joined, and every node of it does what it is told."""
    if facts.address_error:
        fix = "Check the address (host:port of the head), the firewall on the way, and the cluster's token in RAY_AUTH_TOKEN or ~/.ray/auth_token."
        yield failure("address", facts.driver.name, facts.address_error, fix)
    elif facts.address is None:
        yield skipped("address", facts.driver.name, "no cluster was named: this machine alone was looked at")
    else:
        nodes = f"{len(facts.nodes)} of {len(facts.nodes) + len(facts.silent)} nodes answer"
        if not facts.silent:
            yield ok("address", facts.driver.name, f"{facts.address} can be joined; {nodes}")
    for name, reason in facts.silent.items():
        fix = "Look at the raylet's log there, and at its memory; take the node out if it stays like that."
        yield failure("address", name, f"no process of ours could look at it: {reason}", fix)


def listeners(facts: Facts) -> Iterator[Finding]:
    """Ray listens on the loopback interface only where that is all that is needed, and never without a token elsewhere."""
    for machine in facts.nodes or [facts.driver]:
        if not machine.listeners:
            yield skipped("listeners", machine.name, "no process of Ray's is seen here")
            continue
        outside = [one for one in machine.listeners if not _is_loopback(one.address)]
        if not outside:
            yield ok("listeners", machine.name, f"{len(machine.listeners)} ports of Ray's, all on loopback addresses")
        elif not facts.nodes:
            what = f"a Ray on this machine listens for others: {_ports(outside)}"
            fix = "End it if it is for this machine alone; else let --address auto look whether it asks for a token."
            yield warning("listeners", machine.name, what, fix)
        elif facts.loopback:
            what = f"the cluster is for this machine alone, and listens for others: {_ports(outside)}"
            fix = "End it, and let Tunesmith start its own, or start it with RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER=0."
            yield failure("listeners", machine.name, what, fix)
        elif machine.auth_mode != "token":
            what = f"{len(outside)} ports of Ray's are open to other machines without a token: {_ports(outside)}"
            yield failure("listeners", machine.name, what, START_WITH_TOKEN)
        else:
            yield ok(
                "listeners", machine.name, f"{len(outside)} ports of Ray's are open to other machines, with a token"
            )


def token(facts: Facts) -> Iterator[Finding]:
    """The cluster wants a token, and nobody else may read it."""
    for machine in facts.nodes:
        if machine.auth_mode == "token":
            yield ok("token", machine.name, "RAY_AUTH_MODE is token")
        else:
            what = f"RAY_AUTH_MODE is {machine.auth_mode or 'not set'}: whoever reaches Ray's ports may run programs"
            yield (warning if facts.loopback else failure)("token", machine.name, what, START_WITH_TOKEN)
    for machine in facts.machines:
        if machine.token_mode is not None and machine.token_open:
            what = (
                f"{machine.token_path} has mode {machine.token_mode:04o}: other users of the machine may read the token"
            )
            yield failure("token", machine.name, what, f"chmod 600 {machine.token_path}")
        elif machine.token_mode is not None:
            yield ok("token", machine.name, "nobody else may read the file of the token")
    if facts.dashboard is not None:
        url, status = facts.dashboard
        if not status:
            fix = "Look at dashboard.log of Ray's session on the head node, and start Ray's head again."
            yield warning("token", "cluster", f"{url}, the cluster's dashboard, does not answer: it takes no jobs", fix)
        elif status < OPEN_STATUS:
            what = f"{url} shows its jobs to anybody (HTTP {status} without a token), and takes new ones"
            yield failure("token", "cluster", what, START_WITH_TOKEN)
        else:
            yield ok("token", "cluster", f"{url} refuses those without a token (HTTP {status})")


def storage(facts: Facts) -> Iterator[Finding]:
    """What one machine writes the others read, locks hold between them, and it is fast enough for checkpoints."""
    for volume in facts.volumes:
        wrong = _unshared(volume)
        if wrong:
            yield failure("storage", volume.machine, *wrong)
        elif volume.reads_ours:
            yield ok("storage", volume.machine, "reads what the driver writes, and the other way; locks hold")
        if volume.write_mb_s is not None and volume.read_mb_s is not None:
            yield _speed(volume.machine, volume.write_mb_s, volume.read_mb_s)


def clocks(facts: Facts) -> Iterator[Finding]:
    """The nodes' clocks agree with the driver's."""
    fix = "Run a time service there (chrony or systemd-timesyncd), and look at `timedatectl`."
    for clock in facts.clocks:
        least = max(0.0, abs(clock.offset_s) - clock.uncertainty_s)
        what = f"{clock.offset_s:+.3g} s from the driver's clock, give or take {clock.uncertainty_s:.2g} s"
        if least > MOST_SKEW_S:
            yield failure("clocks", clock.machine, f"{what}; more than {MOST_SKEW_S:g} s are refused by Kerberos", fix)
        elif least > SKEW_S:
            yield warning("clocks", clock.machine, f"{what}; logs and events of the nodes get out of order", fix)
        else:
            yield ok("clocks", clock.machine, f"within {SKEW_S:g} s of the driver's clock")


def network(facts: Facts) -> Iterator[Finding]:
    """The nodes exchange tensors, fast enough."""
    exchange = facts.exchange
    if exchange is None:
        yield skipped(
            "network", "cluster" if facts.nodes else facts.driver.name, "there are no two nodes to measure between"
        )
        return
    prefix = exchange.backend.upper()
    names = f"{prefix}_SOCKET_IFNAME to the interface that joins the nodes"
    size = f"{exchange.backend}, all-reduce of {exchange.bytes / 2**20:g} MiB over {len(exchange.machines)} nodes"
    if exchange.gb_s is None:
        fix = f"Set {names}, let the nodes reach each other on all ports, and look at NCCL_DEBUG=INFO. With GPUs, wait until one is free."
        yield failure("network", "cluster", f"{size} failed: {exchange.error}", fix)
    elif exchange.gb_s < LEAST_GB_S[exchange.backend]:
        what = f"{size}: {exchange.gb_s:.3g} GB/s, less than {LEAST_GB_S[exchange.backend]:g}"
        fix = f"Set {names}, check that the link has the speed that was paid for (ethtool, ibstat), and measure again when idle."
        yield failure("network", "cluster", what, fix)
    else:
        yield ok("network", "cluster", f"{size}: {exchange.gb_s:.3g} GB/s")


def _unshared(volume: Volume) -> tuple[str, str] | None:
    """What is wrong with a machine's view of the folder, and what to do."""
    mount = "Mount the same file system under the same path on every node, and set output.dir to a folder on it."
    if volume.error and volume.reads_ours is not None and not volume.reads_ours:
        return f"it does not see what the driver writes: {volume.error}", mount
    if volume.error:
        return f"the output folder cannot be used: {volume.error}", "Set output.dir to a folder that may be written."
    if volume.reads_ours is False:
        return "its file of the same name is another one than the driver's", mount
    if volume.we_read is False:
        return "the driver does not read what it writes there", mount
    if volume.sees_lock is False:
        what = "a lock that the driver holds is given to it too, so two commands could write one run"
        return what, "Mount it with locks (NFS: without nolock or local_lock; Lustre: with flock)."
    return None


def _speed(where: str, write: float, read: float) -> Finding:
    what = f"writes {write:.0f} MB/s (with fsync), reads {read:.0f} MB/s"
    slower = min(write, read)
    if slower >= LEAST_MB_S:
        return ok("storage speed", where, what)
    minutes = 14_000 / slower / 60
    what += f", less than {LEAST_MB_S:g}: 14 GB, a checkpoint of 10^9 trained parameters, take {minutes:.0f} minutes"
    return warning("storage speed", where, what, "Put output.dir on faster storage, or raise train.save_steps.")


def _is_loopback(text: str) -> bool:
    found = ip_address(text)
    return (getattr(found, "ipv4_mapped", None) or found).is_loopback


def _ports(found: list[Listener]) -> str:
    shown = [f"{one.process} (pid {one.pid}) on {one.address}:{one.port}" for one in found[:3]]
    more = [f"and {len(found) - 3} more"] if len(found) > 3 else []
    return ", ".join([*shown, *more])
