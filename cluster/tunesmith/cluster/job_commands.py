"""The commands of clusters and jobs: names and options. Nothing heavy is imported before a command needs it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from tunesmith.cluster.patience import STOP_GRACE_S

AsJson = Annotated[bool, typer.Option("--json", help="Print one line of JSON on standard output.")]
HIGHEST = 1_000_000
"""Priority."""
Address = Annotated[
    str | None,
    typer.Option(
        "--address",
        metavar="URL",
        help="The cluster's dashboard. [default: RAY_API_SERVER_ADDRESS, else `tunesmith up`]",
    ),
]
Name = Annotated[str, typer.Argument(metavar="JOB", help="A job's id, or a run's name.", show_default=False)]


def submit(
    recipe: Annotated[Path, typer.Argument(metavar="RECIPE", help="A YAML file.", show_default=False)],
    address: Address = None,
    overrides: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="Overrides a key, as in train.learning_rate=1e-4. Repeatable."),
    ] = None,
    key: Annotated[
        str | None, typer.Option("--key", help="Idempotency key: one job, however often. [default: the run's folder]")
    ] = None,
    priority: Annotated[
        int,
        typer.Option(
            min=-HIGHEST, max=HIGHEST, help="A higher one goes first, and may make a lower one save and wait."
        ),
    ] = 0,
    user: Annotated[str | None, typer.Option(help="Whose share of the cluster it takes. [default: you]")] = None,
    fixed: Annotated[bool, typer.Option("--not-preemptible", help="Never ask it to save and wait.")] = False,
    expected: Annotated[
        float | None, typer.Option("--expected-hours", min=0, help="How long it will run: it may fill gaps.")
    ] = None,
    environment: Annotated[
        list[str] | None,
        typer.Option("--env", metavar="NAME=VALUE", help="Or NAME=env:OTHER, NAME=file:PATH for secrets. Repeatable."),
    ] = None,
    ship_code: Annotated[
        bool, typer.Option("--ship-code", help="Run this machine's Tunesmith, not the cluster's.")
    ] = False,
    any_version: Annotated[bool, typer.Option("--any-version", help="Run even where versions differ.")] = False,
    grace: Annotated[int, typer.Option(min=1, help="Seconds that `stop` gives it to save.")] = STOP_GRACE_S,
    as_json: AsJson = False,
) -> None:
    """Hand a run to a cluster, where it waits for its turn. The same command again is the same job, or goes on with the run."""
    from tunesmith.cluster.jobs import commands

    expected_s = None if expected is None else expected * 3600
    wish = commands.Wish(
        address, key, priority, user, not fixed, expected_s, environment or [], ship_code, not any_version, grace
    )
    commands.submit(recipe, overrides or [], wish, as_json)


def jobs(
    everything: Annotated[bool, typer.Option("--all", help="Those that have ended, too.")] = False,
    rebuild: Annotated[
        Path | None, typer.Option("--rebuild", metavar="DIR", help="Take in the jobs that an output folder tells of.")
    ] = None,
    address: Address = None,
    as_json: AsJson = False,
) -> None:
    """List jobs: what each does, and why it waits."""
    from tunesmith.cluster.jobs import commands

    commands.show(address, everything, rebuild, as_json)


def describe(name: Name, address: Address = None, as_json: AsJson = False) -> None:
    """Show a job: its state and why, what happened when, its attempts and checkpoints."""
    from tunesmith.cluster.jobs import commands

    commands.describe(name, address, as_json)


def logs(
    name: Name,
    follow: Annotated[bool, typer.Option("-f", "--follow", help="Until the job ends.")] = False,
    address: Address = None,
    as_json: AsJson = False,
) -> None:
    """Print what a job has printed."""
    from tunesmith.cluster.jobs import commands

    commands.logs(name, address, follow, as_json)


def stop(
    name: Name,
    wait: Annotated[bool, typer.Option(help="Wait until it has saved.")] = True,
    address: Address = None,
    as_json: AsJson = False,
) -> None:
    """Ask a job to save and stop. Submitted again, it goes on from there."""
    from tunesmith.cluster.jobs import commands

    commands.stop(name, address, wait, as_json)


def artifacts(name: Name, address: Address = None, as_json: AsJson = False) -> None:
    """Show where a job's artifact lies, after checking every file of it."""
    from tunesmith.cluster.jobs import commands

    commands.artifacts(name, address, as_json)


def up(
    nodes: Annotated[int, typer.Option(min=1, help="Nodes, the head included.")] = 2,
    cpus: Annotated[
        int | None, typer.Option("--cpus-per-node", min=1, help="[default: this machine's, divided]")
    ] = None,
    gpus: Annotated[int, typer.Option("--gpus-per-node", min=0, help="As Ray counts them; they need not exist.")] = 0,
    as_json: AsJson = False,
) -> None:
    """Start a cluster of several nodes on this machine, for trying things; or bring back nodes of it that have died."""
    from tunesmith.cluster import local_commands

    local_commands.up(nodes, cpus, gpus, as_json)


def down(as_json: AsJson = False) -> None:
    """End the cluster that `up` has started, and nothing else. Stop its jobs first if they are to save."""
    from tunesmith.cluster import local_commands

    local_commands.down(as_json)


def status(as_json: AsJson = False) -> None:
    """Show the cluster that `up` has started. Exit code 1 when there is none, or one of its nodes is dead."""
    from tunesmith.cluster import local_commands

    local_commands.status(as_json)
