"""What a check found, and how findings are told apart."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal

from pydantic import BaseModel, ConfigDict

Verdict = Literal["ok", "warning", "failure", "skipped"]


class Finding(BaseModel):
    """One thing that was checked, in the manner of an error: what, with the numbers, and what to do."""

    model_config = ConfigDict(frozen=True, use_attribute_docstrings=True)

    check: str
    """Name of the check, as docs/doctor.md lists it."""
    verdict: Verdict
    """`failure` makes the exit code 1; `skipped` says why something was not checked."""
    where: str
    """The machines that it is true of."""
    what: str
    """What was found, with the numbers."""
    fix: str = ""
    """What to do about it; given with every warning and failure."""


def ok(check: str, where: str, what: str) -> Finding:
    return Finding(check=check, verdict="ok", where=where, what=what)


def skipped(check: str, where: str, what: str) -> Finding:
    return Finding(check=check, verdict="skipped", where=where, what=what)


def warning(check: str, where: str, what: str, fix: str) -> Finding:
    return Finding(check=check, verdict="warning", where=where, what=what, fix=fix)


def failure(check: str, where: str, what: str, fix: str) -> Finding:
    return Finding(check=check, verdict="failure", where=where, what=what, fix=fix)


def merged(findings: Iterable[Finding]) -> list[Finding]:
    """The findings, with one line for what is true of several machines."""
    together: dict[tuple[str, ...], list[Finding]] = {}
    for finding in findings:
        together.setdefault((finding.check, finding.verdict, finding.what, finding.fix), []).append(finding)
    return [
        same[0].model_copy(update={"where": ", ".join(dict.fromkeys(one.where for one in same))})
        for same in together.values()
    ]
