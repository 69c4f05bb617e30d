"""`tunesmith up`, `down` and `status`, as they read."""

from __future__ import annotations

import typer

from tunesmith.cluster import local
from tunesmith.cluster.console import print_json, say, stderr, stdout

JOIN_PATIENCE_S = 60.0
"""For which a head that was brought back may take to tell of its jobs."""


def up(nodes: int, cpus: int | None, gpus: int, as_json: bool) -> None:
    """Starts a cluster, or brings back what has died of it, and says how to use it."""
    before = local.find()
    with stderr().status(f"starting {nodes} node{'s' if nodes > 1 else ''} …"):
        known = local.up(nodes, cpus, gpus)
    lost = [] if before is None or all(one.alive for one in before.members) else _lost(known)
    if as_json:
        print_json(known.as_json() | {"lost_jobs": lost})
        return
    if lost:
        count = f"{len(lost)} job{'s are' if len(lost) > 1 else ' is'} lost"
        say(
            stderr(),
            f"{count} that waited or worked when it died: {', '.join(lost)}\n"
            "Submit each again with the same command: its run goes on from its newest checkpoint.",
        )
    say(stderr(), _shown(known) + "\n`tunesmith submit RECIPE` hands it a run, `tunesmith down` ends it")


def _lost(known: local.Local) -> list[str]:
    """The jobs that have died with what was brought back.

    Raises:
        ResourceError: the cluster does not answer.
    """
    from tunesmith.cluster.jobs.views import View  # loads Ray, which a cluster that is new or whole needs not

    view = View(known.dashboard, JOIN_PATIENCE_S)
    if view.away is not None:
        raise view.away
    return [one.id for one in view.lost()]


def down(as_json: bool) -> None:
    """Ends the cluster, if there is one."""
    ended = local.down()
    if as_json:
        print_json({"ended": [] if ended is None else [one.pid for one in ended.members]})
    else:
        count = 0 if ended is None else len(ended.members)
        say(stderr(), f"{count} node{'' if count == 1 else 's'} ended" if ended is not None else "no cluster is up")


def status(as_json: bool) -> None:
    """Shows the cluster; exits with 1 when there is none, or not all of it."""
    known = local.find()
    if as_json:
        print_json({} if known is None else known.as_json())
    elif known is None:
        say(stderr(), "no cluster is up; `tunesmith up` starts one")
    else:
        say(stdout(), _shown(known))
    if known is None or not all(one.alive for one in known.members):
        raise typer.Exit(1)


def _shown(known: local.Local) -> str:
    lines = [f"dashboard {known.dashboard} · address {known.address} · token {known.token_file}"]
    for one in known.members:
        state = f"process {one.pid}" if one.alive else "dead: `tunesmith up` brings it back"
        lines.append(f"{one.spec.name}: {one.spec.cpus} CPUs, {one.spec.gpus} GPUs, {state}")
    return "\n".join(lines)
