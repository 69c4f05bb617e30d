"""Checkpoints as commits: `step-00000020/` is whole, or it is not there; a damaged one is set aside, never trusted.

All methods of the store but `is_written` and `close` are collective: every rank calls them, and every rank returns or
raises the same. Rank 0 alone commits, sets aside and removes; files are written, hashed and checked by all ranks.

A save in the background holds the state of its step because the files' bytes are made in host memory before training goes
on (`SignedFiles`). A thread of each rank only moves them to disk; whatever is collective stays in the training thread.

Nothing is kept of random generators: the loop derives them from the step's number.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, nullcontext, suppress
from copy import deepcopy
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch.distributed as dist

from tunesmith.cluster.artifacts import Manifest, check_file, read_manifest
from tunesmith.cluster.errors import CheckpointError, DiskFullError, StorageError, TunesmithError
from tunesmith.cluster.patience import patiently
from tunesmith.cluster.runs import RunFolder
from tunesmith.cluster.storage import (
    FileRecord,
    begin_folder,
    commit,
    discard,
    disk_full,
    held,
    remove_leftovers,
    write_atomic,
)
from tunesmith.trainers.checkpoint_files import SignedFiles, module_names
from tunesmith.trainers.checkpoint_folder import committed, measured, set_aside, to_remove
from tunesmith.trainers.ranks import gather, on_first
from tunesmith.trainers.reshard import converted, load_converted, weights_files

T = TypeVar("T")
_LIBRARIES = ("tunesmith", "torch", "deepspeed", "transformers", "peft", "bitsandbytes")
_HYPERPARAMETERS = ("betas", "eps", "weight_decay")


class _Written(NamedTuple):
    """What one rank did for a checkpoint."""

    files: dict[str, FileRecord]
    wanted: int
    error: TunesmithError | None

    @classmethod
    def of(cls, files: SignedFiles) -> _Written:
        return cls(files.files, files.wanted, files.error)


class _Behind(NamedTuple):
    """A save whose files are being written in the background."""

    step: int
    final: Path
    temporary: Path
    extra: dict[str, Any]
    files: SignedFiles
    writing: Future[None]
    hold: ExitStack


class CheckpointStore:
    """The checkpoints of one run.

    Args:
        folder: where they lie, on storage that every rank sees.
        rank, world: this process, and how many there are.
        attempt: number of this attempt at the run; an older one may not commit.
        run: the run they belong to.
        keep: newest checkpoints kept; the best one is kept besides.
        patience_s: seconds that a save is tried again when storage is full or fails.
        is_elastic: whether checkpoints of another number of workers are converted; else they are refused.
    """

    def __init__(
        self,
        folder: Path,
        rank: int,
        world: int,
        attempt: int,
        run: RunFolder,
        keep: int,
        patience_s: float,
        is_elastic: bool = False,
    ) -> None:
        self.folder, self.rank, self.world, self.is_elastic = folder, rank, world, is_elastic
        self.attempt, self.run, self.keep, self.patience_s = attempt, run, keep, patience_s
        self.last_saved: int | None = None
        """Step of the newest checkpoint known to be whole; None before the first."""
        self.owes_save = False
        """Whether a save in the background has failed, so that the step at hand is to be saved."""
        self.warnings: list[str] = []
        """What was found damaged, as sentences; rank 0 also leaves them in the run's folder for the user."""
        self._checked: dict[Path, Manifest] = {}
        """Those whose every file this store has read and found whole; what it wrote itself is read before it is used."""
        self._behind: _Behind | None = None
        self._thread = ThreadPoolExecutor(1, "checkpoint")

    def save(self, engine: Any, step: int, about: Mapping[str, Any], metric: float | None = None) -> Path:
        """Commits a checkpoint of this step, and removes those no longer kept.

        Args:
            engine: a DeepSpeed engine at the end of an optimizer step.
            step: optimizer steps done.
            about: what else the manifest is to say, as JSON values.
            metric: the held-out loss at this step, if it was measured; the lowest makes the best checkpoint.

        Raises:
            DiskFullError: names the path, the bytes the checkpoint needs and the bytes free; earlier ones are intact.
            StorageError: writing failed otherwise.
            FencedError: a newer attempt has taken over.
        """
        self.settle()
        final = self._final(step)
        if step != self.last_saved:  # else it is asked for again
            extra = self._extra(engine, step, about, metric)
            self.patiently(lambda: self._save(engine, final, extra))
            self.last_saved = step
        self.owes_save = False
        return final

    def save_behind(self, engine: Any, step: int, about: Mapping[str, Any], metric: float | None = None) -> None:
        """As `save`, but returns once the state is copied to host memory; files are written in the background, and the
        first `settle` after that commits them.

        At most one save is under way: an earlier one is settled first, and if it has failed, this one is a plain `save`.
        """
        self.settle()
        if self.owes_save:
            self.save(engine, step, about, metric)
            return
        final = self._final(step)
        temporary = self.patiently(lambda: on_first(lambda: self._begin(final)))
        extra, hold = self._extra(engine, step, about, metric), ExitStack()
        files = SignedFiles(temporary, module_names(engine.module), in_memory=True)
        if self.rank == 0:
            hold.enter_context(held(temporary))
        self._hand_over(engine, files)
        writing = self._thread.submit(files.write_copies)
        self._behind = _Behind(step, final, temporary, extra, files, writing, hold)

    @property
    def is_written(self) -> bool:
        """Whether a save is under way and this rank's files are on disk, or could not be written."""
        return self._behind is not None and self._behind.writing.done()

    def settle(self) -> None:
        """Waits until the save that is under way, if any, is written, and commits it.

        When a rank could not write its files, the user is warned, nothing of it is left, and `owes_save` says so.

        Raises:
            FencedError: a newer attempt has taken over.
        """
        behind, self._behind = self._behind, None
        if behind is None:
            return
        with behind.hold:
            behind.writing.result()
            written = gather(_Written.of(behind.files))
            try:
                on_first(lambda: self._commit(behind.temporary, behind.final, written, behind.extra))
            except StorageError as error:
                self.tell(
                    f"{behind.final.name} could not be written in the background: {error.what}; a later step is saved instead"
                )
                self.owes_save = True
            else:
                self.last_saved = behind.step

    def close(self) -> None:
        """Ends the background thread; what it was writing stays uncommitted."""
        if self._behind is not None:
            self._behind.files.is_given_up = True
        self._thread.shutdown()
        if self._behind is not None:
            self._behind.hold.close()

    def _final(self, step: int) -> Path:
        return self.folder / f"step-{step:08d}"

    def _extra(self, engine: Any, step: int, about: Mapping[str, Any], metric: float | None) -> dict[str, Any]:
        """What the manifest says besides its files, now: what it is made of changes while training goes on."""
        return {
            "kind": "checkpoint",
            **deepcopy(dict(about)),
            "step": step,
            "world": self.world,
            "zero_stage": engine.zero_optimization_stage(),
            "attempt": self.attempt,
            "metric": metric,
            "versions": _versions(),
            "written": datetime.now(UTC).isoformat(timespec="seconds"),
        }

    def _save(self, engine: Any, final: Path, extra: Mapping[str, Any]) -> None:
        temporary = on_first(lambda: self._begin(final))
        written = gather(self._write(engine, temporary))
        on_first(lambda: self._commit(temporary, final, written, extra))

    def tell(self, text: str) -> None:
        """Warns the user, if that can be written."""
        if self.rank == 0:
            with suppress(StorageError):  # the same storage that fails
                self.run.warn(self.attempt, text)

    def patiently(self, write: Callable[[], T]) -> T:
        """What `write` returns, tried for as long as the run has patience with its storage."""
        return patiently(write, self.patience_s, self.tell)

    def newest(self) -> tuple[Path, Manifest] | None:
        """The newest whole checkpoint; damaged ones on the way to it are set aside with a warning."""
        self.settle()
        found = self._first_whole(on_first(lambda: [path for _, path in reversed(committed(self.folder))]))
        if found is not None:
            self.last_saved = found[1].about["step"]
        return found

    def best(self) -> Path | None:
        """The whole checkpoint with the lowest metric (the earliest of equals); None if none was measured."""
        self.settle()
        found = self._first_whole(on_first(lambda: [path for _, _, path in sorted(measured(self.folder))]))
        return found[0] if found else None

    def load(self, engine: Any, path: Path) -> dict[str, Any]:
        """Puts weights and optimizer state back as they were; returns what the manifest says.

        Weight decay, betas, epsilon and clipping stay as the engine was built with, not as they were saved; the learning
        rate is the loop's to set.

        Raises:
            CheckpointError: the checkpoint is damaged, was made under another ZeRO stage or, unless the run is elastic, by
                another number of workers, or does not fit the model.
        """
        self.settle()
        manifest = self._checked.get(path) or self._check(path)
        about = manifest.about
        layout = (self.world, engine.zero_optimization_stage())
        if about["zero_stage"] != layout[1] or (about["world"] != self.world and not self.is_elastic):
            raise CheckpointError(
                f"{path}: written by {about['world']} workers under ZeRO-{about['zero_stage']}, "
                f"but this run has {layout[0]} workers under ZeRO-{layout[1]}",
                "Set cluster.workers and cluster.zero as they were.",
            )
        names, before = module_names(engine.module), _hyperparameters(engine)
        if about["world"] == self.world or layout[1] == 0:
            files = SignedFiles(path, names, manifest.files)
            engine.checkpoint_engine = files
            loaded, _ = engine.load_checkpoint(str(path.parent), tag=path.name, load_module_strict=False)
        else:
            self.tell(f"{path.name}, written by {about['world']} workers, is cut anew for {self.world}")
            on_first(self._clear)  # what a conversion that was killed has left may fill the disk
            with converted(path, manifest.files, layout[1]) as folder:
                files = SignedFiles(folder, names, weights_files(folder))
                engine.checkpoint_engine = files
                loaded = load_converted(engine, folder)
        _set_hyperparameters(engine, before)
        if not loaded:
            raise CheckpointError(f"{path}: holds no state of the model")
        if files.found_names != files.module_names:
            raise CheckpointError(f"{path}: does not fit the model: {_difference(files)}")
        return about

    def _begin(self, final: Path) -> Path:
        self._clear()
        return begin_folder(final)

    def _clear(self) -> None:
        self.run.check_fence(self.attempt)
        remove_leftovers(self.folder)

    def _write(self, engine: Any, temporary: Path) -> _Written:
        files = SignedFiles(temporary, module_names(engine.module))
        with held(temporary) if self.rank == 0 else nullcontext():
            try:
                self._hand_over(engine, files)
                files.sign_folder(temporary / "offloaded_tensors" / f"rank{self.rank:02d}")
            except OSError as error:
                # Only its copy of NVMe shards can raise past its first barrier; two collectives of it are still due.
                files.keep(temporary, error, 0)
                if engine._optimizer_has_ckpt_event_epilogue():
                    engine.optimizer.checkpoint_event_epilogue()
                dist.barrier()
        return _Written.of(files)

    def _hand_over(self, engine: Any, files: SignedFiles) -> None:
        """Has DeepSpeed gather the state and give it to `files`."""
        engine.checkpoint_engine = files
        engine._copy_recovery_script = lambda save_path: None  # it would be copied beside the checkpoints, uncommitted
        engine.save_checkpoint(
            str(files.folder.parent), tag=files.folder.name, save_latest=False, exclude_frozen_parameters=True
        )

    def _commit(self, temporary: Path, final: Path, written: Sequence[_Written], extra: Mapping[str, Any]) -> None:
        try:
            if any(part.error for part in written):
                raise next(part.error for part in written if part.error)
            self.run.check_fence(self.attempt)
            files = {name: record for part in written for name, record in part.files.items()}
            commit(temporary, final, files, extra)
        except TunesmithError as error:
            shutil.rmtree(temporary, ignore_errors=True)
            if isinstance(error, DiskFullError):
                raise disk_full(final, sum(part.wanted for part in written)) from error
            raise
        self._retain()

    def _retain(self) -> None:
        scored = measured(self.folder)
        steps = [step for step, _ in committed(self.folder)]
        for step in to_remove(steps, [(metric, step) for metric, step, _ in scored], self.keep):
            discard(self.folder / f"step-{step:08d}")
        if scored:
            metric, step, path = min(scored)
            write_atomic(self.run.best, json.dumps({"checkpoint": path.name, "step": step, "metric": metric}))

    def _first_whole(self, candidates: Iterable[Path]) -> tuple[Path, Manifest] | None:
        damaged: list[str] = []
        found: tuple[Path, Manifest] | None = None
        for path in candidates:
            try:
                found = path, self._checked.get(path) or self._check(path)
                break
            except CheckpointError as error:
                aside = on_first(lambda path=path: set_aside(path))
                self._checked.pop(path, None)
                damaged.append(f"checkpoint {path.name} is damaged ({error.what}) and was set aside as {aside.name}")
        used = f"{found[0].name} is used instead" if found else "no whole checkpoint is left"
        for sentence in damaged:
            warning = f"{sentence}; {used}"
            self.warnings.append(warning)
            on_first(lambda warning=warning: self.run.warn(self.attempt, warning))
        return found

    def _check(self, path: Path) -> Manifest:
        """Reads every file of a checkpoint once, each rank its share of them."""
        manifest = on_first(lambda: read_manifest(path))
        problem = None
        try:
            for name in sorted(manifest.files)[self.rank :: self.world]:
                check_file(path, name, manifest.files[name])
        except CheckpointError as error:
            problem = error
        for error in gather(problem):
            if error is not None:
                raise error
        self._checked[path] = manifest
        return manifest


def _hyperparameters(engine: Any) -> list[dict[str, Any]]:
    return [{key: group[key] for key in _HYPERPARAMETERS if key in group} for group in engine.optimizer.param_groups]


def _set_hyperparameters(engine: Any, values: list[dict[str, Any]]) -> None:
    """Undoes DeepSpeed's overwriting of them, so that a change the user insisted on has its effect."""
    for group, kept in zip(engine.optimizer.param_groups, values, strict=True):
        group.update(kept)
    if hasattr(engine.optimizer, "clip_grad"):
        engine.optimizer.clip_grad = engine.gradient_clipping()


def _difference(files: SignedFiles) -> str:
    missing = sorted(files.module_names - files.found_names)
    beyond = sorted(files.found_names - files.module_names)
    parts = [
        f"{len(names)} {what}, first {names[0]}" for names, what in ((missing, "missing"), (beyond, "unknown")) if names
    ]
    return "; ".join(parts)


def _versions() -> dict[str, str]:
    found = {}
    for name in _LIBRARIES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found
