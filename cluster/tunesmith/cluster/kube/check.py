"""`tunesmith k8s validate`: files and folders to documents to findings."""

from __future__ import annotations

import shutil
import subprocess
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import yaml

from tunesmith.cluster.errors import UsageError
from tunesmith.cluster.kube import rules_cluster, rules_job, rules_kueue, rules_pods, rules_safety, schemas
from tunesmith.cluster.kube.findings import Document, Finding

KUSTOMIZATION = "kustomization.yaml"
KUSTOMIZE = (("kubectl", "kustomize"), ("kustomize", "build"))
RULES: Mapping[str, str] = {
    **schemas.RULES,
    "core.twice": "no two documents have the same kind, namespace and name",
    **rules_pods.RULES,
    **rules_cluster.RULES,
    **rules_job.RULES,
    **rules_kueue.RULES,
    **rules_safety.RULES,
}
"""Every rule by name, and what holds where it is kept."""
SHAPES = ("schema.kind", "schema.type", "schema.required", "schema.value")
"""Findings after which a document has not the shape that the other rules read."""


class InvalidManifestError(UsageError):
    """A Kubernetes document would be refused, or should be."""


def check_documents(
    documents: Iterable[tuple[str, Document]],
    extra: Mapping[str, Any] | None = None,
    gates: frozenset[str] = frozenset(),
) -> list[Finding]:
    """Findings about documents, in their order.

    Args:
        documents: each with the name of its file.
        extra: schemas besides ours.
        gates: feature gates that KubeRay's operator has on besides its own defaults.
    """
    found: list[Finding] = []
    seen: Counter[tuple[str, ...]] = Counter()
    for file, document in documents:
        metadata = document.get("metadata")
        metadata = metadata if isinstance(metadata, dict) else {}
        title = f"{document.get('kind', 'document')}/{metadata.get('name', '?')}"
        mistakes = schemas.check(document, extra)
        if not any(mistake.rule in SHAPES for mistake in mistakes):
            mistakes += rules_cluster.check(document, gates)
            for rules in (rules_pods, rules_job, rules_kueue, rules_safety):
                mistakes += rules.check(document)
        key = tuple(str(part) for part in (document.get("kind"), metadata.get("namespace"), metadata.get("name")))
        seen[key] += 1
        if seen[key] == 2:
            mistakes.append(Finding("core.twice", ("metadata", "name"), "it is there already", "Leave one out."))
        found += [mistake.at(file, title) for mistake in mistakes]
    return found


def read(paths: Iterable[Path]) -> list[tuple[str, Document]]:
    """The documents of files, of all YAML files of folders, and of what kustomize makes of folders with a kustomization.

    Raises:
        UsageError: a path is not there or no YAML, or a kustomization cannot be built.
    """
    found: list[tuple[str, Document]] = []
    for path in paths:
        if (path / KUSTOMIZATION).is_file():
            found += parse(build(path), str(path))
        elif path.is_dir():
            files = sorted(file for file in path.rglob("*") if file.suffix in (".yaml", ".yml", ".json"))
            for file in files:
                found += parse(_text(file), str(file))
        else:
            found += parse(_text(path), str(path))
    if not found:
        raise UsageError(f"no document in {', '.join(map(str, paths))}", "Name files or folders with manifests.")
    return found


def parse(text: str, file: str) -> list[tuple[str, Document]]:
    """The documents of a text; empty ones are left out.

    Raises:
        UsageError: it is no YAML, or a document is no mapping.
    """
    try:
        documents = [document for document in yaml.safe_load_all(text) if document is not None]
    except yaml.YAMLError as error:
        raise UsageError(f"{file}: not valid YAML: {' '.join(str(error).split())}") from None
    for number, document in enumerate(documents, 1):
        if not isinstance(document, dict):
            raise UsageError(f"{file}: document {number} is no mapping but {str(document)[:60]!r}")
    return [(file, document) for document in documents]


def build(folder: Path) -> str:
    """What kustomize makes of a folder.

    Raises:
        UsageError: neither kubectl nor kustomize is there, or it fails; with what it says.
    """
    command = next((list(words) for words in KUSTOMIZE if shutil.which(words[0])), None)
    if command is None:
        raise UsageError(
            f"{folder} has a {KUSTOMIZATION}, and neither kubectl nor kustomize is installed here to build it",
            "Install one of them, or check the files that it names.",
        )
    done = subprocess.run([*command, str(folder)], capture_output=True, text=True, check=False)
    if done.returncode:
        raise UsageError(f"{folder} cannot be built: {done.stderr.strip()}")
    return done.stdout


def refuse(found: list[Finding], documents: int) -> None:
    """Raises when there is a finding.

    Raises:
        InvalidManifestError: with a line for each.
    """
    if found:
        count = f"{len(found)} mistakes" if len(found) > 1 else "a mistake"
        raise InvalidManifestError(
            f"{count} in {documents} document{'s' if documents > 1 else ''}:\n"
            + "\n".join(finding.line() for finding in found),
            "docs/kubernetes.md lists the rules.",
        )


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise UsageError(f"cannot read {path}: {error.strerror or error}") from None
    except UnicodeDecodeError as error:
        raise UsageError(f"cannot read {path}: invalid UTF-8 at byte {error.start + 1}") from None
