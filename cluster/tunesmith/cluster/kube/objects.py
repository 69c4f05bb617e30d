"""Documents as the rules look at them: Ray clusters, their groups, pods, containers, quantities and names."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from decimal import Decimal
from typing import Any

from tunesmith.cluster.kube.findings import Document
from tunesmith.cluster.recipe.lines import KeyPath

Object = Mapping[str, Any]

RAY_SPEC = {"RayCluster": (), "RayJob": ("rayClusterSpec",), "RayService": ("rayClusterConfig",)}
"""Where below `spec` the cluster of a Ray resource stands."""
TEMPLATES = {"Deployment": ("template",), "Job": ("template",)}
DNS_1035 = re.compile(r"[a-z]([-a-z0-9]*[a-z0-9])?")
DNS_1123 = re.compile(r"[a-z0-9]([-a-z0-9]*[a-z0-9])?")
SUBDOMAIN = re.compile(r"[a-z0-9]([-a-z0-9]*[a-z0-9])?(\.[a-z0-9]([-a-z0-9]*[a-z0-9])?)*")
LABEL_VALUE = re.compile(r"([A-Za-z0-9]([-A-Za-z0-9_.]{0,61}[A-Za-z0-9])?)?")
QUANTITY = re.compile(r"([+-]?[0-9.]+)([KMGTPE]i|[numkMGTPE]|[eE][+-]?[0-9]+)?")
NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)")
FACTORS = {"n": -9, "u": -6, "m": -3, "k": 3, "M": 6, "G": 9, "T": 12, "P": 15, "E": 18}
GPU = re.compile(r"(nvidia|amd|gpu\.intel)\.com/(gpu|mig-.+|i915)")
"""Resources of device plugins for GPUs."""
BYTES = re.compile(r"([0-9.]+)\s*([KMGTPE])i?B", re.IGNORECASE)
HEAD = "the head"


@dataclass(frozen=True)
class Group:
    """The head group or one worker group of a Ray cluster."""

    name: str
    """`the head`, or the worker group's own."""
    path: KeyPath
    spec: Object

    @property
    def is_head(self) -> bool:
        return self.path[-1] == "headGroupSpec"

    @property
    def pod(self) -> Object:
        """Its pods' spec."""
        return self.spec["template"].get("spec") or {}

    @property
    def ray(self) -> Object:
        """The container that Ray runs in; empty when there is none."""
        return next(iter(self.pod.get("containers") or []), {})


@dataclass(frozen=True)
class RayCluster:
    """The Ray cluster that a RayCluster, RayJob or RayService describes."""

    path: KeyPath
    spec: Object

    @property
    def head(self) -> Group:
        return Group(HEAD, (*self.path, "headGroupSpec"), self.spec["headGroupSpec"])

    @property
    def workers(self) -> list[Group]:
        groups = enumerate(self.spec.get("workerGroupSpecs") or [])
        return [Group(group["groupName"], (*self.path, "workerGroupSpecs", index), group) for index, group in groups]

    @property
    def autoscales(self) -> bool:
        return bool(self.spec.get("enableInTreeAutoscaling"))

    @property
    def autoscales_v2(self) -> bool:
        return self.autoscales and (
            (self.spec.get("autoscalerOptions") or {}).get("version") == "v2"
            or value_of("RAY_enable_autoscaler_v2", self.head.ray) in ("1", "true")
        )


@dataclass(frozen=True)
class Pod:
    """A pod, or the template of pods."""

    path: KeyPath
    """Of its spec."""
    spec: Object
    metadata: Object
    is_autoscaling_head: bool = False
    """Whether KubeRay puts its autoscaler, which speaks to the API server, into it."""

    @property
    def containers(self) -> list[tuple[KeyPath, Object]]:
        """All of them, those that run first included."""
        return [
            ((*self.path, key, index), container)
            for key in ("initContainers", "containers")
            for index, container in enumerate(self.spec.get(key) or [])
        ]


def ray_cluster(document: Document) -> RayCluster | None:
    """The cluster in a document; None when there is none."""
    keys = RAY_SPEC.get(document.get("kind", ""))
    spec = document.get("spec")
    for key in keys or ():
        spec = (spec or {}).get(key)
    return None if keys is None or spec is None else RayCluster(("spec", *keys), spec)


def pods(document: Document) -> Iterator[Pod]:
    """Every pod that a document describes."""
    kind, spec = document.get("kind"), document.get("spec") or {}
    if kind == "Pod":
        yield Pod(("spec",), spec, document.get("metadata") or {})
    templates = [(("spec", *keys), spec[keys[0]]) for keys in [TEMPLATES.get(str(kind))] if keys and keys[0] in spec]
    if kind == "RayJob" and "submitterPodTemplate" in spec:
        templates.append((("spec", "submitterPodTemplate"), spec["submitterPodTemplate"]))
    for path, template in templates:
        yield Pod((*path, "spec"), template.get("spec") or {}, template.get("metadata") or {})
    cluster = ray_cluster(document)
    if cluster is not None:
        for group in (cluster.head, *cluster.workers):
            metadata = group.spec["template"].get("metadata") or {}
            autoscales = group.is_head and cluster.autoscales
            yield Pod((*group.path, "template", "spec"), group.pod, metadata, autoscales)


def labels_of(document: Document) -> Object:
    """Of a document's metadata."""
    return (document.get("metadata") or {}).get("labels") or {}


def annotations_of(document: Document) -> Object:
    """Of a document's metadata."""
    return (document.get("metadata") or {}).get("annotations") or {}


def environment(container: Object) -> dict[str, Object]:
    """Entries of a container's `env` by name."""
    return {entry["name"]: entry for entry in container.get("env") or []}


def value_of(name: str, container: Object) -> str | None:
    """What a container's `env` says in plain text."""
    return environment(container).get(name, {}).get("value")


def quantity(text: str | int | float) -> Decimal:
    """The number that a quantity such as `500m` or `2Gi` stands for.

    Raises:
        ValueError: it is none.
    """
    match = QUANTITY.fullmatch(str(text))
    if match is None or not NUMBER.fullmatch(match[1]):
        raise ValueError(f"{text!r} is no quantity")
    number = Decimal(match[1])
    suffix = match[2] or ""
    if suffix.endswith("i"):
        return number * 1024 ** ("KMGTPE".index(suffix[0]) + 1)
    return number.scaleb(FACTORS[suffix] if suffix in FACTORS else int(suffix[1:] or 0))


def is_quantity(text: Any) -> bool:
    """Whether a text or number is a quantity."""
    match = QUANTITY.fullmatch(str(text))
    return match is not None and NUMBER.fullmatch(match[1]) is not None


def as_quantity(text: Any) -> str:
    """What to write for a text that is no quantity."""
    match = BYTES.fullmatch(str(text).strip())
    if match is None:
        return "Write such as 2, 500m or 16Gi."
    amount, unit = match[1], match[2].upper()
    small = "k" if unit == "K" else unit
    return f"Write {amount}{small} (powers of 1000) or {amount}{unit}i (of 1024)."


def version(text: str) -> tuple[int, ...] | None:
    """The numbers of a version such as 2.60.0; None when it is none."""
    match = re.match(r"v?(\d+(?:\.\d+)+)", text)
    return tuple(int(part) for part in match[1].split(".")) if match else None


def qualified_name(text: str) -> bool:
    """Whether a text is a label's key: an optional DNS subdomain with a slash, and a name of at most 63."""
    prefix, slash, name = text.rpartition("/")
    prefixed = not slash or (len(prefix) <= 253 and SUBDOMAIN.fullmatch(prefix) is not None)
    return prefixed and bool(name) and LABEL_VALUE.fullmatch(name) is not None
