"""What the queue decides from, and what it decides. Plain values."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from tunesmith.cluster.progress import duration
from tunesmith.cluster.resources import Need


@dataclass(frozen=True, slots=True)
class Job:
    """A job that asks for a gang of equal workers: all of them at once, or none."""

    id: str
    user: str
    need: Need
    """Workers, and what each of them takes."""
    submitted_at: float = 0.0
    """Seconds of any clock that all times of one decision share."""
    priority: int = 0
    """A higher one goes first, and may make a lower one save and wait."""
    gpu_kind: str = ""
    """Which GPUs; empty takes any, but all of one kind."""
    preemptible: bool = True
    """Whether it may be asked to save and wait."""
    expected_s: float | None = None
    """How long it will run, if anybody knows."""

    gang: str = field(init=False, repr=False, compare=False)
    """All that decides where it fits, as a key: jobs of equal gangs share it, and its hash is computed once."""

    def __post_init__(self) -> None:
        need = self.need
        gang = f"{need.workers}*{need.cpus}/{need.gpus}/{need.memory_gib}/{self.gpu_kind}"
        object.__setattr__(self, "gang", sys.intern(gang))


@dataclass(frozen=True)
class Running:
    """A job that has its workers."""

    job: Job
    placed: Mapping[str, int]
    """Workers by the name of their node."""
    started_at: float = 0.0
    remaining_s: float | None = None
    """How long it still runs, if anybody knows."""
    saving: bool = False
    """It was asked to save, and gives its workers back when it has."""
    lent_until: float | None = None
    """It started in room that is kept for another from this time on."""


@dataclass(frozen=True)
class Policy:
    """How users share the cluster."""

    weights: Mapping[str, float] = field(default_factory=dict)
    """Entitlement of a user relative to the others; 1 for who is not named."""
    half_life_s: float = 6 * 3600
    """After this time what a user has used counts half."""


class Start(NamedTuple):
    """Start the job now."""

    job: Job
    placed: dict[str, int]
    """Workers by the name of their node."""
    lent_until: float | None = None
    """When it must have ended, because the room is then another's; None when it is in nobody's way."""


class Preempt(NamedTuple):
    """Ask a running job to save and wait."""

    victim: Job
    beneficiary: Job


class NeverFits(NamedTuple):
    """The cluster is too small for the job, even when it is empty."""

    need: Need
    most: int
    """Workers of this shape that the empty cluster holds, on GPUs of one kind."""

    def __str__(self) -> str:
        return f"asks for {self.need}; the cluster holds {self.most} of these when it is empty"


class Next(NamedTuple):
    """The job is the first that waits, and room is kept for it."""

    need: Need
    fit: int
    """Workers of it that fit now."""
    saving: tuple[str, ...]
    """Jobs that save to make room for it."""
    opens_in_s: float | None
    """When there is room, as far as anybody knows."""
    opens_with: str
    """The job whose end makes the room; empty when none is known to."""

    def __str__(self) -> str:
        said = f"next in line: {self.fit} of {self.need} fit now"
        if self.saving:
            return f"{said}; room comes when {' and '.join(self.saving)} {_have(self.saving)} saved"
        if self.opens_with:
            when = "at an unknown time" if self.opens_in_s is None else f"in about {duration(self.opens_in_s)}"
            return f"{said}; room comes {when}, with the end of {self.opens_with}"
        return said


class Behind(NamedTuple):
    """Others come first. Where it stands in line is its place in `Decision.waits`."""

    need: Need
    fit: int
    """Workers of it that fit now."""
    first: str
    """The first in line, for which room is kept."""

    def __str__(self) -> str:
        said = f"{self.first} is first in line; {self.fit} of {self.need} fit now"
        return f"{said}, in room that is kept for {self.first}" if self.fit >= self.need.workers else said


Reason = NeverFits | Next | Behind


@dataclass(frozen=True)
class Decision:
    """What to do now. Every job of the queue is in `starts` or in `waits`."""

    starts: Sequence[Start]
    preempts: Sequence[Preempt]
    waits: Mapping[str, Reason]
    """Why each waiting job waits, by its id, the first in line first."""


def _have(many: Sequence[object]) -> str:
    return "have" if len(many) > 1 else "has"
