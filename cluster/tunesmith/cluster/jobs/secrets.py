"""Secrets by reference only: where a secret lies may be told, the secret itself never travels with a job.

What is submitted is shown by Ray's dashboard and jobs API, and stays in logs. So `--env` takes `NAME=env:OTHER` (a variable of the
cluster's own environment, such as one from a Kubernetes secret) and `NAME=file:/path` (a file there), resolved where the job
runs, and whatever looks like a secret in a recipe or in a plain value is refused.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from tunesmith.cluster.errors import UsageError

HIDDEN = "********"
SHORTEST = 4
"""Characters of what is hidden: what is shorter stands in too many words."""

_SHAPES = {
    "a Hugging Face token": r"\bhf_[A-Za-z0-9]{20,}",
    "an AWS key": r"\b(?:AKIA|ASIA)[A-Z0-9]{16}\b",
    "a GitHub token": r"\b(?:gh[pousr]_[A-Za-z0-9]{30,}|github_pat_\w{30,})",
    "a GitLab token": r"\bglpat-[\w-]{15,}",
    "an API key": r"\b(?:sk|rk|pk)-[A-Za-z0-9_-]{20,}",
    "a Slack token": r"\bxox[abprs]-[\w-]{10,}",
    "a Google key": r"\bAIza[\w-]{35}",
    "a signed web token": r"\beyJ[\w-]{10,}\.[\w-]{10,}\.[\w-]{5,}",
    "a private key": r"-----BEGIN [A-Z ]*PRIVATE KEY-----",
    "a password in an address": r"\b\w+://[^/\s:@]+:[^/\s@]+@",
    "a long run of hexadecimal digits": r"\b[0-9a-fA-F]{40,}\b",
}
_TELLING_NAME = re.compile(r"(?:TOKEN|SECRET|PASSWORD|PASSWD|API_?KEY|ACCESS_?KEY|CREDENTIALS?)$", re.IGNORECASE)
_OF_THE_NODES = re.compile(r"PATH|PYTHONPATH|PYTHONHOME|LD_PRELOAD|RAY_\w*")
"""Variables without which Ray starts no process, or another one than it means to."""
_REFERENCE = re.compile(r"(env|file):(.+)", re.DOTALL)


def refuse_in_recipe(recipe: Mapping[str, Any]) -> None:
    """Raises UsageError when a value of the recipe looks like a secret; does not repeat it."""
    for key, value in _leaves(recipe):
        found = looks_like(value)
        is_commit = key.endswith("revision") and re.fullmatch("[0-9a-f]{40}", value)
        if found and not is_commit:
            raise UsageError(
                f"{key}: looks like {found}; what is submitted is shown by Ray's dashboard and stays in logs",
                "Leave it out, and name where the cluster finds it: --env NAME=env:NAME or --env NAME=file:/path.",
            )


def split(given: list[str]) -> tuple[dict[str, str], dict[str, str]]:
    """Plain variables and references, from `NAME=VALUE` strings.

    Raises:
        UsageError: not of that form, a variable that the nodes themselves need, or a plain value looks like a secret.
    """
    plain, references = {}, {}
    for entry in given:
        name, equals, value = entry.partition("=")
        if not equals or not re.fullmatch(r"[A-Za-z_]\w*", name):
            raise UsageError(f"--env {name or entry}: not of the form NAME=VALUE, NAME=env:NAME or NAME=file:PATH")
        if _OF_THE_NODES.fullmatch(name):
            raise UsageError(
                f"--env {name}: with another one the cluster's nodes could not start the job",
                "Leave it out, or set it where the cluster's nodes are started.",
            )
        if value in ("env:", "file:"):
            raise UsageError(
                f"--env {entry}: does not say {'of which variable' if value == 'env:' else 'of which file'}",
                f"Name it: --env {name}=env:{name} or --env {name}=file:/path.",
            )
        if _REFERENCE.fullmatch(value):
            references[name] = value
            continue
        found = looks_like(value) or ("a secret, by its name" if _TELLING_NAME.search(name) and value else "")
        if found:
            raise UsageError(
                f"--env {name}: looks like {found}, and what is submitted is shown by Ray's dashboard",
                f"Name where the cluster finds it: --env {name}=env:{name} or --env {name}=file:/path.",
            )
        plain[name] = value
    return plain, references


def looks_like(value: str) -> str:
    """What kind of secret a value looks like; empty when like none."""
    return next((what for what, shape in _SHAPES.items() if re.search(shape, value)), "")


def resolve(references: Mapping[str, str], environment: Mapping[str, str] | None = None) -> dict[str, str]:
    """The secrets themselves, where they are needed.

    Raises:
        UsageError: a variable or a file is not there; names it.
    """
    environment = os.environ if environment is None else environment
    found = {}
    for name, reference in references.items():
        match = _REFERENCE.fullmatch(reference)
        assert match, f"{name}: {reference} is no reference"
        kind, where = match.groups()
        try:
            found[name] = environment[where] if kind == "env" else Path(where).read_text().strip()
        except KeyError:
            raise UsageError(
                f"{name}: the cluster's environment has no {where}", "Set it where the cluster's nodes are started."
            ) from None
        except OSError as error:
            raise UsageError(f"{name}: {where}: {error.strerror or error}, on the node of the job's driver") from None
    return found


def hide(text: str, secrets: Mapping[str, str]) -> str:
    """The text without any of the secrets, whole or, as what is printed comes by the line, any line of them."""
    for secret in secrets.values():
        for part in (secret, *secret.splitlines()):
            if len(part.strip()) >= SHORTEST:
                text = text.replace(part.strip(), HIDDEN)
    return text


def _leaves(value: Any, key: str = "") -> Iterator[tuple[str, str]]:
    if isinstance(value, Mapping):
        for name, item in value.items():
            yield from _leaves(item, f"{key}.{name}" if key else str(name))
    elif isinstance(value, list):
        for at, item in enumerate(value):
            yield from _leaves(item, f"{key}.{at}")
    elif isinstance(value, str):
        yield key, value
