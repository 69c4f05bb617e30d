"""A recipe as a RayJob: the planner's answer becomes pods, times and the overrides that the run is given."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from importlib.metadata import version
from typing import Any

from tunesmith.cluster.errors import FleetError, PlanError, ResourceError, UsageError
from tunesmith.cluster.fleet import GIB, Fleet, parse_fleet
from tunesmith.cluster.fleet_file import load_fleets
from tunesmith.cluster.fleet_machine import of_cpus
from tunesmith.cluster.kube import rayjob
from tunesmith.cluster.kube.commands import Wanted
from tunesmith.cluster.kube.pods import PodSize, on_claim, shared_memory_gib
from tunesmith.cluster.recipe.load import load_recipe
from tunesmith.cluster.recipe.schema import Recipe, Workers
from tunesmith.cluster.resources import Node
from tunesmith.trainers.admission import NOMINAL_FLOPS
from tunesmith.trainers.elastic import at, worlds
from tunesmith.trainers.memory.choose import host_bytes
from tunesmith.trainers.memory.geometry import geometry
from tunesmith.trainers.memory.overhead import PROCESS
from tunesmith.trainers.memory.plan import Plan, make_plan, refuse_what_cannot_fit

CPUS_PER_GPU = 8
"""One computes, the others load data, launch kernels and run the CPU optimizer; nodes with eight GPUs have 96 or more."""
CPUS_PER_WORKER = 2
"""Of a worker without a GPU."""
CUDA_HOST = 4 * GIB
"""Host memory of a worker's CUDA libraries and of the buffers that NCCL and copies pin; an estimate."""
SLACK = 1.25
"""Times what is reckoned, for the allocator, the page cache and what no plan knows: a host out of memory kills the pod."""
UNLIMITED_GIB = 2**20
"""What a CPU worker is planned in to see what it needs."""
SLOWER = 3
"""Times the slowest estimate of all steps, after which a job is taken for hung; loading, evaluating and saving are within."""
LEAST_DEADLINE_S = 3600
LONGEST_DEADLINE_S = 7 * 86400
"""Of a job whose number of steps nobody knows before it has read its data."""
LEAST_GRACE_S = 120


def documents(wanted: Wanted) -> list[dict[str, Any]]:
    """The ConfigMap and the RayJob of a recipe.

    Raises:
        RecipeError: the recipe is wrong.
        ResourceError: it does not fit the fleet; the message has the numbers and what would.
        UsageError: workers and fleet do not agree, or a path is one of this machine's.
    """
    recipe = load_recipe(wanted.path, wanted.overrides)
    _check_paths(recipe)
    fleet = _fleet(recipe, wanted)
    plans = _plans(recipe, fleet)
    nodes, size = _pods(recipe, fleet, plans)
    job = rayjob.Job(
        run=recipe.name,
        command="sweep" if recipe.tune else "train",
        recipe=wanted.path.read_text(encoding="utf-8"),
        overrides=[*wanted.overrides, *_settled(recipe, fleet, size)],
        folder=f"{on_claim('output.dir', recipe.output.dir)}/{recipe.name}",
        nodes=nodes,
        size=size,
        retries=wanted.retries,
        deadline_s=wanted.deadline_s or max(_deadline_s(recipe, plan) for plan in plans),
        start_s=wanted.start_s,
        grace_s=max(_grace_s(plan, nodes, wanted.storage_gb_s) for plan in plans),
        ray_version=version("ray"),
    )
    return rayjob.documents(job, wanted.placement)


def _check_paths(recipe: Recipe) -> None:
    sources = [("train", recipe.data.train), ("validation", recipe.data.validation or [])]
    for name, given in sources:
        for index, source in enumerate(given):
            on_claim(f"{recipe.where(f'data.{name}.{index}.path')}data.{name}.{index}.path", source.path)
    on_claim("output.dir", recipe.output.dir)
    if recipe.cluster.offload == "nvme":
        raise UsageError(
            "cluster.offload: nvme needs a disk of the node, which the restricted Pod Security Standard keeps from pods",
            "Use offload: cpu, or add a volume to the rendered manifest yourself.",
        )


def _fleet(recipe: Recipe, wanted: Wanted) -> Fleet:
    cluster = recipe.cluster
    if wanted.fleet is not None:
        fleet = parse_fleet(wanted.fleet, load_fleets(wanted.fleets))
        if fleet.gpu.is_cpu or cluster.gpus_per_worker == 0:
            raise FleetError(
                f"--fleet {wanted.fleet}: workers without GPUs need no fleet",
                "Leave --fleet out, and write cluster.workers and cluster.cpus_per_worker.",
            )
        if recipe.tune is None and "workers" in cluster.model_fields_set and cluster.most_workers != fleet.gpus:
            raise ResourceError(
                f"{recipe.where('cluster.workers')}cluster.workers: {cluster.most_workers}, and {fleet.name} has "
                f"{fleet.nodes} × {fleet.gpus_per_node} = {fleet.gpus} GPUs",
                f"A GPU has one worker: --set cluster.workers={fleet.gpus}, or another --fleet.",
            )
        if cluster.most_workers > fleet.gpus:
            raise ResourceError(
                f"{recipe.where('cluster.workers')}cluster.workers: a trial has {cluster.most_workers}, and {fleet.name} has "
                f"{fleet.gpus} GPUs",
                "Lower it, or take a larger --fleet.",
            )
        return fleet
    if cluster.gpus_per_worker:
        raise UsageError(
            f"cluster.gpus_per_worker: {cluster.gpus_per_worker}, and nobody says which GPUs",
            "Add --fleet, such as --fleet 2x8xH100-80GB.",
        )
    return _of_cpus(recipe)


def _of_cpus(recipe: Recipe) -> Fleet:
    workers, memory = recipe.cluster.most_workers, recipe.cluster.memory_gib_per_worker or UNLIMITED_GIB
    node = Node(cpus=_cpus(recipe, on_gpu=False) * workers, memory_gib=memory * workers)
    return of_cpus(node, workers, NOMINAL_FLOPS * node.cpus)


def _of_one_run(recipe: Recipe, fleet: Fleet) -> Fleet:
    """The workers that train together: those of one trial of a sweep, those that an elastic run has, or all."""
    if fleet.gpu.is_cpu:
        return _of_cpus(recipe)
    if recipe.tune is None and "workers" not in recipe.cluster.model_fields_set:
        return fleet
    per_node = min(recipe.cluster.most_workers, fleet.gpus_per_node)
    return replace(fleet, nodes=-(-recipe.cluster.most_workers // per_node), gpus_per_node=per_node)


def _cpus(recipe: Recipe, on_gpu: bool) -> float:
    return recipe.cluster.cpus_per_worker or float(CPUS_PER_GPU if on_gpu else CPUS_PER_WORKER)


def _plans(recipe: Recipe, fleet: Fleet) -> list[Plan]:
    """The plan, which fits; of an elastic run two, with the most workers last: with the fewest memory is scarcest, and a step
    takes longest.

    Raises:
        PlanError: the model cannot be simulated, so nobody knows how large its pods must be.
        ResourceError: it does not fit.
    """
    model, plans = geometry(recipe.model.base, recipe.output.dir), []
    for world in sorted({worlds(recipe)[0], worlds(recipe)[-1]}):
        here = at(recipe, world)
        try:
            plan = make_plan(here, model, _of_one_run(here, fleet))
        except PlanError as unknown:
            hint = "" if not fleet.gpu.is_cpu else " A mixture of experts can be with --fleet, on GPUs."
            raise PlanError(f"its pods cannot be sized: {unknown.what}", f"{unknown.fix}{hint}") from unknown
        refuse_what_cannot_fit(plan, f"with {world} of its workers: " if recipe.cluster.is_elastic else "")
        plans.append(plan)
    return plans


def _pods(recipe: Recipe, fleet: Fleet, plans: Sequence[Plan]) -> tuple[int, PodSize]:
    """How many worker pods, and the size of each: a node's GPUs together, or one worker on CPUs."""
    on_gpu = not fleet.gpu.is_cpu
    trials = (recipe.tune.concurrent or 1) if recipe.tune else 1
    nodes = fleet.nodes if on_gpu else recipe.cluster.most_workers * trials
    workers = fleet.gpus_per_node if on_gpu else 1
    shm = shared_memory_gib(fleet.gpus_per_node if on_gpu else 0, 0 if on_gpu else workers)
    each = max(_host_bytes(plan) if on_gpu else plan.prediction.total for plan in plans)
    runs = max(1, workers // plans[-1].prediction.workers)  # in one pod, each of which has an artifact
    needed = SLACK * (workers * each + runs * _whole_model(plans[-1])) / GIB + shm
    asked = (recipe.cluster.memory_gib_per_worker or 0.0) * workers
    cpus = _cpus(recipe, on_gpu) * workers
    memory = math.ceil(max(needed, asked))
    return nodes, PodSize(cpus, memory, fleet.gpus_per_node if on_gpu else 0, shm)


def _host_bytes(plan: Plan) -> float:
    """Host memory of one worker that computes on a GPU."""
    return PROCESS + CUDA_HOST + host_bytes(plan.prediction)


def _whole_model(plan: Plan) -> float:
    """Bytes of the whole model, which the first worker gathers for the artifact, or loads on the CPU for the parity
    receipt where its GPU has no room."""
    item = plan.prediction.engine.item if plan.prediction.engine else 4
    return plan.prediction.parameters * item


def _settled(recipe: Recipe, fleet: Fleet, size: PodSize) -> list[str]:
    """What the run would otherwise read from the cluster it is on, the head included."""
    cluster, on_gpu = recipe.cluster, not fleet.gpu.is_cpu
    workers = fleet.gpus if on_gpu and recipe.tune is None else cluster.workers
    found = [
        *([] if isinstance(cluster.workers, Workers) else [f"cluster.workers={workers}"]),
        f"cluster.gpus_per_worker={int(on_gpu)}",
        f"cluster.cpus_per_worker={size.cpus / (size.gpus or 1):g}",
    ]
    return [*found, "cluster.address=auto"] if cluster.address else found


def _deadline_s(recipe: Recipe, plan: Plan) -> int:
    if plan.run is None:
        return LONGEST_DEADLINE_S
    trials = (recipe.tune.trials or 20) * recipe.tune.seeds if recipe.tune else 1
    return min(LONGEST_DEADLINE_S, max(LEAST_DEADLINE_S, math.ceil(SLOWER * plan.run.high * trials)))


def _grace_s(plan: Plan, nodes: int, storage_gb_s: float) -> int:
    """A step to its end, a checkpoint that all nodes write together, and the end of the driver."""
    writing = plan.disk.checkpoint / nodes / (storage_gb_s * 1e9)
    return max(LEAST_GRACE_S, math.ceil(plan.prediction.time.high + writing) + 2 * rayjob.FAREWELL_S)
