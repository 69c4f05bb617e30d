"""What travels with a job: everything that the cluster must know of it, and no secret."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
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


def left_out(asked: JobSpec, environment: Mapping[str, Any], job: JobSpec, its: Mapping[str, Any]) -> list[str]:
    """The options of a submission that the job has not which its key stands for. What was not given leaves nothing out.

    Args:
        environment: the runtime environment that was asked for.
        its: the one that the job has.
    """
    variables, its_variables = (
        {**one.get("env_vars", {}), **spec.secrets} for one, spec in ((environment, asked), (its, job))
    )
    options = {
        f"--priority {asked.record.priority}": asked.record.priority not in (0, job.record.priority),
        f"--user {asked.record.user}": asked.record.user != job.record.user,
        f"--expected-hours {(asked.expected_s or 0) / 3600:g}": asked.expected_s not in (None, job.expected_s),
        "--not-preemptible": job.preemptible and not asked.preemptible,
        "--any-version": job.check_versions and not asked.check_versions,
        "--ship-code": "py_modules" in environment and "py_modules" not in its,
    }
    options |= {f"--env {name}": its_variables.get(name) != value for name, value in variables.items()}
    return [option for option, differs in options.items() if differs]
