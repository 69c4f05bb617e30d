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
from typing import Any

import typer
from rich import box
from rich.table import Table
from rich.text import Text

from tunesmith.cluster import local
from tunesmith.cluster.artifacts import verify
from tunesmith.cluster.console import print_json, say, stderr, stdout
from tunesmith.cluster.errors import RecipeError, ResourceError, StoppedError, TunesmithError, UsageError
from tunesmith.cluster.jobs import secrets
from tunesmith.cluster.jobs.client import Cluster, dashboard_address
from tunesmith.cluster.jobs.code import gather
from tunesmith.cluster.jobs.spec import JobSpec
from tunesmith.cluster.jobs.states import state_of
from tunesmith.cluster.jobs.versions import here
from tunesmith.cluster.patience import STOP_GRACE_S
from tunesmith.cluster.progress import duration
from tunesmith.cluster.recipe.load import load_recipe, recipe_hash
from tunesmith.cluster.runs import RunFolder
from tunesmith.cluster.runstore import JobRecord, RunStore, how_far, log_file, record_file

FOLLOW_S = 0.3
ASK_CLUSTER_S = 5.0
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
        UsageError: the recipe is wrong, asks for another cluster, or holds a secret.
        ResourceError: the cluster does not answer.
    """
    recipe = load_recipe(recipe_file, overrides)
    if recipe.cluster.address:
        raise RecipeError(
            f"{recipe.where('cluster.address')}a job runs on the cluster that it is submitted to", "Take it out."
        )
    written = recipe.model_dump(mode="json", exclude_unset=True)
    secrets.refuse_in_recipe(written)
    variables, references = secrets.split(wish.environment)
    folder = Path(recipe.output.dir).expanduser().absolute() / recipe.name
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
    if as_json:
        print_json({**job.model_dump(), "new": is_new})
        return
    said = f"job {job.id} submitted" if is_new else f"{said_of(job)}; the same key stands for one job"
    say(stderr(), f"{said}\nrun {job.run} goes to {job.folder}\n`tunesmith logs -f {job.id}` follows it")
    stdout().print(job.id)


def address_of(given: str | None) -> str:
    """Where jobs are submitted: the option, else RAY_API_SERVER_ADDRESS, else the cluster of `tunesmith up`.

    Raises:
        UsageError: nobody says where, or what is said is not the address of a dashboard.
    """
    named = _named_address(given)
    if named is None:
        raise UsageError(
            "no cluster is named", "Give --address http://HOST:8265, or start one here with `tunesmith up`."
        )
    return named


def _named_address(given: str | None) -> str | None:
    named = given or os.environ.get("RAY_API_SERVER_ADDRESS")
    if named:
        return dashboard_address(named)
    known = local.find()
    return None if known is None else known.dashboard


class View:
    """Jobs as this machine and the cluster see them together. Where no cluster is named, as this machine alone knows them."""

    def __init__(self, address: str | None) -> None:
        self.store = RunStore()
        self.address = _named_address(address)
        self.away: ResourceError | None = None
        """Why the cluster could not be asked."""
        self.cluster: Cluster | None = None
        self.seen, self.records = {}, {}
        if self.address is None:
            return
        try:
            self.cluster = Cluster(self.address, ASK_CLUSTER_S)
            self.seen, self.records = self.cluster.look()
        except ResourceError as away:
            self.away = away

    def jobs(self) -> list[JobRecord]:
        """Every job of the cluster that anybody knows of, each in its true state, the oldest first."""
        noted = {one.id: one for one in self.store.jobs() if self.address in (None, one.cluster)}
        judged = [self._judge(one, one.id in noted) for one in (self.records | noted).values()]
        return sorted(judged, key=lambda one: (one.submitted_at, one.id))

    def job(self, name: str) -> JobRecord:
        """A job by its id, or the newest one of a run by the run's name.

        Raises:
            UsageError: nobody knows it.
            ResourceError: it is not known here, and the cluster does not answer.
        """
        return self.named(name)[-1]

    def named(self, name: str) -> list[JobRecord]:
        """The job of this id, or the jobs of the run of this name, the oldest first. Raises as `job`."""
        found = [one for one in self.jobs() if name in (one.id, one.run)]
        if found:
            return found
        if self.away is not None:
            raise ResourceError(
                f"no job or run {name} is known here, and {self.away.what}", self.away.fix
            ) from self.away
        raise UsageError(f"there is no job or run {name}", "`tunesmith jobs --all` lists them.")

    def require_cluster(self) -> Cluster:
        """The cluster, to ask it for more.

        Raises:
            UsageError: none is named.
            ResourceError: it does not answer.
        """
        if self.cluster is not None and self.away is None:
            return self.cluster
        raise self.away or UsageError("no cluster is named", "Give --address http://HOST:8265.")

    def _judge(self, record: JobRecord, is_noted: bool) -> JobRecord:
        ours, seen = _from_folder(record) or record, self.seen.get(record.id)
        state, why = state_of(ours, seen, time.time(), self.cluster is not None and self.away is None)
        after = ours.model_copy(update={"state": state, "why": why})
        if seen is not None and seen.ended and not ours.ended:
            after = after.model_copy(update={"exit_code": seen.exit_code, "ended_at": seen.ended_at})
        if is_noted and after.ended and not record.ended and state != "lost":
            fields = after.model_dump(include={"state", "why", "exit_code", "ended_at", "artifact"})
            self.store.change(record.id, f"{state}: {why}", **fields)
        return after


def _from_folder(record: JobRecord) -> JobRecord | None:
    """What the driver wrote last, where this machine sees the run's folder."""
    path = record_file(Path(record.folder), record.id)
    try:
        return JobRecord.model_validate_json(path.read_bytes())
    except FileNotFoundError:
        return None


def show(address: str | None, everything: bool, rebuild: Path | None, as_json: bool) -> None:
    """Prints the jobs; those that have ended only for a while, unless asked for.

    Args:
        rebuild: an output folder whose runs tell of jobs that this machine has forgotten.

    Raises:
        ResourceError: the cluster could not be asked; what is known here was printed.
    """
    view = View(address)
    if rebuild is not None:
        taken = len(view.store.rebuild(rebuild))
        say(stderr(), f"{taken} job{'' if taken == 1 else 's'} taken in from {rebuild}")
    now = time.time()
    found = [one for one in view.jobs() if everything or not one.ended or now - (one.ended_at or 0) < RECENT_S]
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
    folder, events = RunFolder(Path(job.folder)), view.store.events(job.id)
    about = {
        **job.model_dump(),
        **(_of_sweep(folder) if job.kind == "sweep" else _of_run(folder)),
        "artifact": str(_artifact(job)) if _artifact(job).exists() else None,
        "events": [{"at": at, "text": text} for at, text in events],
    }
    if as_json:
        print_json(about)
        return
    lines = [f"job {job.id} · {job.state}{': ' + job.why if job.why else ''}"]
    lines += [f"run {job.run} in {job.folder} · user {job.user} · priority {job.priority}"]
    lines += [f"attempts {folder.current_attempt()} · {how_far(job)}" if job.kind == "train" else how_far(job)]
    lines += [f"{datetime.fromtimestamp(at):%Y-%m-%d %H:%M:%S}  {text}" for at, text in events]
    say(stdout(), "\n".join(lines))


def _artifact(job: JobRecord) -> Path:
    """As the driver has noted it, or where a run has it whose driver did not live to do so."""
    return Path(job.artifact) if job.artifact else RunFolder(Path(job.folder)).artifact


def _of_run(folder: RunFolder) -> dict[str, int]:
    return {"attempts": folder.current_attempt(), "newest_step": folder.newest_step()}


def _of_sweep(folder: RunFolder) -> dict[str, int]:
    begun, ended = folder.trials()
    return {"trials": begun, "trials_ended": ended}


def logs(name: str, address: str | None, follow: bool, as_json: bool) -> None:
    """Prints what a job has printed: from the run's folder where this machine sees it, else through the cluster.

    Raises:
        typer.Exit: with the job's own exit code, when it was followed to another end than success.
        ResourceError: the log is not seen from here, and the cluster does not answer.
    """
    view = View(address)
    job = view.job(name)
    kept = log_file(Path(job.folder), job.id)
    if kept.exists():
        pieces = _follow_file(kept, view, job) if follow else iter([kept.read_text(errors="replace")])
    elif follow and view.address is not None:
        pieces = Cluster(view.address, tell=_tell).follow(job.id)  # a head may be restarted meanwhile
    else:
        pieces = iter([view.require_cluster().log(job.id)])
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
        written = _from_folder(job)
        if (written is not None and written.ended) or time.monotonic() - asked_at > ASK_CLUSTER_S:
            job, asked_at = View(address).job(job.id), time.monotonic()
    return job


def _tell(text: str) -> None:
    say(stderr(), text)


def _follow_file(kept: Path, view: View, job: JobRecord) -> Iterator[str]:
    """The file, as it grows, until the job has ended; the cluster is asked now and then whether it still lives."""
    asked_at, ended = time.monotonic(), job.ended
    with kept.open(errors="replace") as file:
        while True:
            text = file.read()
            if text:
                yield text
            elif ended:
                return
            else:
                record = _from_folder(job)
                ended = record is not None and record.ended
                if not ended and time.monotonic() - asked_at > ASK_CLUSTER_S:
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
        view.require_cluster().stop(job.id)
        say(stderr(), f"job {job.id} is asked to save and stop")
    if wait:
        job = _until_ended(job, address)
    if as_json:
        print_json(job.model_dump())
    else:
        say(stderr(), said_of(job))


def artifacts(name: str, address: str | None, as_json: bool) -> None:
    """Prints where a job's artifact lies, checked file by file.

    Raises:
        UsageError: there is none yet, or this machine does not see it.
        CheckpointError: it is damaged.
    """
    job = View(address).job(name)
    folder = _artifact(job)
    if not folder.exists():
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
