"""Checkpoints of another number of workers: their ZeRO shards are put together by DeepSpeed's universal checkpoint, and cut anew.

The converted copy lies beside the checkpoint while it is read, and is no checkpoint: nothing signs it, and what a crash leaves of
it the next conversion or save removes. The checkpoint itself is only read.
"""

from __future__ import annotations

import shutil
from argparse import Namespace
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from deepspeed.checkpoint import ds_to_universal

from tunesmith.cluster.errors import CheckpointError
from tunesmith.cluster.storage import FileRecord, begin_folder, explained, held, require_space
from tunesmith.trainers.ranks import on_first_at_length

WEIGHTS = "*_model_states.pt"
SHARDS = "*_optim_states.pt"
"""Each worker's share of the fp32 weights and the optimizer's state."""


@contextmanager
def converted(path: Path, files: Mapping[str, FileRecord], stage: int) -> Iterator[Path]:
    """A copy of a checkpoint that any number of workers can load, removed afterwards. Collective.

    Args:
        path: its folder; every file has been read and found whole.
        files: what its manifest names. Converting unpickles, so the folder may hold no other file that is read.
        stage: the ZeRO stage that it was written under.

    Raises:
        CheckpointError: the folder holds files that the manifest does not name.
        DiskFullError, StorageError: there is no room for the copy, or it cannot be written.
    """
    scratch = on_first_at_length(lambda: _convert(path, files, stage))
    try:
        yield scratch / "universal"
        dist.barrier()  # all have read it
    finally:
        if dist.get_rank() == 0:
            shutil.rmtree(scratch, ignore_errors=True)


def bytes_needed(files: Mapping[str, FileRecord], stage: int) -> int:
    """Disk that a conversion takes at its peak: the shards cut into parameters, the parameters put together, and the rest.

    Under ZeRO-3 DeepSpeed puts the whole of the first worker's shard beside them.
    """
    shards = [record.size for name, record in files.items() if Path(name).match(SHARDS)]
    rest = sum(record.size for record in files.values()) - sum(shards)
    return 2 * sum(shards) + rest + (max(shards, default=0) if stage == 3 else 0)


def _convert(path: Path, files: Mapping[str, FileRecord], stage: int) -> Path:
    strange = sorted({file.relative_to(path).as_posix() for file in path.rglob("*.pt")} - set(files))
    if strange:
        raise CheckpointError(f"{path}: the manifest does not name {strange[0]}, so the checkpoint is not converted")
    needed = bytes_needed(files, stage)
    require_space(path, needed)
    scratch = begin_folder(path.with_name("converted"))
    settings = Namespace(
        input_folder=str(path),
        output_folder=str(scratch / "universal"),
        num_extract_workers=1,  # in this process: one that has threads cannot be forked safely
        num_merge_workers=1,
        keep_temp_folder=False,
        strict=True,
        inject_missing_state=True,  # what Megatron's own checkpoints say about their layers, and ours need not
    )
    try:
        with held(scratch), explained(scratch, needed):
            ds_to_universal.main(settings)
    except BaseException:
        shutil.rmtree(scratch, ignore_errors=True)
        raise
    return scratch


def weights_files(folder: Path) -> list[str]:
    """The files of a converted copy that hold buffers and what is known of the checkpoint as a whole."""
    return [file.name for file in folder.glob(WEIGHTS)]


def load_converted(engine: Any, folder: Path) -> bool:
    """Gives an engine its share of a converted copy; whether there was one. Collective."""
    settings = engine._config
    settings.load_universal_checkpoint = True
    if engine.zero_optimization_stage() < 3:
        _load_only_what_is_held(engine.optimizer)
    try:
        loaded, _ = engine.load_checkpoint(str(folder.parent), tag=folder.name, load_module_strict=False)
    finally:
        settings.load_universal_checkpoint = False
    if loaded is not None:
        _load_buffers(engine, folder)
        _count_steps_apart(engine)
    return loaded is not None


def _load_only_what_is_held(optimizer: Any) -> None:
    """Has DeepSpeed pass over groups of parameters of which this worker holds no element, as of a few numbers among many
    workers: it asks for the step of the first that is held."""
    load = type(optimizer).load_hp_checkpoint_state_from_checkpoint_dir

    def load_held(groups_name: str, folder: str) -> None:
        groups, settings = getattr(optimizer, groups_name), optimizer.optimizer.param_groups
        held = [index for index, group in enumerate(groups) if any(one._hp_mapping is not None for one in group)]
        setattr(optimizer, groups_name, [groups[index] for index in held])
        optimizer.optimizer.param_groups = [settings[index] for index in held]
        try:
            load(optimizer, groups_name, folder)
        finally:
            setattr(optimizer, groups_name, groups)
            optimizer.optimizer.param_groups = settings

    optimizer.load_hp_checkpoint_state_from_checkpoint_dir = load_held


def _count_steps_apart(engine: Any) -> None:
    """Gives each group of shards a counter of its own: under ZeRO-3 DeepSpeed has them share one, and each would advance it."""
    for state in engine.optimizer.optimizer.state.values():
        if torch.is_tensor(state.get("step")):
            state["step"] = state["step"].clone()


def _load_buffers(engine: Any, folder: Path) -> None:
    """They are in no optimizer's state, so DeepSpeed leaves them as they are."""
    first = sorted(folder.glob(WEIGHTS))[0]
    state = engine.checkpoint_engine.load(str(first), map_location="cpu")["module"]
    buffers = dict(engine.module.named_buffers(remove_duplicate=False))
    for name, buffer in buffers.items():
        if name in state:
            buffer.data.copy_(state[name])
