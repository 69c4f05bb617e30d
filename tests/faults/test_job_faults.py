"""Jobs whose cluster is too small when they come, whose folder cannot be, and whose disk is full for a while."""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import cluster_here
import pytest
import small_runs
from cluster_here import jobs, noted, small_job, told, tunesmith, wait_for_state, wait_until

from tunesmith.cluster import local
from tunesmith.cluster.local import Local
from tunesmith.cluster.runstore import log_file

pytestmark = pytest.mark.matrix


@pytest.fixture(scope="module")
def here(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Local]:
    with cluster_here.cluster_here(tmp_path_factory.mktemp("state")) as known:
        yield known


def test_a_job_that_the_cluster_is_too_small_for_waits_until_a_node_comes(
    here: Local, tmp_path: Path, tiny_base: Path
) -> None:
    lost = here.members[1]
    os.killpg(lost.pid, signal.SIGKILL)
    wait_until(lambda: not lost.alive, "end of the node")
    id = told("submit", str(small_job(tmp_path, tiny_base, "large")))["id"]
    wait_until(lambda: "the cluster holds 1 of these" in noted(tmp_path / "runs/large", id)["why"], "a reason")
    local.up(len(here.members), here.head.cpus, here.head.gpus)
    assert wait_for_state(id, "succeeded")["exit_code"] == 0


def test_a_job_whose_folder_cannot_be_made_fails_with_that_as_the_reason(
    here: Local, tmp_path: Path, tiny_base: Path
) -> None:
    recipe = small_job(tmp_path, tiny_base, "nowhere")
    id = told("submit", str(recipe), "--set", "output.dir=/proc/none")["id"]
    failed = wait_for_state(id, "failed")
    assert failed["exit_code"] == 2
    assert failed["why"].startswith("/proc/none/nowhere: cannot be written by the job's driver: ")
    log = tunesmith("logs", id).stdout
    assert "Set output.dir to a folder" in log
    assert "Traceback" not in log


@pytest.mark.skipif(os.geteuid() != 0, reason="only root may mount a small disk")
def test_a_disk_that_is_full_for_a_while_ends_no_job_and_nothing_that_was_said_is_lost(
    here: Local, tmp_path: Path, tiny_base: Path
) -> None:
    disk = tmp_path / "runs"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64m", "tmpfs", str(disk)], check=False)
    if mounted.returncode:
        pytest.skip("nothing may be mounted here")
    try:
        run = disk / "tight"
        id = told("submit", str(small_job(tmp_path, tiny_base, "tight", epochs=8)))["id"]
        wait_until(lambda: small_runs.last_step(run) >= 2, "step 2")
        with small_runs.frozen(run):
            fill = disk / "fill"
            filled = subprocess.run(["dd", "if=/dev/zero", f"of={fill}"], capture_output=True, text=True, check=False)
            assert "No space left on device" in filled.stderr
        driver_log = wait_until(lambda: "storage fails" in ray_log(here, id) and ray_log(here, id), "a warning")
        assert "failed" not in driver_log.partition("storage fails")[0]
        wait_until(lambda: "storage fails: " in jobs()[id]["why"], "the reason in the list of jobs")
        fill.unlink()
        assert wait_for_state(id, "succeeded")["exit_code"] == 0
        assert "storage fails" in log_file(run, id).read_text()
        assert noted(run, id)["state"] == "succeeded"
    finally:
        subprocess.run(["umount", "-l", str(disk)], check=True)


def ray_log(here: Local, id: str) -> str:
    """What the driver has printed, which Ray keeps on another disk."""
    return "".join(path.read_text() for path in Path(here.scratch).rglob(f"job-driver-{id}.log"))
