"""Whether a run fits where it is to run, by the planner's own answer, before anything is started."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from tunesmith.cluster.base import BaseRef
from tunesmith.cluster.errors import FleetError, PlanError, StorageError
from tunesmith.cluster.events import Listener, Note, Warned
from tunesmith.cluster.fleet import Fleet, find_gpu
from tunesmith.cluster.identity import Identity
from tunesmith.cluster.recipe.schema import Recipe
from tunesmith.cluster.resources import Need, Node, fitting
from tunesmith.trainers import zero
from tunesmith.trainers.elastic import at, worlds

AUTOMATIC = (
    "cluster.zero",
    "cluster.offload",
    "train.per_device_train_batch_size",
    "train.gradient_checkpointing",
)
"""Keys for which `auto` leaves the choice to the planner."""


def admit(
    recipe: Recipe, base: BaseRef, nodes: Sequence[Node], need: Need, max_length: int, begun: Path, on_event: Listener
) -> tuple[Recipe, dict[str, Any] | None]:
    """Refuses a recipe that cannot fit, and settles what it leaves to `auto`.

    Args:
        nodes: of the cluster, or this machine alone.
        max_length: tokens of a full row.
        begun: the identity file of the run; if it has begun before, what was chosen then stays.

    Returns:
        The recipe without any `auto`, its keys read as before, and the plan as JSON; None when nothing is known of the
        hardware or the model cannot be simulated, which is said.

    Raises:
        ResourceError: it does not fit; the message has the numbers and what would.
    """
    from tunesmith.trainers.memory.choose import changed
    from tunesmith.trainers.memory.geometry import of_folder
    from tunesmith.trainers.memory.plan import Plan, make_plan, refuse_what_cannot_fit

    settled = _settled(recipe, begun)
    model = of_folder(Path(base.path), base.reference)

    def planned(world: int, settled: dict[str, Any]) -> Plan:
        fleet = fleet_of(nodes, replace(need, workers=world))
        return make_plan(at(recipe, world), model, fleet, max_length=max_length, settled=settled)

    several = [world for world in worlds(recipe) if world > 1]
    fewest = several[0] if several else 1  # that share: with them memory is scarcest
    try:
        plan = planned(fewest, settled)
        others = {world: planned(world, plan.chosen) for world in {worlds(recipe)[0], worlds(recipe)[-1]} - {fewest}}
    except (FleetError, PlanError) as unknown:
        on_event(Warned(f"whether it fits was not checked: {unknown.what}"))
        chosen = {**_plainest(recipe), **settled}
        plan = None
    else:
        for world, one in others.items():
            refuse_what_cannot_fit(one, f"with {world} worker{'s' if world > 1 else ''}: ")
        refuse_what_cannot_fit(plan)
        chosen = plan.chosen
        asked = [key for key in plan.chosen if key not in settled and _written(recipe, key)]
        if asked:
            on_event(Note("chosen: " + ", ".join(f"{key}: {_yaml(plan.chosen[key])}" for key in asked)))
    concrete = changed(recipe, chosen)
    concrete.forget_reads()
    concrete.mark_read(recipe.read_keys())
    return concrete, None if plan is None else plan.as_json()


def fleet_of(nodes: Sequence[Node], need: Need) -> Fleet:
    """The workers' share of the nodes, as the planner wants it.

    Raises:
        FleetError: their GPUs are not known, or no node has room for a worker.
    """
    from tunesmith.cluster.fleet import parse_fleet
    from tunesmith.cluster.fleet_file import load_fleets
    from tunesmith.cluster.fleet_machine import of_cpus

    if need.gpus == 0:
        able = [node for node in nodes if fitting(node, need)]  # a head often offers nothing
        if not able:
            raise FleetError(f"none of {len(nodes)} machines has room for a worker of {need.cpus:g} CPUs")
        smallest = min(able, key=lambda node: node.memory_gib)
        here = -(-need.workers // len(able))
        fleet = of_cpus(smallest, here, flops=NOMINAL_FLOPS * smallest.cpus)
        return replace(fleet, nodes=len(able)) if len(able) > 1 else fleet
    kinds = {node.gpu_kind for node in nodes if node.gpus >= 1}
    if kinds == {""}:
        fleet = parse_fleet("this machine")
    elif len(kinds) == 1:
        gpu = find_gpu(kinds.pop(), load_fleets())
        fleet = Fleet(f"the cluster's {gpu.name}", 1, need.workers, gpu, gpu.network_gb_s)
    else:
        raise FleetError(f"the cluster has GPUs of {len(kinds)} kinds: {', '.join(sorted(kinds))}")
    per_node = min(need.workers, max(int(node.gpus) for node in nodes))
    return replace(fleet, nodes=-(-need.workers // per_node), gpus_per_node=per_node)


NOMINAL_FLOPS = 5e10
"""Of one CPU core, fp32. Only choices between settings that all fit depend on it."""


def _settled(recipe: Recipe, begun: Path) -> dict[str, Any]:
    """What an earlier start of the run has chosen for keys that the recipe leaves to `auto`."""
    try:
        saved = Identity.load(begun).recipe
    except StorageError:
        return {}
    found = {}
    for key in AUTOMATIC:
        section, _, name = key.partition(".")
        if recipe.model_dump()[section][name] == "auto" and saved.get(section, {}).get(name, "auto") != "auto":
            found[key] = saved[section][name]
    return found


def _plainest(recipe: Recipe) -> dict[str, Any]:
    """What `auto` means where nothing can be simulated."""
    plain = {
        "cluster.zero": zero.stage(recipe.model_copy(deep=True).cluster),
        "cluster.offload": "none",
        "train.per_device_train_batch_size": 1,
        "train.gradient_checkpointing": True,
    }
    values = recipe.model_dump()
    return {
        key: value for key, value in plain.items() if values[key.partition(".")[0]][key.partition(".")[2]] == "auto"
    }


def _written(recipe: Recipe, key: str) -> bool:
    """Whether the user wrote the key's `auto`."""
    section, _, name = key.partition(".")
    return section in recipe.model_fields_set and name in recipe.__dict__[section].model_fields_set


def _yaml(value: object) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)
