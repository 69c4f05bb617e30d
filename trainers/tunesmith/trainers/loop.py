"""The training loop: one worker's life from the recipe to the artifact, read from top to bottom.

Ray Train starts it, but it knows only `torch.distributed` and a callable that says that work goes on. Nothing here is state
that could be derived: the batches, the learning rate and the dropout of a step follow from its number, so a run that resumes
from the checkpoint of step N goes on bit for bit as the unbroken one would have.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from tunesmith.cluster.errors import ChangedError, NonFiniteError
from tunesmith.cluster.metrics import MetricsLog, read_metrics
from tunesmith.cluster.recipe.load import recipe_hash, unread_error
from tunesmith.cluster.recipe.schema import Recipe
from tunesmith.cluster.runs import RunFolder
from tunesmith.trainers import zero
from tunesmith.trainers.batch import Batch, collate, digest, idle
from tunesmith.trainers.checkpoint import CheckpointStore
from tunesmith.trainers.data.prepare import Prepared, open_prepared
from tunesmith.trainers.elastic import at
from tunesmith.trainers.engine import build_engine
from tunesmith.trainers.evaluate import HeldOut
from tunesmith.trainers.export import write_artifact
from tunesmith.trainers.figures import closing_figures, memory_gib
from tunesmith.trainers.gradients import GradientWatch, norm_before_step
from tunesmith.trainers.logs import Log, numbers, open_logs, require_installed
from tunesmith.trainers.memory.measure import StepMeter
from tunesmith.trainers.memory.probe import probe
from tunesmith.trainers.models import BaseRef, load_tokenizer
from tunesmith.trainers.objectives import OBJECTIVES
from tunesmith.trainers.pace import Pace, Paces
from tunesmith.trainers.packing import BatchPlan, StepPlan
from tunesmith.trainers.policy import score
from tunesmith.trainers.progress import Progress
from tunesmith.trainers.ranks import gather, on_first
from tunesmith.trainers.receipts.mask import write_mask_receipt
from tunesmith.trainers.receipts.plan import is_measured, keep_measured, write_plan_receipt
from tunesmith.trainers.schedule import Schedule, dropout_seed

Moved = Callable[[], None]


@dataclass(frozen=True)
class TrainJob:
    """What a worker is given; it pickles.

    Attributes:
        recipe: the keys that the user wrote.
        read_keys: dotted keys that the driver has read.
        run: folder of the run.
        cache: folder of tokenised data sets.
        data: fingerprint of this run's data set in it.
        base: the resolved base model.
        attempt: number of this attempt; an older one may not write any more.
        allow_change: whether the user insists on resuming with another recipe or other data.
    """

    recipe: dict[str, Any]
    read_keys: list[str]
    run: Path
    cache: Path
    data: str
    base: BaseRef
    attempt: int
    allow_change: bool = False


@dataclass(frozen=True)
class Outcome:
    """How a worker's run ended.

    Attributes:
        finished: False when it was asked to stop and has saved itself.
        step: optimizer steps done.
        metrics: `train_loss`, `eval_loss`, `tokens_per_second`; empty unless finished.
    """

    finished: bool
    step: int
    metrics: dict[str, float | None] = field(default_factory=dict)


class Trainer:
    """One worker. `run` is the story; the other methods are its sentences."""

    def __init__(self, job: TrainJob, moved: Moved) -> None:
        self.job, self.moved = job, moved
        self.rank, self.world = dist.get_rank(), dist.get_world_size()
        self.device = (
            torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
        )
        self.written = Recipe.model_validate(job.recipe)
        self.written.forget_reads()
        self.written.mark_read(job.read_keys)
        self.recipe = at(self.written, self.world)
        self.run_folder = RunFolder(job.run)
        self.metrics = MetricsLog(self.run_folder.metrics)
        self.progress = Progress()
        self.logs: list[Log] = []

    def set_up(self) -> None:
        """Data, plan, model, engine and checkpoints; then every key the user wrote has been read, or the run stops."""
        recipe, train, measured = self.recipe, self.recipe.train, self.run_folder.measured
        self.data: Prepared = open_prepared(self.job.cache, self.job.data)
        self.rows = train.rows
        self.accumulation = train.gradient_accumulation_steps
        self.plan = BatchPlan.of(recipe, self.data, self.world)
        self.total_steps = self.plan.total_steps(train.epochs, train.max_steps)
        self.schedule = Schedule.of(train, self.total_steps)
        self.objective = OBJECTIVES[recipe.objective.kind]
        self.held_out = HeldOut.of(recipe, self.data)
        self.eval_steps = train.eval_steps if self.held_out else None
        stopping = train.early_stopping if self.held_out else None
        self.patience = stopping.patience if stopping else None
        self.min_delta, self.watched = (stopping.min_delta, stopping.metric) if stopping else (0.0, "eval_loss")
        use_best = train.load_best_model_at_end if self.held_out else False
        self.use_best = stopping is not None if use_best is None else use_best
        torch.manual_seed(train.seed)
        self.engine: Any = build_engine(recipe, self.job.base, self.device)
        self.watch = None if self.engine.fp16_enabled() else GradientWatch(self.engine.module)
        self.meter = StepMeter(
            self.engine, self.device, lambda meter: self.checkpoints.patiently(lambda: keep_measured(measured, meter))
        )
        self.pace, self.paces = Pace(self.device), Paces()
        self.checkpoints = CheckpointStore(
            self.run_folder.checkpoints,
            self.rank,
            self.world,
            self.job.attempt,
            self.run_folder,
            train.save_total_limit,
            train.save_patience_s,
            self.written.cluster.is_elastic,
        )
        self.parity_rows = recipe.eval.parity_rows
        self.save_steps, self.saves_behind = train.save_steps, train.async_save
        require_installed(recipe.output.report_to)
        if (error := unread_error(self.written)) is not None:
            raise error

    def resume(self) -> None:
        """Goes on from the newest whole checkpoint, if there is one."""
        found = self.checkpoints.newest()
        if found is None:
            return
        path, manifest = found
        about = manifest.about
        if about["data_hash"] != self.data.fingerprint and not self.job.allow_change:
            raise ChangedError(
                f"{path.name} was made from other data than the run would go on with",
                "Put the data back, start anew under another name, or insist with --allow-change.",
            )
        self.checkpoints.load(self.engine, path)
        self.progress = Progress(**about["progress"])
        changed = (about["data_hash"], about["recipe_hash"]) != (self.data.fingerprint, recipe_hash(self.written))
        if not changed and is_measured(self.run_folder.measured, self.meter):
            self.meter.wanted = 0
        if self.job.allow_change and changed and self.progress.step >= self.total_steps:
            raise ChangedError(
                f"all {self.total_steps} steps are done, so nothing would be trained with what has changed",
                "Raise train.epochs or train.max_steps, or start anew under another name.",
            )

    def run(self) -> Outcome:
        """Trains to the end, or until it is asked to stop."""
        self.set_up()
        with closing(self.checkpoints):
            self.resume()
            if self.device.type == "cuda":
                self.probe_memory()
            self.open_books()
            if self.progress.step == 0 and self.held_out:
                self.log({"step": 0, "eval_loss": self.held_out_loss(self.held_out)})
            self.engine.train()
            while self.progress.step < self.total_steps and not self.is_out_of_patience():
                with self.meter.step():
                    record, must_stop = self.step()
                is_best = self.evaluate_if_due(record)
                is_last = self.progress.step == self.total_steps or self.is_out_of_patience()
                self.log(record)
                if is_best or is_last or must_stop or self.checkpoints.owes_save:
                    self.save(record.get("eval_loss"))
                elif self.progress.step % self.save_steps == 0:
                    self.save(record.get("eval_loss"), behind=self.saves_behind)
                if must_stop and not is_last:
                    self.close_logs()
                    return Outcome(finished=False, step=self.progress.step)
            if self.use_best and (best := self.checkpoints.best()) is not None:
                self.checkpoints.load(self.engine, best)
            return Outcome(finished=True, step=self.progress.step, metrics=self.finish())

    def probe_memory(self) -> None:
        """Takes the memory of the run's largest batches, so that what does not fit fails before step one."""
        packs = self.plan.longest(self.total_steps, self.rows)
        longest = collate(self.data.train, packs, 1.0).to(self.device)
        held_out = self.held_out.longest().to(self.device) if self.held_out else None
        probe(self.engine, lambda batch: self.forward_backward(batch, 0, 0, 1.0), longest, held_out)

    def open_books(self) -> None:
        """The mask receipt, and the metrics without the steps that are about to be repeated."""
        done, run = self.progress.step, self.run_folder

        def open_on_first() -> None:
            run.check_fence(self.job.attempt)
            write_mask_receipt(run.receipts, self.data, self.plan.epoch_packs(0), load_tokenizer(self.job.base))
            self.metrics.truncate_after(done or -1)
            self.logs = open_logs(self.recipe, run, done + 1 if done else 0)

        on_first(open_on_first)

    def finish(self) -> dict[str, float | None]:
        """Writes the artifact and its receipts; returns the run's closing figures."""
        on_first(lambda: self.run_folder.check_fence(self.job.attempt))
        write_plan_receipt(self.run_folder.receipts, self.recipe, self.job.base, self.run_folder.measured)
        write_artifact(self.engine, self.written, self.job.base, self.run_folder, self.data, self.device)
        self.close_logs()
        return closing_figures(
            read_metrics(self.run_folder.metrics), self.progress.best_loss if self.use_best else None
        )

    def close_logs(self) -> None:
        """Writes out what the logs still hold."""
        for log in self.logs:
            log.close()

    def step(self) -> tuple[dict[str, Any], bool]:
        """One optimizer step; returns its metrics and whether the run is asked to stop.

        Raises:
            NonFiniteError: a loss or gradient was NaN or infinite; no weight was changed.
        """
        began = time.perf_counter()
        index = self.progress.step
        plan = self.plan.step(index)
        examples = [example for pack in plan.packs for example in pack]
        labels = int(self.data.train.trained_counts[examples].sum())
        tokens = int(self.data.train.lengths[examples].sum())
        rate = self.schedule.learning_rate(index)
        for group in self.engine.optimizer.param_groups:
            group["lr"] = rate
        # loss, router loss, broken gradients, asked to stop, digest of the examples, checkpoint written, pace of each worker
        totals = torch.zeros(6 + self.world, dtype=torch.float64)
        broken: list[int] = []
        for micro in range(self.accumulation):
            batch = self.micro_batch(plan, micro, max(1.0, labels))
            self.meter.saw(batch)
            losses, is_finite = self.forward_backward(batch, index, micro, len(batch.input_ids) / tokens)
            self.moved()
            totals[:2] += losses
            totals[4] += digest(batch.examples)
            if not is_finite:
                broken += batch.examples
            if micro < self.accumulation - 1:
                self.engine.step()  # counts the micro-batch; the update comes at the boundary
        totals[2] = bool(broken)
        totals[3] = self.rank == 0 and self.run_folder.stop_requested(self.job.attempt)
        totals[5] = self.checkpoints.is_written
        totals[6 + self.rank] = self.pace.take()
        totals = self.sum_over_workers(totals)
        self.paces.note(totals[6:].tolist(), self.checkpoints.tell)
        if totals[5] == self.world or totals[2]:
            self.checkpoints.settle()
        if totals[2]:
            raise self.non_finite(index, broken)
        plain_norm = norm_before_step(self.engine)
        self.engine.step()
        self.progress.step += 1
        seconds = time.perf_counter() - began
        record = {
            "step": self.progress.step,
            "epoch": plan.epoch,
            "loss": totals[0].item(),
            **({"router_loss": totals[1].item()} if self.engine.module.has_router_loss else {}),
            **({"skipped_steps": self.engine.skipped_steps} if self.engine.fp16_enabled() else {}),
            "learning_rate": rate,
            "grad_norm": float(self.engine.get_global_grad_norm()) if plain_norm is None else plain_norm,
            "tokens": tokens,
            "labels": labels,
            "tokens_per_second": tokens / seconds,
            "step_seconds": seconds,
            "workers": self.world,
            "examples": f"{int(totals[4]):x}",
            "memory_gib": memory_gib(self.device),
            "skipped_rows": self.data.report.skipped_rows,
            "checkpoint": self.checkpoints.last_saved,
            "total_steps": self.total_steps,
        }
        return record, bool(totals[3])

    def micro_batch(self, plan: StepPlan, micro: int, labels: float) -> Batch:
        """This worker's rows of one accumulation step."""
        packs = plan.micro_batch(micro, self.rank, self.world, self.rows)
        if packs:
            return collate(self.data.train, packs, labels).to(self.device)
        return idle(collate(self.data.train, plan.packs[:1], labels)).to(self.device)

    def forward_backward(self, batch: Batch, index: int, micro: int, token_share: float) -> tuple[torch.Tensor, bool]:
        """Losses [2] of a micro-batch as shares of the step's loss, and whether they and their gradients are finite."""
        torch.manual_seed(dropout_seed(self.recipe.train.seed, index, micro * self.world + self.rank, 0))
        with self.pace.forward(len(batch.input_ids)):
            logps, aux_loss = score(self.engine, batch)
        loss, _ = self.objective(logps, batch)
        router_loss = torch.zeros((), device=self.device)
        if aux_loss is not None and bool(batch.weights.any()):
            router_loss = aux_loss * token_share
        elif aux_loss is not None:
            router_loss = aux_loss * 0.0
        total = loss + router_loss
        # DeepSpeed averages over micro-batches and workers; the normalizer has already divided by the whole batch.
        self.engine.backward(total * (self.world * self.accumulation))
        is_finite = bool(torch.isfinite(total)) and (self.watch is None or self.watch.is_finite())
        return torch.stack([loss.detach(), router_loss.detach()]).double().cpu(), is_finite

    def sum_over_workers(self, values: torch.Tensor) -> torch.Tensor:
        """The element-wise sum over all workers, on the CPU."""
        on_device = values.to(self.device)
        dist.all_reduce(on_device)
        return on_device.cpu()

    def non_finite(self, index: int, broken: list[int]) -> NonFiniteError:
        """The error that names the rows of every broken micro-batch, on all workers."""
        rows = sorted({self.data.train.where(example) for part in gather(broken) for example in part})
        shown = ", ".join(rows[:20]) + (f" and {len(rows) - 20} more" if len(rows) > 20 else "")
        return NonFiniteError(
            f"step {index + 1}: a loss or gradient is NaN or infinite; no weight was changed. Rows in that batch: {shown}",
            "Look at these rows; else lower train.learning_rate, or use precision fp32 or bf16 instead of fp16.",
        )

    def evaluate_if_due(self, record: dict[str, Any]) -> bool:
        """Adds the held-out loss to the record when it is due; returns whether it is the lowest so far."""
        if self.held_out is None:
            return False
        step = self.progress.step
        at_interval = step % self.eval_steps == 0 if self.eval_steps else self.plan.is_epoch_end(step - 1)
        if not (at_interval or step == self.total_steps):
            return False
        record["eval_loss"] = self.held_out_loss(self.held_out)
        return self.progress.note_evaluation(record[self.watched], self.min_delta)

    def held_out_loss(self, held_out: HeldOut) -> float:
        """The held-out loss now.

        Raises:
            NonFiniteError: it is NaN or infinite.
        """
        loss = held_out.loss(self.engine, self.device, self.moved)
        if not math.isfinite(loss):
            self.checkpoints.settle()
            raise NonFiniteError(
                f"the held-out loss after step {self.progress.step} is {loss}, although every step was finite",
                "Look at the rows of the validation split; the checkpoints before this step are whole.",
            )
        return loss

    def is_out_of_patience(self) -> bool:
        """Whether the held-out loss has not improved for too long."""
        return self.patience is not None and self.progress.evaluations_without_gain >= self.patience

    def save(self, eval_loss: float | None, behind: bool = False) -> None:
        """Commits a checkpoint of this step, now or, in the background, at a later one."""
        about = {
            "progress": vars(self.progress),
            "zero": zero.stage(self.recipe.cluster),
            "seed": self.recipe.train.seed,
            "recipe_hash": recipe_hash(self.written),
            "elastic": self.written.cluster.is_elastic,
            "data_hash": self.data.fingerprint,
        }
        save = self.checkpoints.save_behind if behind else self.checkpoints.save
        save(self.engine, self.progress.step, about, eval_loss)

    def log(self, record: dict[str, Any]) -> None:
        """Writes a line of metrics."""
        if self.rank == 0:
            self.checkpoints.patiently(lambda: self.metrics.append(record))
            for log in self.logs:
                log.write(record["step"], numbers(record))


def train(job: TrainJob, moved: Moved) -> Outcome:
    """Runs one worker's part of a job; `torch.distributed` is initialised.

    Args:
        job: the same on every worker.
        moved: called whenever a batch is done, so that work can be told from a hang.

    Raises:
        TunesmithError: the run cannot go on.
    """
    return Trainer(job, moved).run()
