"""What a run tells whoever watches it, while it goes on."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Note:
    """Something worth saying aloud, one line or a few."""

    text: str


@dataclass(frozen=True)
class Warned:
    """Something went wrong and the run goes on all the same."""

    text: str


@dataclass(frozen=True)
class Training:
    """Workers were asked to train."""

    run: str
    attempt: int
    from_step: int
    """Step of the checkpoint it goes on from; 0 when it begins."""
    total_steps: int | None
    """Optimizer steps of the whole run, when the recipe says."""


@dataclass(frozen=True)
class Step:
    """An optimizer step was done: its line of metrics.jsonl."""

    line: dict[str, Any]


@dataclass(frozen=True)
class Ended:
    """Workers are gone, however it ended."""


Event = Note | Warned | Training | Step | Ended
Listener = Callable[[Event], None]


def ignore(event: Event) -> None:
    """Listens to nothing."""
