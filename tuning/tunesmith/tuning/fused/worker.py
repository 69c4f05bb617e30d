"""The process that holds a base and trains the trials that are brought to it, until each has something to report.

A trial works from one report to the next and then waits for its caller, who may send it on, replace it or take it away;
the others go on meanwhile. Calls come from many threads, the work is done by one.
"""

from __future__ import annotations

import math
import threading
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tunesmith.cluster.base import BaseRef
from tunesmith.cluster.errors import NonFiniteError, StoppedError, TunesmithError
from tunesmith.cluster.metrics import MetricsLog
from tunesmith.cluster.recipe.schema import Recipe
from tunesmith.cluster.resources import Need, Node
from tunesmith.cluster.runs import RunFolder
from tunesmith.trainers import models, zero
from tunesmith.trainers.data.prepare import open_prepared
from tunesmith.trainers.worker import log_to
from tunesmith.tuning.fused import states
from tunesmith.tuning.fused.begin import begin
from tunesmith.tuning.fused.export import export
from tunesmith.tuning.fused.group import Group
from tunesmith.tuning.fused.room import Asked, adapted_layers, find_room, together
from tunesmith.tuning.fused.shell import Ready
from tunesmith.tuning.fused.trial import Trial
from tunesmith.tuning.members import figures_of

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}

STATES = "states"
"""Where a run's states lie."""


@dataclass(frozen=True)
class Settings:
    """What a worker is given; plain data, so that it pickles without torch.

    Attributes:
        recipe: keys of the sweep's recipe.
        base: the base they share.
        cache: folder of tokenised data sets.
        data: fingerprint of the data set in it.
        targets: every `target_modules` that a trial may have.
        ranks: every rank that a trial may have; the two ends, where it is a range.
        length: tokens of a lane.
        lanes: most lanes that are wanted.
        seeds: lanes that one trial takes.
        nodes: the machines, for the planner.
        threads: CPU threads; None leaves torch's own choice.
        log: where its output goes.
        keeps_all: whether all states of a trial are kept, for others to take.
    """

    recipe: dict[str, Any]
    base: dict[str, Any]
    cache: Path
    data: str
    targets: tuple[str | list[str], ...]
    ranks: tuple[int, ...]
    length: int
    lanes: int
    seeds: int
    nodes: tuple[Node, ...]
    threads: int | None = None
    log: Path | None = None
    keeps_all: bool = False


@dataclass
class Member:
    """A trial that is here.

    Attributes:
        run: its folder.
        every: optimizer steps between reports.
        goal: the step of its next report; None while it waits for its caller.
        figures: what it has to report.
        failure: why it cannot go on.
    """

    trial: Trial
    run: Path
    every: int
    goal: int | None = None
    figures: dict[str, float] | None = None
    failure: TunesmithError | None = None
    tokens: int = 0
    lines: MetricsLog = field(init=False)

    def __post_init__(self) -> None:
        self.lines = MetricsLog(self.run / "metrics.jsonl")

    @property
    def states(self) -> Path:
        """Where its states lie."""
        return self.run / STATES


class Worker:
    """One base on one device. Use it as a Ray actor with as many threads as it may have callers, or in place.

    Args:
        when_lost: called when it can compute no more: out of memory, a full disk, or a mistake of ours.
    """

    def __init__(self, settings: Settings, when_lost: Callable[[], None] = lambda: None) -> None:
        self.when_lost = when_lost
        if settings.log is not None:
            log_to(settings.log)
        if settings.threads:
            torch.set_num_threads(settings.threads)
        self.settings = settings
        self.base = BaseRef(**settings.base)
        self.device = (
            torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
        )
        self.data = open_prepared(settings.cache, settings.data)
        self.members: dict[str, Member] = {}
        self.changed = threading.Condition()
        self.first_weights: dict[str, Tensor] = {}
        self.jobs: deque[tuple[Callable[[], Any], Future[Any]]] = deque()
        self.failure: BaseException | None = None
        self.patience_s = 0.0
        threading.Thread(target=self._work, daemon=True, name="fused").start()

    def start(self) -> Ready:
        """Finds out how many lanes fit and loads the base. Called once, before everything else.

        Raises:
            ResourceError: not even the smallest trial fits, with the numbers.
            ModelError: a target matches nothing, or a layer that is not linear.
        """
        return self._do(self._load)

    def _load(self) -> Ready:
        settings = self.settings
        need = Need(1, 1.0, 1.0 if self.device.type == "cuda" else 0.0)
        skeleton = models.skeleton(self.base)
        targets = adapted_layers(skeleton, settings.targets)
        asked = Asked(
            together(skeleton, settings.targets), settings.ranks, settings.length, settings.lanes, settings.seeds
        )
        room = find_room(Recipe.model_validate(settings.recipe), self.base, settings.nodes, need, asked)
        dtype = DTYPES[zero.precision(room.recipe, self.device.type == "cuda")]
        self.group = Group(
            room.recipe, self.base, self.data, targets, settings.length, room.lanes, self.device, dtype, room.spare
        )
        baseline = self.group.held_out_loss(None) if self.group.held_out else None
        return Ready(baseline, room.largest, room.too_large)

    def open(
        self, key: str, recipe: dict[str, Any], run: str, reports: int, step: int = 0, source: str | None = None
    ) -> int:
        """Brings a trial here; returns the optimizer steps of the whole of it.

        Args:
            key: names it to the other methods; one that is here already is replaced.
            recipe: the trial's.
            run: its folder.
            reports: most reports of a whole trial.
            step: it goes on from its state of this step; 0 begins.
            source: run of another trial, whose state it takes when it has none of that step itself.
        """
        trial_recipe = Recipe.model_validate(recipe)
        known = self.first_weights
        adapter = self._do(lambda: begin(self.group, trial_recipe, self.base, known))
        trial = Trial(key, trial_recipe, self.data, adapter, self.group.length)
        folder = Path(run)
        folder.mkdir(parents=True, exist_ok=True)
        member = Member(trial, folder, math.ceil(trial.total_steps / reports))
        if step:
            own = states.at(member.states, step)
            states.load(trial, own if own.is_dir() or source is None else states.at(Path(source) / STATES, step))
        member.lines.truncate_after(step or -1)
        with self.changed:
            self._dismiss(key)
            self.members[key] = member
        return trial.total_steps

    def next(self, key: str) -> dict[str, Any]:
        """Trains a trial to its next report and returns that: step, total_steps, tokens and figures.

        Raises:
            NonFiniteError: a loss or gradient was NaN or infinite; its neighbours go on.
        """
        with self.changed:
            member = self.members[key]
            trial = member.trial
            assert trial.step < trial.total_steps, f"trial {key} has done all its {trial.total_steps} steps"
            member.goal = min(trial.total_steps, (trial.step // member.every + 1) * member.every)
            member.figures = None
            self.changed.notify_all()
            self.changed.wait_for(lambda: member.figures is not None or member.failure is not None or self.failure)
            if self.failure is not None:
                raise RuntimeError(f"the shared worker failed: {self.failure}") from self.failure
            if member.failure is not None:
                raise member.failure
            assert member.figures is not None
            return {
                "step": trial.step,
                "total_steps": trial.total_steps,
                "tokens": member.tokens,
                "figures": member.figures,
            }

    def export(self, recipe: dict[str, Any], run: str, step: int, folder: str) -> str:
        """Makes the model of a trial, as it was after a step; the last thing that this worker does.

        Args:
            recipe: the trial's.
            run: the trial's folder.
            folder: where the artifact goes.
        """
        return self._do(lambda: self._export(Recipe.model_validate(recipe), Path(run), step, RunFolder(Path(folder))))

    def _export(self, trial_recipe: Recipe, source: Path, step: int, folder: RunFolder) -> str:
        adapter = begin(self.group, trial_recipe, self.base)
        trial = Trial("winner", trial_recipe, self.data, adapter, self.group.length)
        states.load(trial, states.at(source / STATES, step))
        return str(export(self.group, adapter, trial_recipe, self.base, folder, source / "metrics.jsonl"))

    def close(self, key: str) -> None:
        """Takes a trial away; its lane is free for the next."""
        with self.changed:
            self._dismiss(key)
            self.changed.notify_all()

    def load(self) -> int:
        """Trials that are here."""
        return len(self.members)

    def _dismiss(self, key: str) -> None:
        """Lets go of a trial, and of whoever waits for its report."""
        member = self.members.pop(key, None)
        if member is not None and member.goal is not None:
            member.goal, member.failure = None, StoppedError(f"trial {key} was taken away")

    def _do(self, job: Callable[[], Any]) -> Any:
        """Has the working thread do something between two rows. It alone computes: torch makes threads for each thread
        that does, and more of them than cores wait for each other; and first weights come from torch's one generator."""
        done: Future[Any] = Future()
        with self.changed:
            if self.failure is not None:
                raise RuntimeError(f"the shared worker failed: {self.failure}") from self.failure
            self.jobs.append((job, done))
            self.changed.notify_all()
        return done.result()

    def _work(self) -> None:
        try:
            while True:
                with self.changed:
                    self.changed.wait_for(lambda: self.jobs or self._at_work())
                while self.jobs:
                    _answer(*self.jobs.popleft())
                with self.changed:
                    if not self._at_work():
                        continue
                    # those that have just reported are about to be sent on: a row that they fill costs no more than one
                    # without them
                    self.changed.wait_for(lambda: self.jobs or self._row_is_full(), self.patience_s)
                    work = self._at_work()
                self._tick(sorted(work, key=_share_done)[: self.group.count])
        except BaseException as failure:  # noqa: BLE001 - handed to every caller
            with self.changed:
                self.failure = failure
                for _, done in self.jobs:
                    done.set_exception(failure)
                self.changed.notify_all()
            self.when_lost()

    def _row_is_full(self) -> bool:
        return len(self._at_work()) >= min(len(self.members), self.group.count)

    def _at_work(self) -> list[Member]:
        return [member for member in self.members.values() if member.goal is not None]

    def _tick(self, work: list[Member]) -> None:
        began = time.monotonic()
        broken = {trial.key for trial in self.group.tick([member.trial for member in work])}
        self.patience_s = time.monotonic() - began
        for member in work:
            trial = member.trial
            if trial.key in broken:
                self._settle(member, failure=_non_finite(trial))
            elif trial.step == member.goal:
                figures = self._figures(member)
                if all(math.isfinite(value) for value in figures.values()):
                    self._settle(member, figures=figures)
                else:
                    self._settle(member, failure=_non_finite(trial))

    def _figures(self, member: Member) -> dict[str, float]:
        """What is reported: of all steps since the last report, and the held-out loss now."""
        trial = member.trial
        lines, trial.lines = trial.lines, []
        if self.group.held_out:
            lines[-1]["eval_loss"] = self.group.held_out_loss(trial.adapter)
        for line in lines:
            member.lines.append(line)
        member.tokens = sum(line["tokens"] for line in lines)
        return figures_of(lines)

    def _settle(
        self, member: Member, figures: dict[str, float] | None = None, failure: TunesmithError | None = None
    ) -> None:
        if figures is not None:
            states.save(member.trial, member.states)
            if not self.settings.keeps_all:
                states.keep_newest(member.states, 2)
        with self.changed:
            member.goal, member.figures, member.failure = None, figures, failure
            self.changed.notify_all()


def _answer(job: Callable[[], Any], done: Future[Any]) -> None:
    try:
        done.set_result(job())
    except BaseException as failure:  # noqa: BLE001 - handed to the caller
        done.set_exception(failure)


def _share_done(member: Member) -> float:
    """What goes first where there are more trials than lanes: those that are furthest behind."""
    return member.trial.step / member.trial.total_steps


def _non_finite(trial: Trial) -> NonFiniteError:
    return NonFiniteError(
        f"a loss or gradient was NaN or infinite in step {trial.step + 1}",
        "Search lower learning rates.",
    )
