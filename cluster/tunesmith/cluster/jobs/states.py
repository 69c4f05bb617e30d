"""What a job is doing, judged from all who know something of it: a pure decision, so that none says running for ever."""

from __future__ import annotations

from dataclasses import dataclass

from tunesmith.cluster.progress import duration
from tunesmith.cluster.runstore import HEARD_S, JobRecord

AGAIN = "submit it again with the same command: the run goes on from its newest checkpoint, if it has one"


@dataclass(frozen=True)
class Seen:
    """A job as Ray's jobs API shows it."""

    status: str
    """PENDING, RUNNING, STOPPED, SUCCEEDED or FAILED."""
    message: str = ""
    exit_code: int | None = None
    ended: bool = False
    driver_lost: bool = False
    """The job's driver did not end by itself: its node is gone."""
    ended_at: float | None = None
    """In seconds since 1970, if it has ended."""


def state_of(record: JobRecord, seen: Seen | None, now: float, reachable: bool = True) -> tuple[str, str]:
    """The job's state, and why.

    Args:
        record: as this machine knows it, or else as it was submitted.
        seen: what the cluster says; None when it knows no such job, or was not asked.
        now: seconds since 1970.
        reachable: whether the cluster answers.
    """
    if record.ended:
        return record.state, record.why
    silent_s = now - max(record.heard_at, record.submitted_at)
    if not reachable:
        if silent_s > HEARD_S:
            return "lost", f"neither the cluster nor its driver was heard of for {duration(silent_s)}; {AGAIN}"
        return record.state, f"{record.why + '; ' if record.why else ''}the cluster does not answer now"
    if seen is None:
        return "lost", f"the cluster knows no such job any more: it was made anew; {AGAIN}"
    if seen.driver_lost:
        return "lost", f"its driver is gone, with the node that it ran on; {AGAIN}"
    if seen.ended:
        return _ended(seen)
    if seen.status == "PENDING":
        return "submitted", "Ray is starting its driver"
    if record.state == "submitted":
        return "running", ""
    if silent_s > HEARD_S:
        return record.state, f"its driver lives, but was not heard of for {duration(silent_s)}"
    return record.state, record.why


def _ended(seen: Seen) -> tuple[str, str]:
    if seen.status == "SUCCEEDED":
        return "succeeded", ""
    if seen.status == "STOPPED" or seen.exit_code in (75, 143):
        return "stopped", "submitted again, it goes on from its newest checkpoint, if it has one"
    return "failed", seen.message.strip().partition("\n")[0]
