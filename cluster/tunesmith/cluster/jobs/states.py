"""What a job is doing, judged from all who know something of it: a pure decision, so that none says running for ever."""

from __future__ import annotations

import signal
from dataclasses import dataclass

from tunesmith.cluster.progress import duration
from tunesmith.cluster.runstore import HEARD_S, JobRecord, how_far

SAVED, FAILED, STOPPED_AT_ONCE = 75, 1, 143

AGAIN = "submit it again with the same command"
GOES_ON = "the run goes on from its newest checkpoint, if it has one"


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


def state_of(record: JobRecord, seen: Seen | None, now: float, away: str = "") -> tuple[str, str]:
    """The job's state, and why.

    Args:
        record: as this machine knows it, or else as it was submitted.
        seen: what the cluster says; None when it knows no such job, or was not asked.
        now: seconds since 1970.
        away: why the cluster was not asked; empty when it was.
    """
    if record.ended:
        return record.state, record.why
    silent_s = now - max(record.heard_at, record.submitted_at)
    if away:
        if silent_s > HEARD_S:
            return "lost", f"its driver was not heard of for {duration(silent_s)}, and {away}; {AGAIN}: {GOES_ON}"
        return record.state, f"{record.why + '; ' if record.why else ''}{away}"
    if seen is None:
        return "lost", f"the cluster knows no such job any more: it was made anew; {AGAIN}: {GOES_ON}"
    if seen.driver_lost:
        return "lost", f"its driver is gone, with the node that it ran on; {AGAIN}: {GOES_ON}"
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
    if seen.status == "STOPPED" or seen.exit_code in (SAVED, STOPPED_AT_ONCE):
        return "stopped", f"{AGAIN}: {GOES_ON}"
    if seen.exit_code is not None and seen.exit_code < 0:
        return "failed", f"its driver {_killed(-seen.exit_code)}; {AGAIN}: {GOES_ON}"
    return "failed", error_in(seen.message) or seen.message.strip().partition("\n")[0]


def ending(record: JobRecord, code: int, error: str) -> tuple[str, str]:
    """The state of a job whose command has ended, and why.

    Args:
        code: the command's exit code; less than 0 when a signal of that number ended it.
        error: its last line that tells of an error.
    """
    command = f"`tunesmith {record.kind}`"
    if code == 0:
        return "succeeded", f"its artifact is {record.artifact}"
    if code in (SAVED, STOPPED_AT_ONCE):
        return "stopped", how_far(record)
    if code < 0:
        return "failed", f"{command} {_killed(-code)}; {AGAIN}; {how_far(record)}"
    return "failed", error or f"{command} ended with exit code {code}; its log says why"


def _killed(by: int) -> str:
    """What a signal has done to a process, in words."""
    if by == signal.SIGKILL:
        return "was killed (SIGKILL), from outside or because its node ran out of memory"
    return f"was ended by signal {by} ({signal.strsignal(by)})"


def error_in(text: str) -> str:
    """What the last line of a log says that begins with `error:`, as a command that fails ends; empty when none does."""
    said = [line.removeprefix("error: ") for line in text.splitlines() if line.startswith("error: ")]
    return said[-1] if said else ""
