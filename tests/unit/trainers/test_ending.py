"""What is said of workers that Ray has lost."""

from __future__ import annotations

from pathlib import Path

import pytest
from ray.train.v2._internal.exceptions import WorkerHealthCheckFailedError, WorkerHealthCheckTimeoutError
from ray.train.v2.api.exceptions import WorkerGroupError

from tunesmith.cluster.runs import RunFolder
from tunesmith.trainers.fit import _ending

LOW = (
    "1 worker(s) were killed due to the node running low on memory. Memory on the node (IP: 10.0.0.7, ID: ab) was "
    "22.36GB used / 23.54GB limit (0.95)"
)


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (
            WorkerHealthCheckFailedError("A worker health check failed.", RuntimeError("The actor died.")),
            "its process died",
        ),
        (
            WorkerHealthCheckFailedError("A worker health check failed.", RuntimeError(f"The actor died.\n{LOW}\n")),
            f"its process was ended by Ray, its machine was out of memory: {LOW}",
        ),
        (WorkerHealthCheckTimeoutError("A worker health check timed out."), "its process hangs"),
    ],
)
def test_a_lost_worker_is_told_from_one_whose_machine_ran_out_of_memory(error: Exception, said: str, tmp_path: Path):
    ending = _ending(WorkerGroupError("worker failures", {1: error}), RunFolder(tmp_path), attempt=1)
    assert ending.died == {1: said}
    assert ending.raised == {}


def test_a_worker_that_raised_did_not_die(tmp_path: Path):
    ending = _ending(
        WorkerGroupError("worker failures", {0: RuntimeError("first line\nsecond")}), RunFolder(tmp_path), attempt=1
    )
    assert (ending.died, ending.raised) == ({}, {0: "its process failed: first line"})
