"""Kubernetes documents for tests: valid ones to begin with, and a way to break them in one place."""

from __future__ import annotations

import copy
from typing import Any

from tunesmith.cluster.kube import rayjob, rayservice
from tunesmith.cluster.kube.pods import Placement, PodSize

GONE = object()
PLACEMENT = Placement(image="tunesmith:0.1.0-gpu", queue="gpu", priority="normal", secret="tunesmith")
RECIPE = "name: bot\nmodel: {base: meta-llama/Llama-3.1-8B}\n"


def job(**changes: Any) -> dict[str, Any]:
    """A queued RayJob on two nodes of eight GPUs."""
    given = {
        "run": "bot",
        "command": "train",
        "recipe": RECIPE,
        "overrides": ["cluster.workers=16"],
        "folder": "/shared/runs/bot",
        "nodes": 2,
        "size": PodSize(64, 256, 8, 16.5),
        "retries": 3,
        "deadline_s": 86400,
        "start_s": 3600,
        "grace_s": 300,
        "ray_version": "2.60.0",
    }
    return rayjob.documents(rayjob.Job(**{**given, **changes}), PLACEMENT)[1]


def service() -> dict[str, Any]:
    """A RayService whose engines autoscale."""
    engines = rayservice.Engines("llama", (1, 1, 4), PodSize(2, 32, 1, 2.6))
    config = {"bases": {"llama": {"path": "meta-llama/Llama-3.1-8B"}}}
    made = rayservice.Service(
        "serve", "tunesmith", "tunesmith.serving.deployment:from_mapping", config, [engines], "2.60.0"
    )
    return rayservice.documents(made, Placement(image="tunesmith:0.1.0-gpu"))[0]


def cluster() -> dict[str, Any]:
    """A RayCluster for interactive work."""
    spec = job()["spec"]["rayClusterSpec"]
    return {"apiVersion": "ray.io/v1", "kind": "RayCluster", "metadata": {"name": "desk"}, "spec": spec}


def cluster_queue() -> dict[str, Any]:
    """A ClusterQueue of one flavor within a cohort."""
    resources = [{"name": name, "nominalQuota": quota} for name, quota in (("cpu", "64"), ("nvidia.com/gpu", 8))]
    group = {"coveredResources": ["cpu", "nvidia.com/gpu"], "flavors": [{"name": "h100", "resources": resources}]}
    spec = {"cohortName": "all", "namespaceSelector": {}, "resourceGroups": [group]}
    return {"apiVersion": "kueue.x-k8s.io/v1beta2", "kind": "ClusterQueue", "metadata": {"name": "gpu"}, "spec": spec}


def of(api: str, kind: str, **more: Any) -> dict[str, Any]:
    """Any other document."""
    return {"apiVersion": api, "kind": kind, "metadata": {"name": "some"}, **more}


def changed(document: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """A copy with values put at paths such as `spec.containers.0.image`; `GONE` takes one out.

    A part of a path may have dots of its own when they are written as `|`.
    """
    document = copy.deepcopy(document)
    for path, value in changes.items():
        *parents, last = (int(part) if part.isdigit() else part.replace("|", ".") for part in path.split("."))
        node: Any = document
        for part in parents:
            if isinstance(node, dict) and part not in node:
                node[part] = {}
            node = node[part]
        if value is GONE:
            del node[last]
        elif isinstance(node, list) and last == len(node):
            node.append(value)
        else:
            node[last] = value
    return document
