"""What one rank does for all."""

from __future__ import annotations

import time
from contextlib import suppress
from datetime import timedelta
from pathlib import Path

import pytest
import torch.distributed as dist
from workers import run_workers

from tunesmith.cluster.errors import StorageError
from tunesmith.trainers.ranks import on_first, on_first_at_length

PATIENCE = timedelta(seconds=1)
"""Of a collective operation, in a group that has the store of the first."""


def _slowly() -> str:
    time.sleep(3 * PATIENCE.total_seconds())
    return "done"


def _fail() -> str:
    raise OSError(28, "No space left on device", "here")


def _impatient(folder: Path) -> None:
    address = dist.distributed_c10d._get_default_store()
    rank, world = dist.get_rank(), dist.get_world_size()
    dist.destroy_process_group()
    dist.init_process_group(
        "gloo", store=dist.PrefixStore("impatient", address), rank=rank, world_size=world, timeout=PATIENCE
    )
    assert on_first_at_length(_slowly) == "done"
    with pytest.raises(StorageError, match="here: No space left on device"):
        on_first_at_length(_fail)
    assert on_first_at_length(lambda: 7) == 7
    (folder / str(rank)).touch()
    with pytest.raises(RuntimeError, match="Timed out") if rank else suppress(RuntimeError):
        on_first(_slowly)  # which the others do not wait for


def test_what_one_rank_does_at_length_is_waited_for_longer_than_a_collective_operation(tmp_path: Path) -> None:
    run_workers(2, _impatient, tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["0", "1"]
