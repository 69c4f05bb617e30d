"""Makes schemas.json, which `tunesmith k8s validate` checks documents with.

    python -m tunesmith.cluster.kube.gather CRDS CORE > schemas.json

CRDS is a folder of files with `group`, `kind`, `version` and `schema`, as the operators' custom resource definitions have
them (KubeRay 1.7, Kueue: Apache-2.0). CORE is a folder of strict JSON schemas made from Kubernetes' OpenAPI document
(Apache-2.0), such as the package kubernetes-validate holds. Nothing is changed but for descriptions, which are left out,
and that subtrees which occur more than once stand under `$defs`.
"""

from __future__ import annotations

import hashlib
import json
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

CORE_KINDS = {
    "v1": [
        *("configmap", "limitrange", "namespace", "persistentvolumeclaim", "pod", "resourcequota", "secret", "service"),
        "serviceaccount",
    ],
    "apps/v1": ["deployment"],
    "batch/v1": ["job"],
    "networking.k8s.io/v1": ["networkpolicy"],
    "policy/v1": ["poddisruptionbudget"],
    "rbac.authorization.k8s.io/v1": ["role", "rolebinding"],
    "scheduling.k8s.io/v1": ["priorityclass"],
}
"""The core objects that our manifests use, or that people put beside them."""
LEFT_OUT = ("description", "$id", "$schema", "x-kubernetes-group-version-kind")
SHARED = 160
"""Characters from which a schema that occurs twice is written once."""
METADATA = "io.k8s.apimachinery.pkg.apis.meta.v1.ObjectMeta"


def gather(crds: Path, core: Path) -> dict[str, Any]:
    """One document with the schema of every kind under `kinds`, by `group/version/Kind`."""
    definitions = json.loads((core / "_definitions.json").read_text(encoding="utf-8"))["$defs"]
    kinds: dict[str, Any] = {}
    for path in sorted(crds.glob("*.json")):
        crd = json.loads(path.read_text(encoding="utf-8"))
        kinds[f"{crd['group']}/{crd['version']}/{crd['kind']}"] = crd["schema"]
    for version, names in CORE_KINDS.items():
        group = version.rpartition("/")[0].partition(".")[0]
        for name in names:
            file = f"{name}-{group}-v1.json" if group else f"{name}-v1.json"
            schema = _inlined(json.loads((core / file).read_text(encoding="utf-8")), definitions)
            kinds[f"{version}/{schema['properties']['kind']['enum'][0]}"] = schema
    metadata = _inlined(definitions[METADATA], definitions)
    return _shared(metadata, kinds)


def _inlined(schema: dict[str, Any], definitions: dict[str, Any]) -> dict[str, Any]:
    """The schema without references and descriptions."""
    while "$ref" in schema:
        schema = definitions[schema["$ref"].rpartition("/")[2]]
    plain = {key: value for key, value in schema.items() if key not in LEFT_OUT}
    return within(plain, lambda inner: _inlined(inner, definitions))


def within(schema: dict[str, Any], change: Callable[[dict[str, Any]], dict[str, Any]]) -> dict[str, Any]:
    """The schema with every schema directly below it changed."""
    found = dict(schema)
    if "properties" in found:
        found["properties"] = {name: change(inner) for name, inner in found["properties"].items()}
    for key in ("items", "additionalProperties"):
        if isinstance(found.get(key), dict):
            found[key] = change(found[key])
    for key in ("anyOf", "oneOf", "allOf"):
        if key in found:
            found[key] = [change(inner) for inner in found[key]]
    return found


def _shared(metadata: dict[str, Any], kinds: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """The schemas with every larger one that occurs more than once under `$defs`."""
    texts: Counter[str] = Counter()

    def count(schema: dict[str, Any]) -> dict[str, Any]:
        text = _text(schema)
        texts[text] += 1
        return schema if texts[text] > 1 else within(schema, count)  # what lies in a copy is written with it

    definitions: dict[str, Any] = {}

    def shared(schema: dict[str, Any]) -> dict[str, Any]:
        text = _text(schema)
        if texts[text] < 2 or len(text) < SHARED:
            return within(schema, shared)
        name = hashlib.sha256(text.encode()).hexdigest()[:10]
        if name not in definitions:
            definitions[name] = within(schema, shared)
        return {"$ref": f"#/$defs/{name}"}

    for schema in (metadata, *kinds.values()):
        count(schema)
    found = {
        "metadata": within(metadata, shared),
        "kinds": {name: within(kind, shared) for name, kind in kinds.items()},
    }
    return {**found, "$defs": dict(sorted(definitions.items()))}


def _text(node: Any) -> str:
    return json.dumps(node, sort_keys=True, separators=(",", ":"))


def main(crds: str, core: str) -> None:
    """Prints the document, one definition a line."""
    found = gather(Path(crds), Path(core))
    for section in ("metadata", "kinds", "$defs"):
        assert section in found, f"nothing under {section}"
    lines = [f' "metadata": {_text(found["metadata"])}']
    for section in ("kinds", "$defs"):
        entries = ",\n".join(f"  {json.dumps(name)}: {_text(schema)}" for name, schema in found[section].items())
        lines.append(f" {json.dumps(section)}: {{\n{entries}\n }}")
    print("{\n" + ",\n".join(lines) + "\n}")


if __name__ == "__main__":
    main(*sys.argv[1:])
