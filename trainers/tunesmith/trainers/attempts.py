"""Whether to try again after workers were lost: a pure decision from what was observed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class LostAttempt:
    """An attempt that ended because workers were lost, not because training said so."""

    attempt: int
    causes: dict[int, str]
    """What is known of each lost rank."""
    started_at: int
    """Step of the newest checkpoint when it began; 0 for none."""
    ended_at: int
    """Step of the newest checkpoint when it ended."""
    cause: str = ""
    """What ended it that was no rank's."""

    @property
    def brought_a_checkpoint(self) -> bool:
        return self.ended_at > self.started_at


@dataclass(frozen=True)
class Retry:
    """Start the workers again."""

    warning: str


@dataclass(frozen=True)
class GiveUp:
    """Restarting does not help."""

    what: str
    fix: str


def decide(history: Sequence[LostAttempt], max_failures: int) -> Retry | GiveUp:
    """What to do after the last attempt of `history`, all of which lost workers.

    Restarts go on as long as they bring new checkpoints: a long run on machines that come and go may need hundreds.
    After `max_failures` restarts in a row that brought none, the cause is not chance.
    """
    assert history, "decide() is asked after an attempt"
    last = history[-1]
    barren = 0
    for attempt in reversed(history[1:]):
        if attempt.brought_a_checkpoint:
            break
        barren += 1
    if barren >= max_failures:
        restarts = f"{barren} restart{'s' if barren != 1 else ''} in a row brought no newer checkpoint than step {last.ended_at}"
        what = f"workers keep failing: {_causes(last)}"
        if barren:
            what += f"; {restarts}"
        fix = "Look at log.txt in the run's folder. When the cause is gone, the same command goes on from the last checkpoint."
        if max_failures == 0:
            fix += " train.max_failures: 0 allows no restart."
        return GiveUp(what, fix)
    resume = (
        f"going on from the checkpoint of step {last.ended_at}"
        if last.ended_at
        else "starting again from the beginning"
    )
    return Retry(f"attempt {last.attempt} lost {_causes(last)}; {resume}")


def _causes(attempt: LostAttempt) -> str:
    if not attempt.causes:
        return f"its workers ({attempt.cause})" if attempt.cause else "its workers"
    return ", ".join(f"rank {rank} ({cause})" for rank, cause in sorted(attempt.causes.items()))
