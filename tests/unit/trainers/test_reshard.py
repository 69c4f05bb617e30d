"""What is refused before a checkpoint is converted, because converting unpickles."""

from __future__ import annotations

from pathlib import Path

import pytest

from tunesmith.cluster.errors import CheckpointError, DiskFullError
from tunesmith.cluster.storage import FileRecord, seal
from tunesmith.trainers.reshard import _convert, bytes_needed


def _checkpoint(folder: Path) -> tuple[Path, dict[str, FileRecord]]:
    path = folder / "step-00000003"
    path.mkdir()
    (path / "mp_rank_00_model_states.pt").write_bytes(b"weights")
    return path, {"mp_rank_00_model_states.pt": seal(path / "mp_rank_00_model_states.pt")}


def test_a_file_that_the_manifest_does_not_name_is_not_read(tmp_path: Path) -> None:
    path, files = _checkpoint(tmp_path)
    (path / "zero_pp_rank_0_mp_rank_00_optim_states.pt").write_bytes(b"cos\nsystem\n")
    with pytest.raises(CheckpointError, match="does not name zero_pp_rank_0_mp_rank_00_optim_states"):
        _convert(path, files, stage=1)
    assert [one.name for one in tmp_path.iterdir()] == ["step-00000003"]


def test_room_for_the_copy_is_looked_for_first(tmp_path: Path) -> None:
    path, files = _checkpoint(tmp_path)
    shards = {f"zero_pp_rank_{rank}_mp_rank_00_optim_states.pt": FileRecord(2**60, "") for rank in (0, 1)}
    huge, rest = files | shards, len(b"weights")
    assert [bytes_needed(huge, stage) - rest for stage in (1, 2, 3)] == [4 * 2**60, 4 * 2**60, 5 * 2**60]
    with pytest.raises(DiskFullError, match=f"{4 * 2**60 + rest} bytes needed"):
        _convert(path, huge, stage=1)
    assert [one.name for one in tmp_path.iterdir()] == ["step-00000003"]
