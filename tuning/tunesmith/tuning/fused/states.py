"""A trial's state on disk: committed whole or not at all, small, one after each report."""

from __future__ import annotations

import re
from pathlib import Path

from safetensors.torch import load_file, save_file

from tunesmith.cluster.artifacts import verify
from tunesmith.cluster.errors import CheckpointError
from tunesmith.cluster.storage import commit_folder, discard
from tunesmith.tuning.fused.trial import Trial

FILE = "state.safetensors"
_NAME = re.compile(r"step-(\d{8,})")


def save(trial: Trial, folder: Path) -> Path:
    """Commits the trial's weights and moments at its present step; returns where."""
    final = at(folder, trial.step)
    if final.is_dir():
        return final
    state = trial.adapter.state()
    about = {"kind": "trial", "step": trial.step, "rank": trial.adapter.rank, "bucket": trial.adapter.bucket}
    folder.mkdir(parents=True, exist_ok=True)
    with commit_folder(final, about, sum(tensor.nbytes for tensor in state.values())) as written:
        save_file(state, written / FILE)
    return final


def at(folder: Path, step: int) -> Path:
    """Where the state of a step lies, if it was saved."""
    return folder / f"step-{step:08d}"


def load(trial: Trial, path: Path) -> None:
    """Puts the trial where the state was saved.

    Raises:
        CheckpointError: the state is damaged, or of an adapter of another shape.
    """
    about = verify(path).about
    if about["bucket"] != trial.adapter.bucket or about["rank"] != trial.adapter.rank:
        raise CheckpointError(
            f"{path}: of an adapter of rank {about['rank']}, and trial {trial.key} has rank {trial.adapter.rank}"
        )
    trial.adapter.restore(load_file(path / FILE))
    trial.step = about["step"]


def keep_newest(folder: Path, count: int) -> None:
    """Removes all but the newest states."""
    for _, path in sorted(_all(folder))[:-count]:
        discard(path)


def _all(folder: Path) -> list[tuple[int, Path]]:
    found = [(match, path) for path in folder.glob("step-*") if (match := _NAME.fullmatch(path.name))]
    return [(int(match[1]), path) for match, path in found]
