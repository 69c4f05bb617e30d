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
from tunesmith.cluster.kube import rules_cluster, rules_job, rules_kueue, rules_pods, rules_safety, schemas, strict
from tunesmith.cluster.kube.findings import Document, Finding

KUSTOMIZATION = "kustomization.yaml"
KUSTOMIZATIONS = (KUSTOMIZATION, "kustomization.yml", "Kustomization")
SUFFIXES = (".yaml", ".yml", ".json")
KUSTOMIZE = (("kubectl", "kustomize"), ("kustomize", "build"))
RULES: Mapping[str, str] = {
    **schemas.RULES,
    "core.twice": "no two documents that are applied together have the same kind, namespace and name",
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
    """The documents of `sources`, one after the other."""
    return [document for source in sources(paths)[0] for document in source]


def sources(paths: Iterable[Path]) -> tuple[list[list[tuple[str, Document]]], list[str]]:
    """What is applied together: all files that are named or lie in folders, and each folder with a kustomization by itself.

    Returns:
        The documents of each, and the files of folders that hold no manifest.

    Raises:
        UsageError: a path is not there or no YAML, or a kustomization cannot be built.
    """
    files: list[tuple[str, Document]] = []
    built: dict[Path, list[tuple[str, Document]]] = {}
    others: list[str] = []
    pending = [(path.parent if path.name in KUSTOMIZATIONS else path, True) for path in paths]
    while pending:
        path, named = pending.pop(0)
        if path in built:
            continue
        if any((path / name).is_file() for name in KUSTOMIZATIONS):
            built[path] = parse(build(path), str(path))
        elif path.is_dir():
            pending += [(inner, False) for inner in sorted(path.iterdir())]
        elif named:
            files += parse(_text(path), str(path))
        elif path.suffix in SUFFIXES:
            found = load(_text(path), str(path))
            if any(isinstance(one, dict) and one.keys() & {"apiVersion", "kind"} for one in found):
                files += parse(_text(path), str(path))
            else:
                others.append(str(path))
    every = [source for source in (files, *built.values()) if source]
    if not every:
        raise UsageError(f"no document in {', '.join(map(str, paths))}", "Name files or folders with manifests.")
    return every, others


def parse(text: str, file: str) -> list[tuple[str, Document]]:
    """The documents of a text; empty ones are left out, and a List is what it lists.

    Raises:
        UsageError: it is no YAML, or a document is no mapping.
    """
    found: list[tuple[str, Document]] = []
    for number, document in enumerate(load(text, file), 1):
        listed = isinstance(document, dict) and (document.get("apiVersion"), document.get("kind")) == ("v1", "List")
        for one in document.get("items") or [] if listed else [document]:
            if not isinstance(one, dict):
                raise UsageError(f"{file}: document {number} is no mapping but {str(one)[:60]!r}")
            found.append((file, one))
    return found


def load(text: str, file: str) -> list[Any]:
    """What YAML makes of a text; empty documents are left out.

    Raises:
        UsageError: it is no YAML, or a key stands twice in a mapping.
    """
    try:
        return [document for document in strict.load_all(text) if document is not None]
    except yaml.YAMLError as error:
        raise UsageError(f"{file}: not valid YAML: {' '.join(str(error).split())}") from None


def build(folder: Path) -> str:
    """What kustomize makes of a folder.

    Raises:
        UsageError: neither kubectl nor kustomize is there, or it fails; with what it says.
    """
    command = next((list(words) for words in KUSTOMIZE if shutil.which(words[0])), None)
    if command is None:
        raise UsageError(
            f"{folder} has a kustomization, and neither kubectl nor kustomize is installed here to build it",
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
