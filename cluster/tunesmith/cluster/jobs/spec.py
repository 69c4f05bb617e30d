"""What travels with a job: everything that the cluster must know of it, and no secret."""

from __future__ import annotations

import hashlib
import re
from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from tunesmith.cluster.runstore import JobRecord

METADATA_KEY = "tunesmith"
"""Under which Ray's jobs API holds it."""


class JobSpec(BaseModel):
    """A job as it was submitted."""

    model_config = ConfigDict(frozen=True, use_attribute_docstrings=True)

    record: JobRecord
    """Who, what and where."""
    recipe: dict[str, Any]
    """The recipe, overrides applied, defaults left out."""
    cwd: str
    """Where it was submitted from: relative paths of the recipe mean the same there, if the cluster sees that folder."""
    versions: dict[str, str]
    """Of the submitter's libraries."""
    check_versions: bool = True
    """Whether a difference from the cluster's ends the job."""
    secrets: dict[str, str] = Field(default_factory=dict)
    """References by the variable that they fill."""
    expected_s: float | None = None
    """How long it will run, as the submitter thinks."""
    preemptible: bool = True
    """Whether it may be asked to save and wait."""


def job_id(run: str, key: str, number: int) -> str:
    """What Ray calls the `number`-th job of a key. Ray itself refuses a second one of that name."""
    return f"{prefix(run, key)}{number}"


def prefix(run: str, key: str) -> str:
    """What the ids of all jobs of a key begin with."""
    return f"{re.sub('[^a-z0-9-]', '-', run)}-{hashlib.sha256(key.encode()).hexdigest()[:8]}-"
