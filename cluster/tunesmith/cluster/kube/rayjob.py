"""A RayJob that trains a recipe: gang-sized, retried, bounded in time, saved before it is ended."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from typing import Any

from tunesmith.cluster.kube import pods
from tunesmith.cluster.kube.pods import MOUNT, RECIPES, Placement, PodSize

RECIPE_FILE, JOB_FILE = "recipe.yaml", "job.json"
ENTRYPOINT = f"python -m tunesmith.cluster.kube.lifecycle run {RECIPES}/{JOB_FILE}"
FAREWELL_S = 30
"""Of the grace period, for what comes after the save: the driver's end and Ray's own."""
TURN_S = 600
"""How much longer than a save may take a retry waits for the attempt before it to let go of the run."""


@dataclass(frozen=True)
class Job:
    """What a RayJob is made from.

    Attributes:
        run: the recipe's name.
        command: `train` or `sweep`.
        recipe: text of the file.
        overrides: `key=value`, as after --set.
        folder: of the run, as pods see it.
        nodes: worker pods.
        size: of each.
        retries: whole attempts of KubeRay, each with a new cluster, that go on from the newest checkpoint.
        deadline_s: seconds after which the job is ended.
        start_s: seconds in which its pods must be up.
        grace_s: seconds in which a pod may save before it is killed.
        ray_version: of the image.
    """

    run: str
    command: str
    recipe: str
    overrides: list[str]
    folder: str
    nodes: int
    size: PodSize
    retries: int
    deadline_s: int
    start_s: int
    grace_s: int
    ray_version: str


def documents(job: Job, placement: Placement) -> list[dict[str, Any]]:
    """The ConfigMap with recipe and command, and the RayJob.

    The ConfigMap is immutable and named by its content: a changed recipe is another one, and a running job keeps its own.
    """
    name = pods.object_name(job.run)
    data = {RECIPE_FILE: job.recipe, JOB_FILE: json.dumps(_command(job), indent=1) + "\n"}
    digest = hashlib.sha256("\0".join(data.values()).encode()).hexdigest()[:8]
    config_map = f"{name}-recipe-{digest}"
    return [
        {
            "apiVersion": "v1",
            "kind": "ConfigMap",
            "metadata": pods.metadata(config_map, "recipe", job.run, placement),
            "immutable": True,
            "data": data,
        },
        {
            "apiVersion": "ray.io/v1",
            "kind": "RayJob",
            "metadata": pods.queued(pods.metadata(name, "training", job.run, placement), placement),
            "spec": _spec(job, placement, config_map),
        },
    ]


def _command(job: Job) -> dict[str, Any]:
    """What `lifecycle run` does on the head, which has no GPU and no CPU for workers."""
    overrides = [word for override in job.overrides for word in ("--set", override)]
    return {
        "run": job.folder,
        "within_s": job.grace_s + TURN_S,
        "directory": MOUNT,
        "command": ["tunesmith", job.command, f"{RECIPES}/{RECIPE_FILE}", *overrides],
    }


def _spec(job: Job, placement: Placement, config_map: str) -> dict[str, Any]:
    spec: dict[str, Any] = {
        "entrypoint": ENTRYPOINT,
        "submissionMode": "K8sJobMode",
        "submitterPodTemplate": _submitter(job, placement),
        "shutdownAfterJobFinishes": True,
        "backoffLimit": job.retries,
        "activeDeadlineSeconds": job.deadline_s,
        "preRunningDeadlineSeconds": job.start_s,
        "rayClusterSpec": {
            "rayVersion": job.ray_version,
            "authOptions": {"mode": "token"},
            "headGroupSpec": _head(job, placement, config_map),
            "workerGroupSpecs": [_workers(job, placement)],
        },
    }
    return {"suspend": True, **spec} if placement.queue else spec


def _head(job: Job, placement: Placement, config_map: str) -> dict[str, Any]:
    size = PodSize(pods.HEAD_CPUS, pods.HEAD_GIB, shm_gib=pods.shared_memory_gib(0))
    # Ray's job supervisor reads these two from the head's environment: how a driver is told to end, and how long it may take.
    stop = {"RAY_JOB_STOP_SIGNAL": "SIGTERM", "RAY_JOB_STOP_WAIT_TIME_S": str(job.grace_s - FAREWELL_S)}
    container = pods.container("ray-head", size, placement, env={**pods.environment(), **stop})
    container |= _farewell(job)
    container["volumeMounts"].append({"name": "recipe", "mountPath": RECIPES, "readOnly": True})
    return {
        "serviceType": "ClusterIP",
        "rayStartParams": pods.start_params(**{"num-cpus": "0"}),  # every worker is to lie on a worker's pod
        "template": pods.template(
            "head",
            job.run,
            container,
            placement,
            grace_s=job.grace_s,
            volumes=pods.volumes(size, placement, config_map),
        ),
    }


def _workers(job: Job, placement: Placement) -> dict[str, Any]:
    env = pods.environment()
    if job.size.gpus:
        env |= {"NCCL_DEBUG": "WARN"}
        if job.nodes > 1:
            env |= {"NCCL_SOCKET_IFNAME": "eth0", "GLOO_SOCKET_IFNAME": "eth0"}
    container = pods.container("ray-worker", job.size, placement, env=env)
    container |= _farewell(job)
    return {
        "groupName": "workers",
        "replicas": job.nodes,
        "minReplicas": job.nodes,
        "maxReplicas": job.nodes,
        "rayStartParams": pods.start_params(),
        "template": pods.template(
            "worker",
            job.run,
            container,
            placement,
            grace_s=job.grace_s,
            volumes=pods.volumes(job.size, placement),
        ),
    }


def _submitter(job: Job, placement: Placement) -> dict[str, Any]:
    size = PodSize(pods.SUBMITTER_CPUS, pods.SUBMITTER_GIB)
    container = pods.container("ray-job-submitter", size, placement, env={"HOME": pods.HOME}, mounts_claim=False)
    scratch = [volume for volume in pods.volumes(size, placement) if volume["name"] == "scratch"]
    found = pods.template("submitter", job.run, container, placement, volumes=scratch)
    found["spec"]["restartPolicy"] = "Never"
    return found


def _farewell(job: Job) -> dict[str, Any]:
    """The hook before SIGTERM. A sweep has none: what its trials have reported is on the claim already."""
    if job.command != "train":
        return {}
    within = str(job.grace_s - FAREWELL_S)
    command = ["python", "-m", "tunesmith.cluster.kube.lifecycle", "save", job.folder, "--within", within]
    return {"lifecycle": {"preStop": {"exec": {"command": command}}}}
