"""What happens to checkpoints from outside: a kill at any moment, a damaged file, a full disk."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from checkpoint_stages import Stages, after, folders, stages  # noqa: F401

from tunesmith.cluster.artifacts import verify
from tunesmith.cluster.runs import RunFolder


def _kill_at_every_step(
    stages: Stages,  # noqa: F811
    parent: Path,
    killed: int,
    behind: bool = False,
    **layout: int,
) -> None:
    """Kills one rank before each file operation of the save of step 2 in turn, and resumes each time."""
    whole = stages.run(parent / "whole", 3, save_at=[1, 2, 3], keep=1, **layout)
    saves = {"save_at": [1, 3], "behind_at": [2]} if behind else {"save_at": [1, 2, 3]}
    for k in range(1, 200):
        run = parent / str(k)
        ranks = stages.run(run, 3, **saves, keep=1, kill_at=[killed, k], **layout)
        if "killed" not in ranks[killed]:
            assert k > (15 if killed == 0 else 3), "the save has more steps than that: nothing was killed"
            return
        committed = 2 if "step-00000002" in folders(run) else 1
        resumed = stages.run(run, 3, save_at=[1, 2, 3], keep=1, resume="newest", **layout)
        for rank, unbroken in zip(resumed, whole, strict=True):
            assert (k, rank["resumed"], rank["warnings"]) == (k, committed, [])
            assert rank["losses"] == after(unbroken["losses"], committed)
            assert rank["weights"] == unbroken["weights"]
        assert folders(run) == ["step-00000003"], f"leftovers after k={k}"
    pytest.fail("the save never ended")


def test_a_kill_at_any_step_of_the_writer_leaves_a_whole_checkpoint(stages: Stages, tmp_path: Path) -> None:  # noqa: F811
    _kill_at_every_step(stages, tmp_path, killed=0, world=1, zero=1)


@pytest.mark.matrix
@pytest.mark.parametrize(("zero", "killed"), [(0, 0), (2, 0), (2, 1), (3, 0), (3, 1)])
def test_so_does_a_kill_of_either_of_two_writers(stages: Stages, tmp_path: Path, zero: int, killed: int) -> None:  # noqa: F811
    _kill_at_every_step(stages, tmp_path, killed=killed, world=2, zero=zero)


@pytest.mark.matrix
@pytest.mark.parametrize(("zero", "killed"), [(0, 0), (3, 0), (3, 1)])
def test_so_does_a_kill_while_it_is_written_in_the_background(
    stages: Stages,  # noqa: F811
    tmp_path: Path,
    zero: int,
    killed: int,
) -> None:
    _kill_at_every_step(stages, tmp_path, killed=killed, behind=True, world=2, zero=zero)


@pytest.mark.parametrize(
    ("zero", "wrote", "reads"), [(2, 1, 2), *(pytest.param(zero, 2, 1, marks=pytest.mark.matrix) for zero in (1, 3))]
)
def test_a_kill_while_shards_are_cut_anew_leaves_a_whole_checkpoint_and_nothing_else(
    stages: Stages,  # noqa: F811
    tmp_path: Path,
    zero: int,
    wrote: int,
    reads: int,
) -> None:
    """Kills the rank that converts at its first operation on files, its 31st and so on, and resumes without a save."""
    stages.run(tmp_path / "made", 2, save_at=[1, 2], world=wrote, zero=zero)
    resuming = {"world": reads, "zero": zero, "elastic": True, "resume": "newest"}
    whole = stages.run(shutil.copytree(tmp_path / "made", tmp_path / "whole"), 4, **resuming)
    were_left = 0
    for k in range(1, 2000, 30):
        run = shutil.copytree(tmp_path / "made", tmp_path / str(k))
        ranks = stages.run(run, 4, **resuming, kill_in="load", kill_at=[0, k])
        if "killed" not in ranks[0]:
            assert were_left >= 2, "too few kills came in the middle of a conversion"
            return
        were_left += any(name.startswith("converted.tmp-") for name in folders(run))
        verify(run / "checkpoints" / "step-00000002")
        for rank, unbroken in zip(stages.run(run, 4, **resuming), whole, strict=True):
            assert (k, rank["resumed"], rank["warnings"]) == (k, 2, [])
            assert (rank["losses"], rank["weights"]) == (unbroken["losses"], unbroken["weights"])
        assert folders(run) == ["step-00000001", "step-00000002"], f"leftovers after k={k}"
    pytest.fail("the conversion never ended")


def _truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def _flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize("name", ["*model_states.pt", "*rank_1*optim_states.pt", "MANIFEST.json"])
@pytest.mark.parametrize("damage", [_truncate, _flip])
def test_a_damaged_checkpoint_is_set_aside_and_the_one_before_is_used(
    stages: Stages,  # noqa: F811
    tmp_path: Path,
    damage: Callable[[Path], None],
    name: str,
) -> None:
    whole = stages.run(tmp_path, 3, zero=2, save_at=[1, 2])
    damage(next((tmp_path / "checkpoints" / "step-00000002").glob(name)))
    resumed = stages.run(tmp_path, 3, zero=2, save_at=[2], resume="newest")
    for rank, unbroken in zip(resumed, whole, strict=True):
        assert rank["resumed"] == 1
        assert rank["losses"] == after(unbroken["losses"], 1)
        assert re.fullmatch(
            r"checkpoint step-00000002 is damaged \(.*\) and was set aside as quarantined-step-00000002; "
            r"step-00000001 is used instead",
            rank["warnings"][0],
        )
    told = RunFolder(tmp_path).warnings(attempt=2).read_text()
    assert [json.loads(line)["text"] for line in told.splitlines()] == resumed[0]["warnings"]
    assert folders(tmp_path) == ["quarantined-step-00000002", "step-00000001", "step-00000002"]


def test_when_no_checkpoint_is_whole_the_run_begins_again_and_says_so(stages: Stages, tmp_path: Path) -> None:  # noqa: F811
    whole = stages.run(tmp_path, 2, save_at=[1])
    _flip(next((tmp_path / "checkpoints" / "step-00000001").glob("*.pt")))
    resumed = stages.run(tmp_path, 2, resume="newest")
    assert resumed[0]["resumed"] is None
    assert resumed[0]["losses"] == whole[0]["losses"]
    assert resumed[0]["warnings"][0].endswith("no whole checkpoint is left")


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 2 MiB."""
    mount = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(tmp_path)], capture_output=True, text=True, check=False
    )
    if mount.returncode:
        pytest.skip(f"a small disk cannot be mounted here: {mount.stderr.strip()}")
    try:
        yield tmp_path
    finally:
        subprocess.run(["umount", "-l", str(tmp_path)], check=True)


@pytest.mark.parametrize("zero", [0, 3])
def test_a_full_disk_is_told_by_all_ranks_and_the_earlier_checkpoint_stays(
    stages: Stages,  # noqa: F811
    small_disk: Path,
    zero: int,
) -> None:
    """ZeRO-0: too large a file is not begun. ZeRO-3: each rank's file would fit alone, both do not."""
    run = small_disk / "bot"
    ranks = stages.run(run, 2, zero=zero, width=320, save_at=[1, 2])
    assert [rank["saved"] for rank in ranks] == [[1], [1]]
    assert ranks[0]["error"] == ranks[1]["error"]
    kind, message = ranks[0]["error"]
    found = re.match(rf"{run}/checkpoints/step-00000002: disk full: (\d+) bytes needed, (\d+) bytes free\n", message)
    assert kind == "DiskFullError"
    assert found, message
    assert int(found[1]) > int(found[2])
    assert folders(run) == ["step-00000001"]
    verify(run / "checkpoints" / "step-00000001")
