"""Documents as YAML, on standard output or as a folder that `kubectl apply -k` takes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from tunesmith.cluster.errors import OutputError
from tunesmith.cluster.kube.check import KUSTOMIZATION
from tunesmith.cluster.kube.objects import pods
from tunesmith.cluster.storage import write_atomic


class _Dumper(yaml.SafeDumper):
    """Texts of several lines as blocks, no anchors, lists indented below their key."""

    def ignore_aliases(self, data: Any) -> bool:
        return True

    def increase_indent(self, flow: bool = False, indentless: bool = False) -> None:
        super().increase_indent(flow, False)


def _text(dumper: yaml.SafeDumper, value: str) -> yaml.Node:
    style = "|" if "\n" in value else None
    return dumper.represent_scalar("tag:yaml.org,2002:str", value, style=style)


_Dumper.add_representer(str, _text)


def as_yaml(documents: Sequence[dict[str, Any]]) -> str:
    """One text of all documents."""
    return yaml.dump_all(documents, Dumper=_Dumper, sort_keys=False, width=120, allow_unicode=True)


def write(documents: Sequence[dict[str, Any]], folder: Path) -> list[Path]:
    """A file for each document, and a kustomization of them, whose `images` says where nodes find them; returns their paths.

    Raises:
        OutputError: the folder cannot be made or written.
    """
    names = [f"{document['kind'].lower()}.yaml" for document in documents]
    assert len(set(names)) == len(names), f"two documents of one kind: {names}"
    listing = {
        "apiVersion": "kustomize.config.k8s.io/v1beta1",
        "kind": "Kustomization",
        "resources": names,
        "images": _images(documents),
    }
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(f"{folder}: cannot be made: {error.strerror or error}", "Choose another --out.") from error
    written = []
    for name, document in zip([*names, KUSTOMIZATION], [*documents, listing], strict=True):
        write_atomic(folder / name, as_yaml([document]))
        written.append(folder / name)
    return written


def _images(documents: Sequence[dict[str, Any]]) -> list[dict[str, str]]:
    """As kustomize replaces them: by name, with the tag or digest that they have now."""
    found: dict[str, dict[str, str]] = {}
    for image in (box["image"] for document in documents for pod in pods(document) for _, box in pod.containers):
        tagged, _, digest = image.partition("@")
        tag = tagged.rpartition("/")[2].partition(":")[2]
        name = tagged.removesuffix(f":{tag}")
        found[name] = {"name": name, "newName": name, **({"digest": digest} if digest else {"newTag": tag})}
    return list(found.values())
