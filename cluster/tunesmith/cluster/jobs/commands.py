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

from rich import box
from rich.table import Table

from tunesmith.cluster import local
from tunesmith.cluster.artifacts import verify
from tunesmith.cluster.console import print_json, say, stderr, stdout
from tunesmith.cluster.errors import RecipeError, ResourceError, UsageError
from tunesmith.cluster.jobs import secrets
from tunesmith.cluster.jobs.client import Cluster
from tunesmith.cluster.jobs.code import gather
from tunesmith.cluster.jobs.spec import STOP_GRACE_S, JobSpec
from tunesmith.cluster.jobs.states import state_of
from tunesmith.cluster.jobs.versions import here
from tunesmith.cluster.progress import duration
from tunesmith.cluster.recipe.load import load_recipe, recipe_hash
from tunesmith.cluster.runs import RunFolder
from tunesmith.cluster.runstore import JobRecord, RunStore, how_far, log_file, record_file

FOLLOW_S = 0.3
ASK_CLUSTER_S = 5.0


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
        cluster = Cluster(address_of(wish.address), tell=lambda text: say(stderr(), text))
        store = RunStore()
        environment: dict[str, Any] = {"env_vars": variables}
        if wish.ship_code:
            environment["py_modules"] = [str(gather(Path(scratch)))]
        job = cluster.submit(spec, store, environment, wish.grace_s)
    is_new = job.submitted_at == record.submitted_at
    if as_json:
        print_json({**job.model_dump(), "new": is_new})
        return
    said = "submitted" if is_new else f"is {job.state} already: the same key stands for one job"
    say(stderr(), f"job {job.id} {said}\nrun {job.run} goes to {job.folder}\n`tunesmith logs -f {job.id}` follows it")
    stdout().print(job.id)


def address_of(given: str | None) -> str:
    """Where jobs are submitted: the option, else RAY_API_SERVER_ADDRESS, else the cluster of `tunesmith up`.

    Raises:
        UsageError: nobody says where.
    """
    named = given or os.environ.get("RAY_API_SERVER_ADDRESS")
    if named:
        return named
    known = local.find()
    if known is None:
        raise UsageError(
            "no cluster is named", "Give --address http://HOST:8265, or start one here with `tunesmith up`."
        )
    return known.dashboard


class View:
    """Jobs as this machine and the cluster see them together."""

    def __init__(self, address: str | None, patience_s: float = ASK_CLUSTER_S) -> None:
        self.store = RunStore()
        self.address = address_of(address)
        self.unreachable = ""
        self.cluster: Cluster | None = None
        self.seen, self.records = {}, {}
        try:
            self.cluster = Cluster(self.address, patience_s)
            self.seen, self.records = self.cluster.look()
        except ResourceError as away:
            self.unreachable = away.what

    def jobs(self) -> list[JobRecord]:
        """Every job of the cluster that anybody knows of, each in its true state, the oldest first."""
        address = self.cluster.address if self.cluster else self.address
        known = {one.id: one for one in self.store.jobs() if one.cluster == address}
        known |= {id: one for id, one in self.records.items() if id not in known}
        judged = [self._judge(one) for one in known.values()]
        return sorted(judged, key=lambda one: (one.submitted_at, one.id))

    def job(self, name: str) -> JobRecord:
        """A job by its id, or the newest one of a run by the run's name.

        Raises:
            UsageError: nobody knows it.
        """
        found = [one for one in self.jobs() if name in (one.id, one.run)]
        if not found:
            away = f" ({self.unreachable})" if self.unreachable else ""
            raise UsageError(f"there is no job or run {name}{away}", "`tunesmith jobs` lists them.")
        return found[-1]

    def _judge(self, record: JobRecord) -> JobRecord:
        ours = _from_folder(record) or record
        state, why = state_of(ours, self.seen.get(record.id), time.time(), not self.unreachable)
        after = ours.model_copy(update={"state": state, "why": why})
        if after.ended and state != "lost" and self.store.job(record.id) is not None:
            self.store.change(record.id, f"{state}: {why}" if not record.ended else "", state=state, why=why)
        return after


def _from_folder(record: JobRecord) -> JobRecord | None:
    """What the driver wrote last, where this machine sees the run's folder."""
    path = record_file(Path(record.folder), record.id)
    try:
        return JobRecord.model_validate_json(path.read_bytes())
    except FileNotFoundError:
        return None


def show(address: str | None, everything: bool, rebuild: Path | None, as_json: bool) -> None:
    """Prints the jobs; those that have ended only when asked for.

    Args:
        rebuild: an output folder whose runs tell of jobs that this machine has forgotten.
    """
    view = View(address)
    if rebuild is not None:
        say(stderr(), f"{len(view.store.rebuild(rebuild))} jobs taken in from {rebuild}")
    found = [one for one in view.jobs() if everything or not one.ended]
    if as_json:
        print_json([one.model_dump() for one in found])
        return
    if view.unreachable:
        say(stderr(), f"warning: {view.unreachable}", "yellow")
    table = Table("job", "state", "user", "priority", "since", "why", box=box.SIMPLE)
    for one in found:
        since = one.ended_at or one.started_at or one.submitted_at
        table.add_row(one.id, one.state, one.user, str(one.priority), duration(time.time() - since), one.why)
    stdout().print(table) if found else say(stderr(), "no jobs" if everything else "no jobs at work; --all shows all")


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
    """Prints what a job has printed: from the run's folder where this machine sees it, else through the cluster."""
    view = View(address)
    job = view.job(name)
    kept = log_file(Path(job.folder), job.id)
    if kept.exists():
        pieces = _follow_file(kept, view, job) if follow else iter([kept.read_text(errors="replace")])
    elif view.cluster is None:
        raise ResourceError(
            f"{kept} is not seen from here, and {view.unreachable}", "Try again when the cluster is up."
        )
    else:
        pieces = view.cluster.follow(job.id) if follow else iter([view.cluster.log(job.id)])
    for piece in pieces:
        sys.stdout.write(json.dumps({"text": piece}) + "\n" if as_json and piece else piece)
        sys.stdout.flush()


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
    """Asks a job to save and stop, and waits until it has."""
    view = View(address)
    job = view.job(name)
    if view.cluster is None:
        raise ResourceError(view.unreachable, "Try again when the cluster is up.")
    if not job.ended:
        view.cluster.stop(job.id)
        say(stderr(), f"job {job.id} is asked to save and stop")
    while wait and not job.ended:
        time.sleep(FOLLOW_S)
        job = View(address).job(job.id)
    if as_json:
        print_json(job.model_dump())
    else:
        say(stderr(), f"job {job.id} is {job.state}{': ' + job.why if job.why else ''}")


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
