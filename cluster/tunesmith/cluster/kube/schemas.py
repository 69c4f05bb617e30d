"""The shapes of documents: JSON schemas of the custom resources and core objects, unknown keys refused."""

from __future__ import annotations

import difflib
import functools
import json
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from jsonschema import Draft202012Validator, FormatChecker, ValidationError, validators

from tunesmith.cluster.errors import UsageError
from tunesmith.cluster.kube.findings import Document, Finding
from tunesmith.cluster.kube.gather import within
from tunesmith.cluster.kube.objects import as_quantity
from tunesmith.cluster.recipe.lines import KeyPath

SHIPPED = Path(__file__).with_name("schemas.json")
"""Of KubeRay 1.7, Kueue and Kubernetes 1.34; made by `gather.py`."""
SUBSET = Path(__file__).with_name("subset.json")
"""Of kinds from elsewhere: no more than the fields that our manifests use."""
QUANTITY_PATTERN = (
    r"^(\+|-)?(([0-9]+(\.[0-9]*)?)|(\.[0-9]+))(([KMGTPE]i)|[numkMGTPE]|([eE](\+|-)?(([0-9]+(\.[0-9]*)?)|(\.[0-9]+))))?$"
)
"""How the schemas say that a text is a quantity."""

RULES = {
    "schema.kind": "the document names an apiVersion and a kind whose schema is known",
    "schema.unknown": "every key is one that the API server keeps",
    "schema.required": "no required key is missing",
    "schema.type": "every value has the type that the schema says",
    "schema.value": "every value is one of those that the schema allows: enumerations, patterns, bounds, sizes",
    "schema.duplicate": "entries of a list that is a map or a set differ in their key",
    "schema.cel": "the rules that a custom resource definition carries in its own schema hold",
}


def check(document: Document, extra: Mapping[str, Any] | None = None) -> list[Finding]:
    """What of a document its schema refuses.

    Args:
        document: as YAML gives it.
        extra: further schemas, from `load_folder`.
    """
    name = f"{document.get('apiVersion')}/{document.get('kind')}"
    schemas = {**_kinds(), **(extra or {})}
    if name not in schemas:
        near = difflib.get_close_matches(name, schemas, n=1)
        known = sorted({key.rpartition("/")[2] for key in schemas})
        hint = f"Did you mean {near[0]}?" if near else f"Known are {', '.join(known)}."
        what = f"no schema of {name} is known"
        return [Finding("schema.kind", ("kind",), what, f"{hint} Others come with --schemas FOLDER.")]
    validator = _VALIDATOR({**schemas[name], "$defs": _definitions()}, format_checker=_FORMATS)
    return [finding for error in validator.iter_errors(document) for finding in _explained(error)]


def load_folder(folder: Path) -> dict[str, Any]:
    """Schemas of custom resources from files with `group`, `kind`, `version` and `schema`; they win over those shipped.

    Raises:
        UsageError: a file is no such schema, or there is none.
    """
    found: dict[str, Any] = {}
    for path in sorted(folder.glob("*.json")):
        try:
            crd = json.loads(path.read_text(encoding="utf-8"))
            found[f"{crd['group']}/{crd['version']}/{crd['kind']}"] = _ready(crd["schema"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UsageError(
                f"--schemas: {path} cannot be read as a schema ({type(error).__name__}: {error})",
                "A file has the keys group, kind, version and schema (openAPIV3Schema of the definition's version).",
            ) from error
    if not found:
        raise UsageError(f"--schemas: no *.json in {folder}")
    return found


@functools.cache
def shipped() -> dict[str, Any]:
    """`schemas.json` as it is."""
    return json.loads(SHIPPED.read_text(encoding="utf-8"))


@functools.cache
def _kinds() -> dict[str, Any]:
    subset = json.loads(SUBSET.read_text(encoding="utf-8"))
    return {name: _ready(schema) for name, schema in {**subset, **shipped()["kinds"]}.items()}


@functools.cache
def _definitions() -> dict[str, Any]:
    return {name: _closed(schema) for name, schema in shipped()["$defs"].items()}


def _ready(schema: dict[str, Any]) -> dict[str, Any]:
    """A kind's schema with the metadata of every object in it, which definitions leave open."""
    schema = _closed(schema)
    if schema["properties"].get("metadata") == {"type": "object"}:
        schema["properties"] = schema["properties"] | {"metadata": _closed(shipped()["metadata"])}
    return schema


def _closed(schema: dict[str, Any]) -> dict[str, Any]:
    """The API server prunes keys that a schema does not name: what was misspelt would silently be the default."""
    schema = within(schema, _closed)
    if "properties" in schema and not schema.keys() & {"additionalProperties", "x-kubernetes-preserve-unknown-fields"}:
        schema["additionalProperties"] = False
    return schema


def _explained(error: Any) -> Iterator[Finding]:
    path: KeyPath = tuple(error.absolute_path)
    shown = json.dumps(error.instance, ensure_ascii=False)
    shown = shown if len(shown) < 80 else f"{shown[:77]}…"
    keyword = str(error.validator)
    wanted, schema = error.validator_value, error.schema
    if keyword == "additionalProperties":
        for key in error.instance.keys() - schema["properties"].keys():
            near = difflib.get_close_matches(key, schema["properties"], n=1)
            fix = f"Did you mean {near[0]}?" if near else f"The keys here are {', '.join(schema['properties'])}."
            yield Finding("schema.unknown", (*path, key), "no such key", fix)
    elif keyword == "required":
        missing = next(key for key in wanted if key not in error.instance and f"'{key}'" in error.message)
        yield Finding("schema.required", (*path, missing), "missing", "Write it: the API server refuses it without.")
    elif keyword == "type":
        kinds = [kind for kind in ([wanted] if isinstance(wanted, str) else wanted) if kind != "null"]
        yield Finding("schema.type", path, f"{shown} is no {' or '.join(kinds)}", f"Write a value of type {kinds[0]}.")
    elif keyword in ("x-kubernetes-validations", "x-kubernetes-list-type"):
        rule = "schema.cel" if keyword == "x-kubernetes-validations" else "schema.duplicate"
        yield Finding(rule, path, error.message, "The API server refuses it.")
    elif keyword == "enum":
        near = difflib.get_close_matches(str(error.instance), map(str, wanted), n=1)
        fix = f"Did you mean {near[0]}?" if near else f"Write one of {', '.join(map(str, wanted))}."
        yield Finding("schema.value", path, f"{shown} is not one of {', '.join(map(str, wanted))}", fix)
    elif keyword == "pattern" and wanted == QUANTITY_PATTERN:
        yield Finding("schema.value", path, f"{shown} is no quantity", as_quantity(error.instance))
    else:
        yield Finding("schema.value", path, error.message, f"The schema says {keyword}: {json.dumps(wanted)[:120]}.")


def _lists(_: Any, kind: str, instance: Any, schema: dict[str, Any]) -> Iterator[ValidationError]:
    """`x-kubernetes-list-type`: sets hold a value once, maps a key once."""
    if not isinstance(instance, list) or kind == "atomic":
        return
    keys = schema.get("x-kubernetes-list-map-keys") if kind == "map" else None
    items = schema.get("items", {})
    seen: list[Any] = []
    for item in instance:
        if keys and not isinstance(item, dict):
            continue
        defaults = {key: items.get("properties", {}).get(key, {}).get("default") for key in keys or ()}
        value = [item.get(key, defaults[key]) for key in keys] if keys else item
        if value in seen:
            named = ", ".join(f"{key} {part}" for key, part in zip(keys, value, strict=True)) if keys else value
            yield ValidationError(f"{named} stands twice in this list")
        seen.append(value)


def _cel(_: Any, rules: list[dict[str, str]], instance: Any, __: Any) -> Iterator[ValidationError]:
    """`x-kubernetes-validations`; what compares with an earlier version of the object has nothing to compare here."""
    for rule in rules:
        holds = CEL.get(_plain(rule["rule"]))
        if holds is not None and not holds(instance):
            yield ValidationError(rule["message"])


def unchecked_rules(schema: Any) -> list[str]:
    """Rules of a schema in its own language that are not in our table: only --schemas brings such."""
    if isinstance(schema, dict):
        own = [_plain(rule["rule"]) for rule in schema.get("x-kubernetes-validations", [])]
        found = [rule for rule in own if "oldSelf" not in rule and rule not in CEL]
        return found + [rule for value in schema.values() for rule in unchecked_rules(value)]
    return [rule for item in schema for rule in unchecked_rules(item)] if isinstance(schema, list) else []


def _plain(rule: str) -> str:
    return " ".join(rule.split())


def _limits(group: dict[str, Any]) -> bool:
    return any("borrowingLimit" in resource for flavor in group["flavors"] for resource in flavor["resources"])


def _within_cohort(cohort: str) -> Callable[[Any], bool]:
    return lambda spec: cohort in spec or not any(map(_limits, spec.get("resourceGroups", [])))


EFFECTS = ("NoSchedule", "PreferNoSchedule", "NoExecute")
MANAGERS = ("ray.io/kuberay-operator", "kueue.x-k8s.io/multikueue")
CEL: dict[str, Callable[[Any], bool]] = {
    "!has(self.cohort) && has(self.resourceGroups) ? self.resourceGroups.all(rg, rg.flavors.all(f, f.resources.all(r, "
    "!has(r.borrowingLimit)))) : true": _within_cohort("cohort"),
    "!has(self.cohortName) && has(self.resourceGroups) ? self.resourceGroups.all(rg, rg.flavors.all(f, f.resources.all(r, "
    "!has(r.borrowingLimit)))) : true": _within_cohort("cohortName"),
    "!has(self.preference) || (self.whenCanBorrow == 'TryNextFlavor' && self.whenCanPreempt == 'TryNextFlavor')": (
        lambda it: "preference" not in it or it.get("whenCanBorrow") == it.get("whenCanPreempt") == "TryNextFlavor"
    ),
    "!(self.reclaimWithinCohort == 'Never' && has(self.borrowWithinCohort) && self.borrowWithinCohort.policy != 'Never')": (
        lambda it: (
            it.get("reclaimWithinCohort", "Never") != "Never"
            or it.get("borrowWithinCohort", {}).get("policy", "Never") == "Never"
        )
    ),
    "self.flavors.all(x, size(x.resources) == size(self.coveredResources))": (
        lambda it: all(len(flavor["resources"]) == len(it["coveredResources"]) for flavor in it["flavors"])
    ),
    "self in ['ray.io/kuberay-operator', 'kueue.x-k8s.io/multikueue']": lambda it: it in MANAGERS,
    "!((has(self.onSuccess) || has(self.onFailure)) && has(self.deletionRules))": (
        lambda it: not (it.keys() & {"onSuccess", "onFailure"} and "deletionRules" in it)
    ),
    "((has(self.onSuccess) && has(self.onFailure)) || has(self.deletionRules))": (
        lambda it: it.keys() >= {"onSuccess", "onFailure"} or "deletionRules" in it
    ),
    "!(has(self.jobStatus) && has(self.jobDeploymentStatus))": (
        lambda it: not it.keys() >= {"jobStatus", "jobDeploymentStatus"}
    ),
    "has(self.jobStatus) || has(self.jobDeploymentStatus)": (
        lambda it: bool(it.keys() & {"jobStatus", "jobDeploymentStatus"})
    ),
    "!has(self.topologyName) || self.nodeLabels.size() >= 1": (
        lambda it: "topologyName" not in it or bool(it.get("nodeLabels"))
    ),
    "self.all(x, x.effect in ['NoSchedule', 'PreferNoSchedule', 'NoExecute'])": (
        lambda it: all(taint.get("effect") in EFFECTS for taint in it)
    ),
    "self.all(x, !has(x.effect) || x.effect in ['NoSchedule', 'PreferNoSchedule', 'NoExecute'])": (
        lambda it: all(one.get("effect", EFFECTS[0]) in EFFECTS for one in it)
    ),
    "self.all(x, !has(x.key) ? x.operator == 'Exists' : true)": (
        lambda it: all("key" in one or one.get("operator") == "Exists" for one in it)
    ),
    "self.all(x, has(x.tolerationSeconds) ? x.effect == 'NoExecute' : true)": (
        lambda it: all("tolerationSeconds" not in one or one.get("effect") == "NoExecute" for one in it)
    ),
    "self.all(x, !has(x.operator) || x.operator in ['Equal', 'Exists'])": (
        lambda it: all(one.get("operator", "Equal") in ("Equal", "Exists") for one in it)
    ),
    "self.all(x, has(x.operator) && x.operator == 'Exists' ? !has(x.value) : true)": (
        lambda it: all(one.get("operator") != "Exists" or "value" not in one for one in it)
    ),
}
"""What the rules in the schemas' own language say, by their text. A test holds this table against all schemas."""

_FORMATS = FormatChecker(formats=())


@_FORMATS.checks("int32")
def _is_int32(value: object) -> bool:
    return not isinstance(value, int) or -(2**31) <= value < 2**31


@_FORMATS.checks("int64")
def _is_int64(value: object) -> bool:
    return not isinstance(value, int) or -(2**63) <= value < 2**63


@_FORMATS.checks("byte")
def _is_base64(value: object) -> bool:
    return not isinstance(value, str) or bool(re.fullmatch(r"[A-Za-z0-9+/\s]*=?=?\s*", value))


_VALIDATOR: Any = validators.extend(
    Draft202012Validator, {"x-kubernetes-list-type": _lists, "x-kubernetes-validations": _cel}
)
