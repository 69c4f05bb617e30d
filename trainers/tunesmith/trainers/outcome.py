"""How an attempt ended, as its workers tell the driver: `outcome-<attempt>.json`.

Workers and driver share the run's folder, not a pickle: a worker of another version, or one that dies while it
reports, cannot confuse the driver. The first worker to write decides.
"""

from __future__ import annotations

import json
import os
import traceback
import uuid
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tunesmith.cluster import errors
from tunesmith.cluster.errors import TunesmithError, WorkerError


@dataclass(frozen=True)
class AttemptOutcome:
    """What `outcome-<attempt>.json` says: done with a result, failed by one of our errors, or crashed by another."""

    kind: str
    """`done`, `error` or `crash`."""
    rank: int
    result: dict[str, Any] = field(default_factory=dict)
    """Of `done`: what `loop.train` returned."""
    error: str = ""
    """Class name of the exception."""
    what: str = ""
    fix: str = ""
    trace: str = ""
    """Of `crash`: the traceback."""

    @staticmethod
    def done(rank: int, result: dict[str, Any]) -> AttemptOutcome:
        return AttemptOutcome("done", rank, result=result)

    @staticmethod
    def failed(rank: int, error: BaseException) -> AttemptOutcome:
        if isinstance(error, TunesmithError):
            return AttemptOutcome("error", rank, error=type(error).__name__, what=error.what, fix=error.fix)
        trace = "".join(traceback.format_exception(error))
        return AttemptOutcome("crash", rank, error=type(error).__name__, what=str(error), trace=trace)

    def to_error(self) -> TunesmithError:
        """The exception to raise in the driver: of the worker's own class, so that the exit code is its class's."""
        if self.kind == "error":
            known = getattr(errors, self.error, TunesmithError)
            return known(self.what, self.fix)
        return WorkerError(f"rank {self.rank} failed with {self.error}: {self.what}\n\n{self.trace}".rstrip())


def write_outcome(path: Path, outcome: AttemptOutcome) -> bool:
    """Writes it whole or not at all; says whether this worker was the first."""
    temporary = path.with_name(f"{path.name}.tmp-{uuid.uuid4().hex[:8]}")
    with temporary.open("w") as file:
        file.write(json.dumps(outcome.__dict__, indent=1))
        file.flush()
        os.fsync(file.fileno())  # or a power cut could leave an empty file under the final name
    try:
        os.link(temporary, path)
    except FileExistsError:
        return False
    finally:
        temporary.unlink()
    return True


def read_outcome(path: Path) -> AttemptOutcome | None:
    """What the workers wrote, or None when they could not, or not whole."""
    try:
        return AttemptOutcome(**json.loads(path.read_text()))
    except (FileNotFoundError, ValueError, TypeError):
        return None
