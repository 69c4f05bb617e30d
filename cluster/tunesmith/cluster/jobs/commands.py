"""`tunesmith submit`, `jobs`, `describe`, `logs`, `stop`, `artifacts`: what they do and how it reads."""

from __future__ import annotations

import getpass
import json
import os
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any, TextIO

import typer
from rich import box
from rich.table import Table
from rich.text import Text

from tunesmith.cluster.artifacts import verify
from tunesmith.cluster.console import print_json, say, stderr, stdout
from tunesmith.cluster.errors import RecipeError, StoppedError, TunesmithError, UsageError
from tunesmith.cluster.jobs import secrets
from tunesmith.cluster.jobs.client import Cluster
from tunesmith.cluster.jobs.code import gather
from tunesmith.cluster.jobs.spec import JobSpec
from tunesmith.cluster.jobs.versions import here
from tunesmith.cluster.jobs.views import View, artifact_of, log_of, named_address, newest, progress_of
from tunesmith.cluster.patience import STOP_GRACE_S
from tunesmith.cluster.progress import duration
from tunesmith.cluster.recipe.load import load_recipe, recipe_hash
from tunesmith.cluster.runstore import JobRecord, RunStore, how_far

FOLLOW_S = 0.3
ASK_AGAIN_S = 5.0
"""How often a cluster is asked whether a job that says nothing still lives."""
RECENT_S = 3600.0
"""For so long after its end a job is still listed."""
UNBROKEN = 10_000
"""Columns of a table that goes to a program."""


@dataclass(frozen=True)
class Wish:
    """What `submit` was given besides the recipe; see its options."""

    address: str | None = None
    key: str | None = None
    priority: int = 0
    user: str | None = None
    preemptible: bool = True
    expected_s: float | None = None
    environment: list[str] = field(default_factory=list)
    ship_code: bool = False
    check_versions: bool = True
    grace_s: int = STOP_GRACE_S


def submit(recipe_file: Path, overrides: list[str], wish: Wish, as_json: bool) -> None:
    """Submits a recipe's run as a job, once for a key however often it is called.

    Raises:
        UsageError: the recipe or an option is wrong, asks for another cluster, names a file as its folder, or holds a secret.
        ResourceError: the cluster does not answer.
    """
    for option, given in (("--key", wish.key), ("--user", wish.user)):
        if given is not None and not given.strip():
            raise UsageError(f"{option} is empty", "Say what it is, or leave it out.")
    recipe = load_recipe(recipe_file, overrides)
    if recipe.cluster.address:
        raise RecipeError(
            f"{recipe.where('cluster.address')}a job runs on the cluster that it is submitted to", "Take it out."
        )
    written = recipe.model_dump(mode="json", exclude_unset=True)
    secrets.refuse_in_recipe(written)
    variables, references = secrets.split(wish.environment)
    folder = Path(recipe.output.dir).expanduser().absolute() / recipe.name
    _refuse_file(folder)
    record = JobRecord(
        id="", key=wish.key or str(folder), number=0, kind="sweep" if recipe.tune else "train", run=recipe.name, folder=str(folder),
        user=wish.user or getpass.getuser(), priority=wish.priority, recipe=recipe_hash(recipe), submitted_at=time.time(),
    )  # fmt: skip
    spec = JobSpec(
        record=record, recipe=written, cwd=os.getcwd(), versions=here(), check_versions=wish.check_versions,
        secrets=references, expected_s=wish.expected_s, preemptible=wish.preemptible,
    )  # fmt: skip
    with tempfile.TemporaryDirectory() as scratch:
        cluster = Cluster(address_of(wish.address), tell=_tell)
        store = RunStore()
        environment: dict[str, Any] = {"env_vars": variables}
        if wish.ship_code:
            environment["py_modules"] = [str(gather(Path(scratch)))]
        job = cluster.submit(spec, store, environment, wish.grace_s)
        is_new = job.submitted_at == record.submitted_at
        left_out = [] if is_new or job.ended else cluster.left_out(job.id, spec, environment, wish.grace_s)
    if left_out:
        _tell(
            f"warning: job {job.id} was submitted without {', '.join(left_out)}, and goes on without: "
            "stop it and submit it again if that is to change"
        )
    if as_json:
        print_json({**job.model_dump(), "new": is_new, "left_out": left_out})
        return
    said = f"job {job.id} submitted" if is_new else f"{said_of(job)}; the same key stands for one job"
    say(stderr(), f"{said}\nrun {job.run} goes to {job.folder}\n`tunesmith logs -f {job.id}` follows it")
    stdout().print(job.id)


def _refuse_file(folder: Path) -> None:
    """Raises UsageError when what this machine sees where the run's folder would be made is a file."""
    there = next(path for path in (folder, *folder.parents) if os.path.exists(path))
    if not os.path.isdir(there):
        raise UsageError(
            f"{there} is a file: the run's folder cannot be made there", "Set output.dir or name to something else."
        )


def address_of(given: str | None) -> str:
    """Where jobs are submitted: the option, else RAY_API_SERVER_ADDRESS, else the cluster of `tunesmith up`.

    Raises:
        UsageError: nobody says where, or what is said is not the address of a dashboard.
    """
    named = named_address(given)
    if named is None:
        raise UsageError(
            "no cluster is named", "Give --address http://HOST:8265, or start one here with `tunesmith up`."
        )
    return named


def show(address: str | None, everything: bool, rebuild: Path | None, as_json: bool) -> None:
    """Prints the jobs; those that have ended only for a while, unless asked for.

    Args:
        rebuild: an output folder whose runs tell of jobs that this machine has forgotten.

    Raises:
        ResourceError: the cluster could not be asked; what is known here was printed.
    """
    if rebuild is not None:
        taken = len(RunStore().rebuild(rebuild))
        say(stderr(), f"{taken} job{'' if taken == 1 else 's'} taken in from {rebuild}")
    view, now = View(address), time.time()
    found = [
        one for one in view.jobs(everything) if everything or not one.ended or now - (one.ended_at or 0) < RECENT_S
    ]
    if as_json:
        print_json([one.model_dump() for one in found])
    elif found:
        _print_table(found, now)
    elif view.away is None:
        say(stderr(), "no jobs" if everything else "no jobs at work; --all shows all")
    if view.away is not None:
        raise view.away
    if view.address is None and not as_json:
        say(stderr(), "no cluster is named: this is what is known here")


def _print_table(found: list[JobRecord], now: float) -> None:
    """One line a job where no person reads it; ids are never cut."""
    console = stdout()
    if not console.is_terminal:
        console.width = UNBROKEN
    table = Table(box=box.SIMPLE)
    table.add_column("job", no_wrap=True, min_width=max(len(one.id) for one in found))
    for title in ("state", "user", "priority", "since", "why"):
        table.add_column(title, overflow="fold")
    for one in found:
        since = duration(now - (one.ended_at or one.started_at or one.submitted_at))
        table.add_row(one.id, one.state, one.user, str(one.priority), since, Text(one.why))
    console.print(table)


def describe(name: str, address: str | None, as_json: bool) -> None:
    """Prints all that is known of a job: its state and why, what happened when, its attempts and checkpoints."""
    view = View(address)
    job = view.job(name)
    progress, events = progress_of(job), view.store.events(job.id)
    about = {
        **job.model_dump(),
        **progress,
        "artifact": str(artifact_of(job)) if os.path.exists(artifact_of(job)) else None,
        "events": [{"at": at, "text": text} for at, text in events],
    }
    if as_json:
        print_json(about)
        return
    lines = [f"job {job.id} · {job.state}{': ' + job.why if job.why else ''}"]
    lines += [f"run {job.run} in {job.folder} · user {job.user} · priority {job.priority}"]
    if None in progress.values():
        lines += ["its folder cannot be read from here"]
    else:
        lines += [f"attempts {progress['attempts']} · {how_far(job)}" if job.kind == "train" else how_far(job)]
    lines += [f"{datetime.fromtimestamp(at):%Y-%m-%d %H:%M:%S}  {text}" for at, text in events]
    say(stdout(), "\n".join(lines))


def logs(name: str, address: str | None, follow: bool, as_json: bool) -> None:
    """Prints what a job has printed: from the run's folder where this machine sees it, else through the cluster.

    Raises:
        typer.Exit: with the job's own exit code, when it was followed to another end than success.
        ResourceError: the log is not seen from here, and the cluster does not answer.
    """
    view = View(address)
    job = view.job(name)
    kept = log_of(job)
    if kept is not None:
        pieces = _follow_file(kept, view, job) if follow else _read_file(kept)
    elif follow and view.has(job):
        pieces = Cluster(address_of(address), tell=_tell).follow(job.id)  # a head may be restarted meanwhile
    else:
        pieces = iter([view.require_cluster(job).log(job.id)])
    for piece in pieces:
        sys.stdout.write(json.dumps({"text": piece}) + "\n" if as_json and piece else piece)
        sys.stdout.flush()
    if follow:
        ended = _until_ended(job, address)
        say(stderr(), said_of(ended))
        if code := exit_code_of(ended):
            raise typer.Exit(code)


def said_of(job: JobRecord) -> str:
    """Where a job stands, in a line."""
    verb = "has" if job.state in ("succeeded", "failed") else "is"
    return f"job {job.id} {verb} {job.state}{': ' + job.why if job.why else ''}"


def exit_code_of(job: JobRecord) -> int:
    """What a command that waited for the end of a job exits with: as the job itself did, if it lived to do so."""
    if job.state == "succeeded":
        return 0
    if job.state == "stopped":
        return StoppedError.exit_code
    return job.exit_code if job.exit_code is not None and job.exit_code > 0 else TunesmithError.exit_code


def _until_ended(job: JobRecord, address: str | None) -> JobRecord:
    asked_at = time.monotonic()
    while not job.ended:
        time.sleep(FOLLOW_S)
        if newest(job).ended or time.monotonic() - asked_at > ASK_AGAIN_S:
            job, asked_at = View(address).job(job.id), time.monotonic()
    return job


def _tell(text: str) -> None:
    say(stderr(), text)


def _read_file(kept: TextIO) -> Iterator[str]:
    with kept as file:
        yield file.read()


def _follow_file(kept: TextIO, view: View, job: JobRecord) -> Iterator[str]:
    """The file, as it grows, until the job has ended; the cluster is asked now and then whether it still lives."""
    asked_at, ended = time.monotonic(), job.ended
    with kept as file:
        while True:
            text = file.read()
            if text:
                yield text
            elif ended:
                return
            else:
                ended = newest(job).ended
                if not ended and time.monotonic() - asked_at > ASK_AGAIN_S:
                    ended, asked_at = View(view.address).job(job.id).ended, time.monotonic()
                time.sleep(FOLLOW_S)


def stop(name: str, address: str | None, wait: bool, as_json: bool) -> None:
    """Asks a job to save and stop, and waits until it has.

    Raises:
        UsageError: nobody knows it, or several jobs of the run have not ended.
        ResourceError: the cluster does not answer.
    """
    view = View(address)
    living = [one for one in view.named(name) if not one.ended]
    if len(living) > 1:
        raise UsageError(
            f"run {name} has {len(living)} jobs that have not ended: {', '.join(one.id for one in living)}",
            "Name the one that is meant by its id.",
        )
    job = living[0] if living else view.job(name)
    if not job.ended:
        view.require_cluster(job).stop(job.id)
        say(stderr(), f"job {job.id} is asked to save and stop")
    if wait:
        job = _until_ended(job, address)
    if as_json:
        print_json(job.model_dump())
    elif job.ended:
        say(stderr(), said_of(job))
    else:
        say(stderr(), f"`tunesmith jobs` shows when it has; `tunesmith logs -f {job.id}` waits for it")


def artifacts(name: str, address: str | None, as_json: bool) -> None:
    """Prints where a job's artifact lies, checked file by file.

    Raises:
        UsageError: there is none yet, or this machine does not see it.
        CheckpointError: it is damaged.
    """
    job = View(address).job(name)
    folder = artifact_of(job)
    if not os.path.exists(folder):
        raise UsageError(
            f"job {job.id} is {job.state}, and {folder} is not there or not seen from here",
            "An artifact is there when the job has succeeded; on a cluster, look where its nodes see it.",
        )
    manifest = verify(folder)
    if as_json:
        files = {file: record.size for file, record in manifest.files.items()}
        print_json({"artifact": str(folder), "whole": True, "files": files})
        return
    megabytes = sum(record.size for record in manifest.files.values()) / 1e6
    say(stderr(), f"{len(manifest.files)} files, {megabytes:.1f} MB, all as they were signed")
    stdout().print(str(folder))
