"""`tunesmith doctor`: shows what was found, and fails when something is wrong."""

from __future__ import annotations

import os
from collections import Counter
from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text

from tunesmith.cluster import local
from tunesmith.cluster.console import print_json, say, stderr, stdout
from tunesmith.cluster.doctor.checks import findings
from tunesmith.cluster.doctor.finding import Finding
from tunesmith.cluster.doctor.gather import gather
from tunesmith.cluster.errors import TunesmithError, UsageError
from tunesmith.cluster.recipe.load import load_recipe

COLOURS = {"ok": "green", "warning": "yellow", "failure": "bold red", "skipped": "dim"}


def run(recipe: Path | None, address: str | None, storage: str | None, as_json: bool) -> None:
    """Looks, shows, and raises when something fails.

    Raises:
        TunesmithError: at least one finding is a failure.
        UsageError: the recipe or an option is wrong.
    """
    loaded = load_recipe(recipe) if recipe is not None else None
    written = storage if storage is not None else loaded.output.dir if loaded is not None else "."
    if "://" in written:
        raise UsageError(f"{written}: runs are written to a folder", "Name one that all nodes have mounted.")
    folder = Path(written).expanduser().absolute()
    named = address or (loaded.cluster.address if loaded else None) or os.environ.get("RAY_ADDRESS") or None
    where = cluster_of_up(named)
    with stderr().status("looking at this machine …") as status:
        facts = gather(where, folder, loaded, lambda doing: status.update(f"{doing} …"))
    found = findings(facts)
    failed = [one for one in found if one.verdict == "failure"]
    if as_json:
        listed = [one.model_dump(mode="json") for one in found]
        print_json({"passed": not failed, "findings": listed, "facts": facts.model_dump(mode="json")})
    else:
        show(found, stdout())
    counts = Counter(one.verdict for one in found)
    say(stderr(), ", ".join(f"{counts[verdict]} {verdict}" for verdict in COLOURS if counts[verdict]))
    if failed:
        checks = ", ".join(dict.fromkeys(one.check for one in failed))
        count = "1 finding is a failure" if len(failed) == 1 else f"{len(failed)} findings are failures"
        raise TunesmithError(f"{count}: {checks}", "Each is shown with its fix.")


def cluster_of_up(named: str | None) -> str | None:
    """The address that is meant: the cluster of `tunesmith up`, with its token, where that is named or nothing else is.

    Raises:
        UsageError: it is the address of another cluster's dashboard.
    """
    known = local.find()
    if known is not None and named in (None, "auto", known.address, known.dashboard, known.dashboard.split("//")[1]):
        if not os.environ.get("RAY_AUTH_TOKEN"):
            os.environ.setdefault("RAY_AUTH_TOKEN_PATH", str(known.token_file))
        return known.address
    if named is not None and named.startswith(("http://", "https://")):
        raise UsageError(
            f"{named}: the dashboard of a cluster that `tunesmith up` has not started here",
            "The doctor joins Ray itself: give host:port of the cluster's head, as in 10.0.0.5:6379, from inside its network.",
        )
    return named


def show(found: list[Finding], console: Console) -> None:
    """A table of the findings, each with its fix below it."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    for title in ("", "check", "where", "what, and what to do"):
        table.add_column(title, overflow="fold")
    for one in found:
        colour = COLOURS[one.verdict]
        what = Text(one.what)
        if one.fix:
            what.append(f"\n{one.fix}", "cyan")
        table.add_row(Text(one.verdict, colour), one.check, Text(one.where), what)
    console.print(table)
