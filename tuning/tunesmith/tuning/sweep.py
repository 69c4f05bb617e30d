"""From a recipe with a `tune` section to a winner: checks everything, runs the trials on Ray Tune, keeps what they did.

An interrupted sweep is not restored from Ray's snapshots: the same command starts anew, and every trial first repeats what
its record says, at once. So the searcher and the scheduler come to where they were, and nothing is trained twice.
"""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from rich.console import Console

from tunesmith.cluster.artifacts import verify
from tunesmith.cluster.base import BaseRef
from tunesmith.cluster.errors import CheckpointError, UsageError
from tunesmith.cluster.events import Listener, Note, Warned, ignore
from tunesmith.cluster.identity import Identity, refuse_changes
from tunesmith.cluster.recipe.load import resolved
from tunesmith.cluster.recipe.schema import Recipe
from tunesmith.cluster.recipe.tune import Tune
from tunesmith.cluster.resources import Need, Node, fitting, needs, require_resources, this_machine
from tunesmith.cluster.runs import RunFolder
from tunesmith.cluster.session import RaySession
from tunesmith.cluster.storage import write_atomic
from tunesmith.trainers import zero
from tunesmith.trainers.data.build import look_at
from tunesmith.trainers.data.prepare import Prepared, effective_max_length, prepare
from tunesmith.trainers.idle_keys import refuse_idle_keys
from tunesmith.trainers.launch import require_writable, run_folder
from tunesmith.trainers.models import check_adaptation, resolve_base
from tunesmith.trainers.stopping import StopSignals
from tunesmith.tuning import space
from tunesmith.tuning.board import Board
from tunesmith.tuning.eligible import base_facts, why_isolated
from tunesmith.tuning.records import SweepFolder
from tunesmith.tuning.results import Result, write_results

BUDGETS = ("trials", "max_hours", "max_gpu_hours", "max_tokens")
FREE = (*BUDGETS, "execution", "concurrent", "final", "final_seeds")
"""Keys of `tune` that change no trial, so they may change when a sweep goes on."""


@dataclass(frozen=True)
class Ground:
    """What a sweep begins from, all of it checked."""

    recipe: Recipe
    tune: Tune
    folder: SweepFolder
    base: BaseRef
    cache: Path
    prepared: Prepared
    nodes: list[Node]
    need: Need
    is_local: bool
    """Whether Ray is one of our own on this machine."""
    why_isolated: str | None
    """Why trials need workers of their own; None when they can share a base."""

    @property
    def gpus(self) -> float:
        """GPUs that the trials of the sweep keep busy together."""
        return sum(node.gpus for node in self.nodes) if self.need.gpus else 0.0

    @property
    def shared_workers(self) -> int:
        """Workers that hold the base, where trials share one."""
        return max(1, min(self.need.workers, space.trials_of(self.tune)))

    @property
    def places(self) -> int:
        """Trials with workers of their own that are trained at once."""
        return max(
            1, min(self._runs // self.tune.seeds, self.tune.concurrent or self._runs, space.trials_of(self.tune))
        )

    @property
    def whole(self) -> Need:
        """All that the trials take together."""
        runs = min(self._runs, self.places * self.tune.seeds)
        workers = self.shared_workers if self.why_isolated is None else runs * self.need.workers
        return replace(self.need, workers=workers)

    @property
    def _runs(self) -> int:
        """Runs whose workers fit the machines at once."""
        return sum(fitting(node, self.need) for node in self.nodes) // self.need.workers


def check(recipe: Recipe, session: RaySession, on_event: Listener = ignore, start_ray: bool = False) -> Ground:
    """Checks all that can be checked before the first trial; leaves nothing behind but the data's cache.

    `start_ray` begins to start a local Ray meanwhile.

    Raises:
        UsageError: something about the search, the recipe, the data, the base or the resources is wrong.
    """
    tune = space.check(recipe)
    plain = space.recipe_of(recipe, {})
    folder = SweepFolder(run_folder(plain).root)
    require_writable(folder.root)
    base = resolve_base(plain.model.base, plain.model.revision, folder.root.parent)
    refuse_idle_keys(plain, base)
    check_adaptation(plain, base)
    reason = why_isolated(plain, tune, base_facts(Path(base.path), plain, tune))
    if tune.execution == "fused" and reason is not None:
        raise UsageError(
            f"{recipe.where('tune.execution')}tune.execution: fused is not possible: {reason}",
            "Use tune.execution: auto, or change what it names.",
        )
    nodes = [this_machine()] if session.local else session.nodes()
    need = needs(plain.cluster, nodes)
    require_resources(need, nodes)
    zero.precision(plain, on_gpu=need.gpus > 0)
    for source in [*plain.data.train, *(plain.data.validation or [])]:
        look_at(source)
    if tune.metric == "eval_loss" and plain.data.validation is None and not plain.data.split.validation:
        raise _nothing_held_out(recipe)
    if start_ray:
        session.start()
    effective_max_length(plain, base)
    cache = folder.root.parent / ".cache" / "data"
    prepared = prepare(plain, base, cache)
    if tune.metric == "eval_loss" and len(prepared.validation) == 0:
        raise _nothing_held_out(recipe)
    on_event(Note("\n".join(prepared.report.lines())))
    if tune.execution == "isolated":
        reason = "the recipe says so"
    return Ground(recipe, tune, folder, base, cache, prepared, nodes, need, session.local, reason)


def run(recipe: Recipe, on_event: Listener = ignore, console: Console | None = None) -> Result:
    """Searches, or goes on with a search, and returns when its budget is spent.

    Raises:
        UsageError: something is wrong; no trial was launched.
        StoppedError, InterruptedRunError: a signal came; the same command goes on.
        TunesmithError: no trial could report anything.
    """
    console = console or Console(stderr=True)
    with contextlib.ExitStack() as stack:
        signals = stack.enter_context(StopSignals(recipe.name))
        session = stack.enter_context(RaySession(recipe.cluster.address))
        ground = check(recipe, session, on_event, start_ray=True)
        _say_how(ground, on_event)
        folder = ground.folder
        folder.root.mkdir(parents=True, exist_ok=True)
        stack.enter_context(RunFolder(folder.root).lock())
        _remember(ground)
        if (answered := _answered(ground, on_event)) is not None:
            return answered
        known = {trial.number: len(trial.reports()) for trial in folder.trials()}
        if known:
            count = sum(known.values())
            on_event(Note(f"going on with {recipe.name}: {len(known)} trials with {count} reports are on record"))
        require_resources(ground.need, session.nodes())
        from tunesmith.tuning.trainers import trainers  # only now: what it imports takes seconds

        with trainers(ground) as who, _clock(folder) as began:
            from tunesmith.tuning.running import search  # Ray Tune, which takes longer, while the workers load
            from tunesmith.tuning.winner import crown

            ended = False
            try:
                with Board(console, ground.tune, space.trials_of(ground.tune), known) as board:
                    search(ground, who, began, board, signals)
                ended = signals.received is None
            finally:
                write_results(ground, who.baseline if ended else None, began, complete=ended)
            if signals.received is not None:
                raise signals.error(_count(folder))
            result = crown(ground, who, began, on_event)
        write_atomic(folder.result, json.dumps({"asked": _asked(ground.tune), "result": asdict(result)}, indent=1))
        return result


def plan(recipe: Recipe, on_event: Listener = ignore) -> dict[str, Any]:
    """Checks everything that `run` checks before the first trial, and says what it would do.

    Raises:
        UsageError: as `run`.
    """
    with RaySession(recipe.cluster.address) as session:
        ground = check(recipe, session, on_event)
    _say_how(ground, on_event)
    whole, is_fused = ground.whole, ground.why_isolated is None
    on_event(Note(f"sweep {recipe.name} would try {space.trials_of(ground.tune)} configurations on {whole}"))
    return {
        "sweep": recipe.name,
        "folder": str(ground.folder.root),
        "base": ground.base.reference,
        "execution": "fused" if is_fused else "isolated",
        "trials": space.trials_of(ground.tune),
        "trials_on_record": len(ground.folder.trials()),
        "concurrent": ground.tune.concurrent if is_fused else ground.places,
        "need": asdict(whole),
        "data": ground.prepared.report.model_dump(mode="json"),
    }


def _nothing_held_out(recipe: Recipe) -> UsageError:
    return UsageError(
        f"{recipe.where('tune.metric')}tune.metric: eval_loss is measured on held-out rows, and none are held out",
        "Set data.split.validation above 0, name data.validation, or use tune.metric: loss.",
    )


def _say_how(ground: Ground, on_event: Listener) -> None:
    if ground.why_isolated is None:
        on_event(Note("trials train side by side on one frozen base (fused)"))
    elif ground.tune.execution == "auto":
        on_event(Note(f"each trial has workers of its own (isolated): {ground.why_isolated}"))


def _remember(ground: Ground) -> None:
    """Writes what the sweep begins with, or refuses to go on with another one."""
    now = resolved(ground.recipe)
    now["tune"] = {key: value for key, value in now["tune"].items() if key not in FREE}
    identity = Identity(recipe=now, data=ground.prepared.files, base=ground.base.digest)
    if ground.folder.identity.exists():
        refuse_changes(Identity.load(ground.folder.identity), identity)
    else:
        identity.save(ground.folder.identity)


def _count(folder: SweepFolder) -> str:
    ended = sum(trial.ended() is not None for trial in folder.trials())
    return f"{ended} ended and {len(folder.trials()) - ended} unfinished"


def _asked(tune: Tune) -> dict[str, Any]:
    return {key: value for key, value in tune.model_dump(mode="json").items() if key in FREE}


def _answered(ground: Ground, on_event: Listener) -> Result | None:
    """The result of a sweep that was asked the same and has come to its end; None where there is something to do."""
    try:
        known = json.loads(ground.folder.result.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    if known["asked"] != _asked(ground.tune):
        return None
    result = Result(**known["result"])
    try:
        verify(Path(result.artifact))
    except CheckpointError as damaged:
        on_event(Warned(f"the winner's model is made anew: {damaged.what}"))
        return None
    on_event(Note(f"sweep {ground.recipe.name} is finished already; its winner is whole: {result.artifact}"))
    return result


@contextlib.contextmanager
def _clock(folder: SweepFolder) -> Iterator[float]:
    """`time.time()` at which the sweep would have begun if it had never been interrupted."""
    try:
        before = float(json.loads(folder.clock.read_text())["seconds"])
    except FileNotFoundError:
        reports = [report.at for trial in folder.trials() for report in trial.reports()]
        before = max(reports, default=0.0)  # killed before it could write how long it had taken
    folder.clock.unlink(missing_ok=True)
    began = time.time() - before
    try:
        yield began
    finally:
        write_atomic(folder.clock, json.dumps({"seconds": time.time() - began}))
