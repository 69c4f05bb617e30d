"""A RayService that runs a serving configuration: changed in place, or by a second cluster, without a gap."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from tunesmith.cluster.kube import output, pods
from tunesmith.cluster.kube.pods import Placement, PodSize

PORT = 8000
"""At which KubeRay's serve service and its probes look for Serve's proxy."""
DRAIN_S = 90
"""Of a pod: requests at work end within the 60 s that a replica has, and then Ray."""
OLD_CLUSTER_S = 300
"""A cluster that was replaced stays, so that connections to it end by themselves."""
UNHEALTHY_S = 900
"""An application may take so long to come up, engines that load large weights included."""


@dataclass(frozen=True)
class Engines:
    """A worker group: pods that each hold one replica of one base.

    Attributes:
        name: of the base, as Kubernetes takes it.
        replicas: to begin with, at least, at most.
    """

    name: str
    replicas: tuple[int, int, int]
    size: PodSize


@dataclass(frozen=True)
class Service:
    """What a RayService is made from.

    Attributes:
        name: of the service.
        import_path: of the function that makes the application.
        arguments: that it is called with.
        ray_version: of the image.
    """

    name: str
    application: str
    import_path: str
    arguments: dict[str, Any]
    engines: list[Engines]
    ray_version: str


def documents(service: Service, placement: Placement) -> list[dict[str, Any]]:
    """The RayService alone: its configuration rides in it, so that a change of it is a change of the service."""
    autoscales = any(engines.replicas[1] != engines.replicas[2] for engines in service.engines)
    found = pods.queued(pods.metadata(service.name, "serving", service.name, placement), placement)
    if placement.queue and autoscales:
        found["annotations"] = {"kueue.x-k8s.io/elastic-job": "true"}
    cluster: dict[str, Any] = {
        "rayVersion": service.ray_version,
        "authOptions": {"mode": "token"},
        "headGroupSpec": _head(service, placement, autoscales),
        "workerGroupSpecs": [_workers(service, engines, placement) for engines in service.engines],
    }
    if autoscales:
        cluster |= {"enableInTreeAutoscaling": True, "autoscalerOptions": _autoscaler()}
    spec: dict[str, Any] = {
        "upgradeStrategy": {"type": "NewCluster"},
        "rayClusterDeletionDelaySeconds": OLD_CLUSTER_S,
        "serviceUnhealthySecondThreshold": UNHEALTHY_S,
        "deploymentUnhealthySecondThreshold": UNHEALTHY_S,
        "excludeHeadPodFromServeSvc": True,
        "serveConfigV2": output.as_yaml([_serve_config(service)]),
        "rayClusterConfig": cluster,
    }
    if placement.queue:
        spec = {"suspend": True, **spec}
    return [{"apiVersion": "ray.io/v1", "kind": "RayService", "metadata": found, "spec": spec}]


def _serve_config(service: Service) -> dict[str, Any]:
    return {
        "proxy_location": "EveryNode",
        "http_options": {"host": "0.0.0.0", "port": PORT},  # of a pod, behind the network policy and the gateway's keys
        "applications": [
            {
                "name": service.application,
                "route_prefix": "/",
                "import_path": service.import_path,
                "args": service.arguments,
            }
        ],
    }


def _head(service: Service, placement: Placement, autoscales: bool) -> dict[str, Any]:
    size = PodSize(pods.HEAD_CPUS, pods.HEAD_GIB, shm_gib=pods.shared_memory_gib(0))
    container = pods.container("ray-head", size, placement, env=pods.environment())
    return {
        "serviceType": "ClusterIP",
        "rayStartParams": pods.start_params(**{"num-cpus": "0"}),
        "template": pods.template(
            "head",
            service.name,
            container,
            placement,
            grace_s=DRAIN_S,
            volumes=pods.volumes(size, placement),
            has_autoscaler=autoscales,
        ),
    }


def _workers(service: Service, engines: Engines, placement: Placement) -> dict[str, Any]:
    container = pods.container("ray-worker", engines.size, placement, env=pods.environment())
    container["ports"] = [{"name": "serve", "containerPort": PORT}]
    replicas, least, most = engines.replicas
    return {
        "groupName": engines.name,
        "replicas": replicas,
        "minReplicas": least,
        "maxReplicas": most,
        "rayStartParams": pods.start_params(),
        "template": pods.template(
            "engine",
            service.name,
            container,
            placement,
            grace_s=DRAIN_S,
            volumes=pods.volumes(engines.size, placement),
        ),
    }


def _autoscaler() -> dict[str, Any]:
    amounts = {"cpu": "500m", "memory": "1Gi"}
    return {
        "version": "v2",
        "idleTimeoutSeconds": OLD_CLUSTER_S,
        "resources": {"requests": amounts, "limits": amounts},
        "securityContext": {
            "allowPrivilegeEscalation": False,
            "capabilities": {"drop": ["ALL"]},
            "runAsNonRoot": True,
            "seccompProfile": {"type": "RuntimeDefault"},
        },
    }
