"""What one rank does for all."""

from __future__ import annotations

import os
import time
from contextlib import suppress
from datetime import timedelta
from pathlib import Path

import pytest
import torch.distributed as dist
from workers import run_workers, start_workers

from tunesmith.cluster.errors import StorageError
from tunesmith.trainers.ranks import on_first, on_first_at_length
from tunesmith.trainers.worker import is_lost_peer

PATIENCE = timedelta(seconds=1)
"""Of a collective operation, in a group that has the store of the first."""


def _slowly() -> str:
    time.sleep(3 * PATIENCE.total_seconds())
    return "done"


def _fail() -> str:
    raise OSError(28, "No space left on device", "here")


def _impatient(folder: Path) -> None:
    rank, world, shared = dist.get_rank(), dist.get_world_size(), dist.distributed_c10d._get_default_store()
    dist.destroy_process_group()
    store = dist.PrefixStore("impatient", shared)  # pyright: ignore[reportPrivateImportUsage]
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world, timeout=PATIENCE)
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


def _lose_the_first(folder: Path) -> None:
    try:
        on_first_at_length(lambda: os._exit(1))
    except Exception as error:  # noqa: BLE001 - what is raised is what is tested
        (folder / "found").write_text(str(is_lost_peer(error)))


def test_who_waits_at_length_for_one_that_dies_has_lost_a_peer_and_has_not_failed_itself(tmp_path: Path) -> None:
    group = start_workers(2, _lose_the_first, tmp_path)
    for process in group.processes:
        process.join(60)
    assert (tmp_path / "found").read_text() == "True"
