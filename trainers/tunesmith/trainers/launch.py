"""From a recipe to an artifact: checks everything, then runs attempts on Ray Train until one ends well.

Bad input is refused before a run exists. Recovery is ours alone: Ray's snapshots are thrown away, and every attempt
begins from what the checkpoints' own manifests vouch for.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

import yaml

from tunesmith.cluster.artifacts import verify
from tunesmith.cluster.errors import (
    CheckpointError,
    OutputError,
    RecipeError,
    StoppedError,
    StorageError,
    UsageError,
    WorkerError,
)
from tunesmith.cluster.events import Ended, Listener, Note, Training, Warned, ignore
from tunesmith.cluster.identity import Identity, changes, refuse_changes
from tunesmith.cluster.metrics import read_metrics
from tunesmith.cluster.recipe.load import resolved
from tunesmith.cluster.recipe.schema import Recipe
from tunesmith.cluster.resources import Need, needs, require_resources, this_machine
from tunesmith.cluster.runs import RunFolder
from tunesmith.cluster.session import RaySession
from tunesmith.cluster.storage import write_atomic
from tunesmith.trainers import zero
from tunesmith.trainers.admission import admit
from tunesmith.trainers.attempts import GiveUp, LostAttempt, decide
from tunesmith.trainers.data.build import look_at
from tunesmith.trainers.data.prepare import Prepared, effective_max_length, prepare
from tunesmith.trainers.elastic import inexact, worlds
from tunesmith.trainers.idle_keys import refuse_idle_keys
from tunesmith.trainers.logs import require_installed
from tunesmith.trainers.machines import Machines
from tunesmith.trainers.models import BaseRef, check_adaptation, resolve_base
from tunesmith.trainers.outcome import read_outcome
from tunesmith.trainers.stopping import StopSignals


@dataclass(frozen=True)
class Result:
    """A finished run."""

    run: str
    artifact: str
    metrics: dict[str, float | None] = field(default_factory=dict)
    """`train_loss`, `eval_loss`, `tokens_per_second`."""
    steps: int = 0


@dataclass(frozen=True)
class Inputs:
    """What a run begins from, all of it checked."""

    folder: RunFolder
    base: BaseRef
    cache: Path
    """Where the tokenised data lies."""
    prepared: Prepared
    need: Need
    """Of as many workers as may be."""
    identity: Identity
    recipe: Recipe
    """Without any `auto`."""
    plan: dict[str, Any] | None
    """What the planner says, if it could."""
    local: bool
    """Whether Ray is one of our own on this machine."""


def run(
    recipe: Recipe,
    allow_change: bool = False,
    on_event: Listener = ignore,
    places: Mapping[str, int] = MappingProxyType({}),
) -> Result:
    """Trains the recipe's run, or goes on with it, and returns when its artifact is there.

    The same recipe again goes on from the newest whole checkpoint, or answers at once when the run is finished.

    Args:
        places: workers by the id of the node on which they are to be; where Ray puts them when it is empty.

    Raises:
        UsageError: something about the recipe, data, model, resources or output is wrong; no run is left behind.
        StoppedError: SIGTERM came; all workers saved the same step.
        InterruptedRunError: SIGINT came; likewise.
        WorkerError: workers kept failing, or one failed in a way that a restart cannot mend.
        TunesmithError: what a worker raised, as itself.
    """
    folder = run_folder(recipe)
    with contextlib.ExitStack() as stack:
        signals = stack.enter_context(StopSignals(recipe.name))
        session = stack.enter_context(RaySession(recipe.cluster.address))
        is_new = not folder.root.exists()
        if not is_new:  # a second command on one run is refused before it costs anything
            stack.enter_context(folder.lock())
        inputs = check(recipe, session, on_event, start_ray=not folder.artifact.exists())
        folder.create()
        if is_new:
            stack.enter_context(folder.lock())
        try:
            finished = _finished(inputs, allow_change, on_event)
            if finished is not None:
                return finished
            _record(inputs)
            stack.callback(
                draw, folder, on_event
            )  # however it ends; between attempts it would only keep the workers waiting
            return _attempts(inputs, session, signals, allow_change, on_event, places)
        except UsageError:
            folder.discard_if_unused()
            raise


def plan(recipe: Recipe, on_event: Listener = ignore) -> dict[str, Any]:
    """Checks everything that `run` checks before it trains, and says what it would do.

    Raises:
        UsageError: as `run`.
    """
    with RaySession(recipe.cluster.address) as session:
        inputs = check(recipe, session, on_event)
    need, folder = inputs.need, inputs.folder
    fewest = f"{worlds(recipe)[0]} to " if recipe.cluster.is_elastic else ""
    workers = f"{fewest}{need.workers} worker{'s' if need.workers > 1 else ''} of {need.cpus:g} CPUs"
    on_event(Note(f"run {folder.name} would train on {workers}{f' and {need.gpus:g} GPUs' if need.gpus else ''}"))
    return {
        "run": folder.name,
        "folder": str(folder.root),
        "base": inputs.base.reference,
        "workers": need.workers,
        "cpus_per_worker": need.cpus,
        "gpus_per_worker": need.gpus,
        "goes_on_from_step": folder.newest_step(),
        "plan": inputs.plan,
        "data": inputs.prepared.report.model_dump(mode="json"),
    }


def check(recipe: Recipe, session: RaySession, on_event: Listener = ignore, start_ray: bool = False) -> Inputs:
    """Checks the output folder, base model, resources and data; leaves nothing behind but the data's cache.

    `start_ray` begins to start a local Ray meanwhile; a cluster elsewhere is always asked what it has.
    """
    if recipe.tune is not None:
        raise RecipeError(
            f"{recipe.where('tune')}this recipe has a tune section: run `tunesmith sweep`, or take it out"
        )
    folder = run_folder(recipe)
    require_writable(folder.root)
    base = resolve_base(recipe.model.base, recipe.model.revision, folder.root.parent)
    refuse_idle_keys(recipe, base)
    check_adaptation(recipe, base)
    if session.local:  # else it is the workers' machines that count
        require_installed(recipe.output.report_to)
    nodes = [this_machine()] if session.local else session.nodes()
    need = needs(recipe.cluster, nodes)
    require_resources(replace(need, workers=worlds(recipe)[0]), nodes)
    zero.precision(recipe, on_gpu=need.gpus > 0)
    for source in [*recipe.data.train, *(recipe.data.validation or [])]:
        look_at(source)
    if start_ray:
        session.start()
    length = effective_max_length(recipe, base)[0]
    recipe, plan = admit(recipe, base, nodes, need, length, folder.identity, on_event)
    refuse_idle_keys(recipe, base)
    cache = folder.root.parent / ".cache" / "data"  # shared by all runs of an output folder
    prepared = prepare(recipe, base, cache)
    refuse_idle_keys(recipe, base, prepared.report)
    on_event(Note("\n".join(prepared.report.lines())))
    identity = Identity(recipe=resolved(recipe), data=prepared.files, base=base.digest)
    return Inputs(folder, base, cache, prepared, need, identity, recipe, plan, session.local)


def run_folder(recipe: Recipe) -> RunFolder:
    """Where the recipe's run lies."""
    return RunFolder(Path(recipe.output.dir).expanduser().absolute() / recipe.name)


def require_writable(root: Path) -> None:
    """Tries whether a folder can be made there: permission bits say nothing to root, and nothing about read-only mounts.

    Raises:
        OutputError: it cannot.
    """
    nearest = next(path for path in (root, *root.parents) if path.exists())
    if not nearest.is_dir():
        raise OutputError(f"{nearest} is a file, so runs cannot be written below it", "Set output.dir to a folder.")
    try:
        os.rmdir(tempfile.mkdtemp(prefix=".tunesmith-", dir=nearest))
    except OSError as error:
        raise OutputError(
            f"{root}: {nearest} cannot be written: {error.strerror}", "Set output.dir to a folder you may write."
        ) from error


def _finished(inputs: Inputs, allow_change: bool, on_event: Listener) -> Result | None:
    """The result of a run that is finished and unchanged; None when there is something to train.

    Raises:
        ChangedError: the run began with another recipe, model or data.
    """
    folder = inputs.folder
    if not folder.identity.exists() or not (folder.has_checkpoint() or folder.artifact.exists()):
        return None  # nothing to go on with: it begins as what the recipe says now
    saved = Identity.load(folder.identity)
    refuse_changes(saved, inputs.identity, allow_change, folder.has_checkpoint())
    changed = changes(saved, inputs.identity)
    for name, old, new in changed:
        on_event(Warned(f"going on with a change: {name}: {old} → {new}"))
    outcome = read_outcome(folder.outcome(folder.current_attempt()))
    if changed or outcome is None or outcome.kind != "done" or not folder.artifact.exists():
        return None
    try:
        verify(folder.artifact)
    except CheckpointError as damaged:
        raise CheckpointError(
            f"the artifact of the finished run {folder.name} is damaged: {damaged.what}",
            f"Delete {folder.artifact} and run the same command again: it is made anew from the last checkpoint.",
        ) from damaged
    on_event(Note(f"run {folder.name} is finished already; its artifact is whole: {folder.artifact}"))
    return _result(folder, outcome.result)


def _record(inputs: Inputs) -> None:
    """Writes what the run begins with beside it."""
    folder = inputs.folder
    write_atomic(folder.recipe, yaml.safe_dump(inputs.identity.recipe, sort_keys=False, allow_unicode=True))
    write_atomic(folder.data_report, inputs.prepared.report.model_dump_json(indent=1))
    if inputs.prepared.quarantine.stat().st_size:
        shutil.copyfile(inputs.prepared.quarantine, folder.quarantine)
    inputs.identity.save(folder.identity)
    folder.clear_stop()


def _attempts(
    inputs: Inputs,
    session: RaySession,
    signals: StopSignals,
    allow_change: bool,
    on_event: Listener,
    places: Mapping[str, int],
) -> Result:
    recipe, folder, lost = inputs.recipe, inputs.folder, []
    max_failures, cluster = recipe.train.max_failures, recipe.cluster  # read now: workers refuse unread keys
    machines = Machines(inputs.need, worlds(recipe), session, cluster.wait_s, cluster.grow_after_s, signals, places)
    machines.require()
    from tunesmith.trainers.fit import fit  # only now: Ray's modules import each other, which two threads cannot do

    signals.stop_with(folder.request_stop)
    while True:
        need = machines.wait(on_event)
        attempt, from_step = folder.begin_attempt(), folder.newest_step()
        if recipe.cluster.is_elastic:
            on_event(Warned(f"attempt {attempt}: {inexact(recipe, need.workers)}"))
        on_event(Training(recipe.name, attempt, from_step, recipe.train.max_steps))
        ending = fit(recipe, inputs, need, machines, attempt, allow_change, signals, on_event)
        on_event(Ended())
        outcome = read_outcome(folder.outcome(attempt))
        if outcome is not None and outcome.kind == "done":
            return _result(folder, outcome.result)
        if ending.moves_on and outcome is not None and outcome.error == StoppedError.__name__ and not signals.received:
            continue
        if outcome is not None and (outcome.kind == "error" or not ending.is_lost):
            raise signals.translated(outcome.to_error())
        if signals.received is not None:
            raise signals.error(
                f"workers were lost before they had saved; the newest checkpoint is step {folder.newest_step()}"
            )
        causes = ending.died or ({} if ending.cause else ending.raised)
        lost.append(LostAttempt(attempt, causes, from_step, folder.newest_step(), ending.cause))
        decision = decide(lost, max_failures)
        if isinstance(decision, GiveUp):
            raise WorkerError(decision.what, decision.fix)
        on_event(Warned(decision.warning))
        machines.rejoin(on_event)


def draw(folder: RunFolder, on_event: Listener = ignore) -> None:
    """Draws loss.png from what was measured so far, if anything was; warns rather than hide how the run itself ended."""
    try:
        lines = read_metrics(folder.metrics)
        if lines:
            from tunesmith.trainers.plot import draw_losses

            draw_losses(lines, folder.loss_picture, folder.name)
    except StorageError as error:
        on_event(Warned(f"{folder.loss_picture.name} was not drawn: {error.what}"))


def _result(folder: RunFolder, outcome: dict[str, Any]) -> Result:
    metrics = {key: outcome["metrics"].get(key) for key in ("train_loss", "eval_loss", "tokens_per_second")}
    return Result(folder.name, str(folder.artifact), metrics, int(outcome["step"]))
