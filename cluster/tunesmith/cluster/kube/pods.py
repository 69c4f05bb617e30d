"""Pods of Ray clusters: sizes, security, volumes, environment. Plain dicts, as the API server takes them."""

from __future__ import annotations

import hashlib
import math
import re
from dataclasses import dataclass, field
from typing import Any

from tunesmith.cluster.errors import UsageError

MOUNT = "/shared"
"""Where every pod has the claim. Relative paths of recipes and serving configurations begin here."""
RECIPES = "/etc/tunesmith"
HOME = "/tmp/home"
USER = 1000
"""Of the image, and of the files on the claim."""
DNS_LABEL = 63
NAME_LIMIT = 47
"""Of a RayJob or RayService: KubeRay makes longer names of it."""
SCRATCH_GIB = 20
"""Of a pod's local disk: Ray's logs and sockets, compiled kernels."""
OBJECT_STORE_MIB = 512
"""Ray's object store carries pickled functions; Ray wants at least 75 MiB."""
SHM_GIB_PER_GPU = 2.0
"""At /dev/shm for NCCL, which takes tens of MiB for each pair of ranks of a node that share no NVLink."""
SHM_GIB_PER_CPU_WORKER = 0.5
"""At /dev/shm for DeepSpeed's shared-memory collectives, which take 32 MiB for each rank of a node."""
HEAD_CPUS, HEAD_GIB = 2.0, 8
"""For GCS, dashboard and the driver, which tokenises into memory-mapped files and holds no weights."""
SUBMITTER_CPUS, SUBMITTER_GIB = 0.5, 1


@dataclass(frozen=True)
class PodSize:
    """What one pod reserves.

    Attributes:
        memory_gib: shared memory included.
        shm_gib: of that, at /dev/shm.
    """

    cpus: float
    memory_gib: int
    gpus: int = 0
    shm_gib: float = 0.0


@dataclass(frozen=True)
class Placement:
    """Where documents are for, and what they refer to there.

    Attributes:
        image: of Tunesmith, with a tag or digest.
        claim: a PersistentVolumeClaim that many nodes may write.
        queue: Kueue's LocalQueue; None leaves Kueue out.
        priority: a WorkloadPriorityClass with a queue, else a PriorityClass.
        secret: a Secret whose keys become environment variables, such as HF_TOKEN.
        gpu_resource: how the device plugin calls a GPU.
        network: RDMA devices of a pod by resource name.
        topology: a node label within which the pods of a job are to lie, by Kueue's topology-aware scheduling.
    """

    image: str
    namespace: str | None = None
    claim: str = "tunesmith-shared"
    queue: str | None = None
    priority: str | None = None
    secret: str | None = None
    gpu_resource: str = "nvidia.com/gpu"
    network: dict[str, int] = field(default_factory=dict)
    topology: str | None = None


def object_name(name: str) -> str:
    """A run's name as Kubernetes takes it; one that had to change ends in a hash, so that no two become one."""
    plain = re.sub(r"[^a-z0-9-]+", "-", name.lower()).strip("-")
    plain = plain if plain[:1].isalpha() else f"r-{plain}"
    if plain == name and len(plain) <= NAME_LIMIT:
        return plain
    digest = hashlib.sha256(name.encode()).hexdigest()[:6]
    return f"{plain[: NAME_LIMIT - 7].rstrip('-')}-{digest}"


def on_claim(key: str, path: str) -> str:
    """A path of the user's as pods see it.

    Raises:
        UsageError: it is a folder of this machine.
    """
    if "://" in path:
        return path
    if path.startswith("~"):
        raise UsageError(f"{key}: {path} is a folder of this machine, which no pod has", f"Put it below {MOUNT}.")
    if path.startswith("/"):
        if path != MOUNT and not path.startswith(f"{MOUNT}/"):
            raise UsageError(
                f"{key}: pods have no {path}, only the claim at {MOUNT}",
                f"Write a path relative to it, or one that begins with {MOUNT}/.",
            )
        return path
    return f"{MOUNT}/{path}"


def metadata(name: str, component: str, run: str, placement: Placement, **more: Any) -> dict[str, Any]:
    """Metadata of an object; entries of `more` that are empty are left out."""
    found: dict[str, Any] = {"name": name}
    if placement.namespace:
        found["namespace"] = placement.namespace
    return {**found, "labels": labels(component, run), **{key: value for key, value in more.items() if value}}


def labels(component: str, run: str) -> dict[str, str]:
    """What network policies, monitors and people select by."""
    return {
        "app.kubernetes.io/name": "tunesmith",
        "app.kubernetes.io/component": component,
        "tunesmith.dev/run": run[:DNS_LABEL],
    }


def queued(found: dict[str, Any], placement: Placement) -> dict[str, Any]:
    """Metadata with what Kueue reads."""
    if placement.queue is None:
        return found
    kueue = {"kueue.x-k8s.io/queue-name": placement.queue}
    if placement.priority:
        kueue["kueue.x-k8s.io/priority-class"] = placement.priority
    return {**found, "labels": {**found["labels"], **kueue}}


def template(
    component: str,
    run: str,
    container: dict[str, Any],
    placement: Placement,
    *,
    grace_s: int | None = None,
    volumes: list[dict[str, Any]] | None = None,
    has_autoscaler: bool = False,
) -> dict[str, Any]:
    """A pod template under the restricted Pod Security Standard.

    Args:
        grace_s: seconds between the wish to end and SIGKILL.
        has_autoscaler: whether KubeRay puts its autoscaler in, which needs a token of the API server.
    """
    spec: dict[str, Any] = {
        "securityContext": {
            "runAsNonRoot": True,
            "runAsUser": USER,
            "runAsGroup": USER,
            "fsGroup": USER,
            "fsGroupChangePolicy": "OnRootMismatch",
            "seccompProfile": {"type": "RuntimeDefault"},
        },
        "enableServiceLinks": False,
        "containers": [container],
    }
    if not has_autoscaler:
        spec["automountServiceAccountToken"] = False
    if placement.priority and placement.queue is None:
        spec["priorityClassName"] = placement.priority
    if grace_s is not None:
        spec["terminationGracePeriodSeconds"] = grace_s
    if volumes:
        spec["volumes"] = volumes
    if placement.gpu_resource in container["resources"]["limits"]:
        spec["tolerations"] = [{"key": placement.gpu_resource, "operator": "Exists", "effect": "NoSchedule"}]
    found: dict[str, Any] = {"labels": labels(component, run)}
    if placement.topology and component == "worker":
        found["annotations"] = {"kueue.x-k8s.io/podset-preferred-topology": placement.topology}
    return {"metadata": found, "spec": spec}


def container(
    name: str, size: PodSize, placement: Placement, *, env: dict[str, str] | None = None, mounts_claim: bool = True
) -> dict[str, Any]:
    """A container that runs our image, unprivileged, with limits that equal its requests."""
    amounts: dict[str, Any] = {"cpu": _cpus(size.cpus), "memory": f"{size.memory_gib}Gi"}
    if size.gpus:
        amounts |= {placement.gpu_resource: size.gpus}
        amounts |= placement.network
    amounts["ephemeral-storage"] = f"{SCRATCH_GIB}Gi"
    found: dict[str, Any] = {
        "name": name,
        "image": placement.image,
        **({"workingDir": MOUNT} if mounts_claim else {}),
        "resources": {"requests": dict(amounts), "limits": dict(amounts)},
        "securityContext": {
            "allowPrivilegeEscalation": False,
            "readOnlyRootFilesystem": True,
            "capabilities": {"drop": ["ALL"]},
        },
        "env": [{"name": key, "value": value} for key, value in (env or {}).items()],
        "volumeMounts": [{"name": "scratch", "mountPath": "/tmp"}],
    }
    if mounts_claim:
        found["volumeMounts"].append({"name": "shared", "mountPath": MOUNT})
        if placement.secret:
            found["envFrom"] = [{"secretRef": {"name": placement.secret}}]
    if size.shm_gib:
        found["volumeMounts"].append({"name": "shm", "mountPath": "/dev/shm"})
    return found


def volumes(size: PodSize, placement: Placement, config_map: str | None = None) -> list[dict[str, Any]]:
    """What the mounts of `container` lead to; `config_map` is mounted read-only by whoever asks for it."""
    found: list[dict[str, Any]] = [
        {"name": "scratch", "emptyDir": {"sizeLimit": f"{SCRATCH_GIB}Gi"}},
        {"name": "shared", "persistentVolumeClaim": {"claimName": placement.claim}},
    ]
    if size.shm_gib:
        found.append({"name": "shm", "emptyDir": {"medium": "Memory", "sizeLimit": mebibytes(size.shm_gib)}})
    if config_map:
        found.append({"name": "recipe", "configMap": {"name": config_map}})
    return found


def shared_memory_gib(gpus: int, cpu_workers: int = 0) -> float:
    """What /dev/shm holds at most: for the workers of one pod, and Ray's object store with its tables."""
    return gpus * SHM_GIB_PER_GPU + cpu_workers * SHM_GIB_PER_CPU_WORKER + 1.25 * OBJECT_STORE_MIB / 1024


def environment() -> dict[str, str]:
    """What every Ray container has: writable places, and a hub that is asked only for what is not on the claim."""
    return {
        "HOME": HOME,
        "HF_HOME": f"{MOUNT}/.cache/huggingface",
        "XDG_CACHE_HOME": f"{HOME}/.cache",
        "RAY_USAGE_STATS_ENABLED": "0",
    }


def start_params(**more: str) -> dict[str, str]:
    """What `ray start` is told besides what KubeRay reads from the container."""
    return {"object-store-memory": str(OBJECT_STORE_MIB * 2**20), **more}


def mebibytes(gib: float) -> str:
    """A quantity, rounded up to whole MiB."""
    return f"{math.ceil(gib * 1024)}Mi"


def _cpus(cpus: float) -> str:
    return f"{cpus:g}" if cpus == int(cpus) else f"{round(cpus * 1000)}m"
