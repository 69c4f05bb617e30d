from __future__ import annotations

import pytest

from tunesmith.cluster.jobs.states import Seen, ending, state_of
from tunesmith.cluster.runstore import HEARD_S, JobRecord

NOW = 10_000.0
AWAY = "the cluster does not answer now"
KILLED = (
    "Job entrypoint command failed with exit code -9, last available logs (truncated to 20,000 chars):\nerror: old news"
)
RUNNING = Seen("RUNNING", "Job is currently running.")


def record(state: str = "running", heard_ago: float = 1.0, **fields) -> JobRecord:
    known = {"id": "bot-1", "key": "bot", "number": 1, "run": "bot", "folder": "/runs/bot", "user": "ann"}
    return JobRecord(**known, state=state, submitted_at=NOW - 5000, heard_at=NOW - heard_ago, **fields)


@pytest.mark.parametrize(
    ("known", "seen", "away", "state", "says"),
    [
        (record("queued", why="no room"), RUNNING, "", "queued", "no room"),
        (record("submitted"), RUNNING, "", "running", ""),
        (record("submitted"), Seen("PENDING"), "", "submitted", "Ray is starting its driver"),
        (record(), Seen("SUCCEEDED", exit_code=0, ended=True), "", "succeeded", ""),
        (record(), Seen("FAILED", "it broke\nhere", 1, True), "", "failed", "it broke"),
        (record(), Seen("FAILED", "ended, logs:\nerror: disk full\nFree some", 1, True), "", "failed", "disk full"),
        (record(), Seen("FAILED", "exit code 75", 75, True), "", "stopped", "goes on from its newest checkpoint"),
        (
            record(),
            Seen("FAILED", KILLED, -9, True),
            "",
            "failed",
            "its driver was killed (SIGKILL), from outside or because its node ran out of memory; submit it again with the "
            "same command: the run goes on from its newest checkpoint",
        ),
        (record(), Seen("STOPPED", ended=True), "", "stopped", "goes on from its newest checkpoint"),
        (
            record(),
            Seen("RUNNING", driver_lost=True),
            "",
            "lost",
            "its driver is gone, with the node that it ran on; submit it",
        ),
        (record(), Seen("FAILED", "died", ended=True, driver_lost=True), "", "lost", "its driver is gone"),
        (record(), None, "", "lost", "the cluster knows no such job any more"),
        (record(heard_ago=HEARD_S + 1), RUNNING, "", "running", "was not heard of for 2m 01s"),
        (record(), None, AWAY, "running", "the cluster does not answer now"),
        (
            record(heard_ago=HEARD_S + 1),
            None,
            AWAY,
            "lost",
            "its driver was not heard of for 2m 01s, and the cluster does not answer now; submit it again",
        ),
        (record("succeeded", why="whole"), Seen("RUNNING", driver_lost=True), "", "succeeded", "whole"),
    ],
)
def test_the_state_is_what_is_known_together(
    known: JobRecord, seen: Seen | None, away: str, state: str, says: str
) -> None:
    judged, why = state_of(known, seen, NOW, away)
    assert judged == state
    assert says in why


@pytest.mark.parametrize("state", ["submitted", "queued", "running", "saving"])
def test_none_is_at_work_for_ever_when_everything_it_hung_on_is_gone(state: str) -> None:
    silent = record(state, heard_ago=HEARD_S + 1)
    assert state_of(silent, None, NOW, AWAY)[0] == "lost"
    assert state_of(silent, None, NOW)[0] == "lost"
    assert state_of(silent, Seen("RUNNING", driver_lost=True), NOW)[0] == "lost"


@pytest.mark.parametrize(
    ("code", "error", "state", "says"),
    [
        (0, "", "succeeded", "its artifact is /nowhere/artifact"),
        (75, "", "stopped", "no checkpoint is there yet"),
        (143, "", "stopped", "no checkpoint is there yet"),
        (1, "runs/bot: disk full: 7 bytes needed", "failed", "runs/bot: disk full: 7 bytes needed"),
        (1, "", "failed", "`tunesmith train` ended with exit code 1; its log says why"),
        (
            -9,
            "old news",
            "failed",
            "killed (SIGKILL), from outside or because its node ran out of memory; submit it again with the same command; "
            "no checkpoint is there yet",
        ),
        (-11, "", "failed", "ended by signal 11 (Segmentation fault); submit it again"),
    ],
)
def test_the_end_of_the_command_is_told_with_its_cause(code: int, error: str, state: str, says: str) -> None:
    ended, why = ending(record(artifact="/nowhere/artifact"), code, error)
    assert ended == state
    assert says in why
