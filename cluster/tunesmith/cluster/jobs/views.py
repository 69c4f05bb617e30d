"""Jobs as whoever looks at them sees them: what the store, the run folders and the cluster tell, put together.

A folder that cannot be read, whatever the reason, counts as one that this machine does not see: what one run has suffered must not
keep anybody from the others.
"""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import TextIO

from pydantic import ValidationError

from tunesmith.cluster import local
from tunesmith.cluster.errors import ResourceError, StorageError, UsageError
from tunesmith.cluster.jobs.client import Cluster, dashboard_address
from tunesmith.cluster.jobs.states import state_of
from tunesmith.cluster.runs import RunFolder
from tunesmith.cluster.runstore import JobRecord, RunStore, log_file, record_file

ASK_CLUSTER_S = 5.0


class View:
    """Jobs as this machine and the cluster see them together. Where no cluster is named, as this machine alone knows them."""

    def __init__(self, address: str | None, patience_s: float | None = None) -> None:
        """
        Args:
            patience_s: how long to ask a cluster that does not answer; ASK_CLUSTER_S when not given.
        """
        self.store = RunStore()
        self.address = named_address(address)
        self.away: ResourceError | None = None
        """Why the cluster could not be asked."""
        self.cluster: Cluster | None = None
        self.seen, self.records = {}, {}
        self.noted = {one.id: one for one in self.store.jobs()}  # first: what is submitted meanwhile is not lost
        if self.address is None:
            return
        try:
            self.cluster = Cluster(self.address, ASK_CLUSTER_S if patience_s is None else patience_s)
            self.seen, self.records = self.cluster.look()
        except ResourceError as away:
            self.away = away

    def jobs(self, everywhere: bool = False) -> list[JobRecord]:
        """Every job of the cluster that anybody knows of, each in its true state, the oldest first.

        Args:
            everywhere: those too that this machine knows of other clusters, which are not asked.
        """
        known = self.records | {id: one for id, one in self.noted.items() if self.address in (None, one.cluster)}
        if everywhere:
            known = self.noted | known
        judged = [self._judge(one) for one in known.values()]
        return sorted(judged, key=lambda one: (one.submitted_at, one.id))

    def lost(self) -> list[JobRecord]:
        """Jobs of the cluster that are lost, and whose key nobody has submitted again."""
        last_of_key = {one.key: one for one in self.jobs()}
        return [one for one in last_of_key.values() if one.state == "lost"]

    def job(self, name: str) -> JobRecord:
        """A job by its id, or the newest one of a run by the run's name.

        Raises:
            UsageError: nobody knows it.
            ResourceError: it is not known here, and the cluster does not answer.
        """
        return self.named(name)[-1]

    def named(self, name: str) -> list[JobRecord]:
        """The job of this id, or the jobs of the run of this name, the oldest first. Raises as `job`.

        Those of other clusters only where this one has none: it may have been made anew since.
        """
        for everywhere in (False, True):
            found = [one for one in self.jobs(everywhere) if name in (one.id, one.run)]
            if found:
                return found
        if self.away is not None:
            raise ResourceError(
                f"no job or run {name} is known here, and {self.away.what}", self.away.fix
            ) from self.away
        raise UsageError(f"there is no job or run {name}", "`tunesmith jobs --all` lists them.")

    def require_cluster(self, job: JobRecord) -> Cluster:
        """The cluster of a job, to ask it for more.

        Raises:
            UsageError: none is named, or another one, or it does not know the job any more.
            ResourceError: it does not answer.
        """
        if self.address is not None and not self.has(job):
            raise UsageError(
                f"job {job.id} was submitted to {job.cluster}, and {self.address} was asked",
                f"If that cluster is still there: --address {job.cluster}.",
            )
        if self.cluster is not None and self.away is None:
            return self.cluster
        raise self.away or UsageError("no cluster is named", "Give --address http://HOST:8265.")

    def has(self, record: JobRecord) -> bool:
        """Whether it is a job of the cluster that is asked."""
        return record.id in self.seen or record.cluster == self.address

    def _away_from(self, record: JobRecord) -> str:
        """Why a job's cluster says nothing of it; empty when it was asked."""
        if self.address is None:
            return "no cluster is named"
        if not self.has(record):
            return f"its cluster, {record.cluster}, is not the one that was asked"
        return "" if self.away is None else "the cluster does not answer now"

    def _judge(self, record: JobRecord) -> JobRecord:
        ours, seen = newest(record), self.seen.get(record.id)
        state, why = state_of(ours, seen, time.time(), self._away_from(record))
        after = ours.model_copy(update={"state": state, "why": why})
        if after.ended and not ours.ended:
            code, at = (seen.exit_code, seen.ended_at) if seen is not None and seen.ended else (None, None)
            heard_at = max(ours.heard_at, ours.submitted_at)
            after = after.model_copy(update={"exit_code": code, "ended_at": at or heard_at})
        noted = self.noted.get(record.id)
        if noted is not None and noted == record and after.ended and not record.ended and state != "lost":
            fields = after.model_dump(include={"state", "why", "exit_code", "ended_at", "artifact"})
            self.store.change(record.id, f"{state}: {why}", **fields)
        return after


def named_address(given: str | None) -> str | None:
    """The dashboard that is meant: the option, else RAY_API_SERVER_ADDRESS, else the cluster of `tunesmith up`, if there is one.

    Raises:
        UsageError: what is said is not the address of a dashboard.
    """
    named = given or os.environ.get("RAY_API_SERVER_ADDRESS")
    if named:
        return dashboard_address(named)
    known = local.find()
    return None if known is None else known.dashboard


def newest(record: JobRecord) -> JobRecord:
    """What was written last: by the driver into the run's folder, where this machine sees it, or, while that fails, into the store alone."""
    try:
        written = JobRecord.model_validate_json(record_file(Path(record.folder), record.id).read_bytes())
    except (OSError, ValidationError):
        return record
    return max((written, record), key=lambda one: (one.ended, one.heard_at))


def artifact_of(job: JobRecord) -> Path:
    """As the driver has noted it, or where a run has it whose driver did not live to do so."""
    return Path(job.artifact) if job.artifact else RunFolder(Path(job.folder)).artifact


def log_of(job: JobRecord) -> TextIO | None:
    """What the job has printed, as its run's folder keeps it; None where this machine does not see that."""
    try:
        return log_file(Path(job.folder), job.id).open(errors="replace")
    except OSError:
        return None


def progress_of(job: JobRecord) -> dict[str, int | None]:
    """How far the run is, as its folder tells; None where this machine does not see that."""
    folder = RunFolder(Path(job.folder))
    names = ("trials", "trials_ended") if job.kind == "sweep" else ("attempts", "newest_step")
    try:
        told = folder.trials() if job.kind == "sweep" else (folder.current_attempt(), folder.newest_step())
    except (OSError, StorageError):
        told = (None, None)
    return dict(zip(names, told, strict=True))
