"""`tunesmith quickstart` as a new user types it: offline, two stages, losses that fall, receipts that pass."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tunesmith.cluster.artifacts import verify


@pytest.mark.matrix
def test_the_quickstart_lowers_both_losses_and_passes_its_receipts(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "tunesmith.cluster.main", "quickstart", "--dir", str(tmp_path / "q"), "--json"]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    summary = json.loads(done.stdout.splitlines()[-1])
    assert len(summary["answers"]) == 3
    assert all(one["base"] != one["tuned"] for one in summary["answers"]), "the adapter changes no answer"
    stages = summary["stages"]
    assert [stage["run"] for stage in stages] == ["1-documentation", "2-answers"]
    for stage in stages:
        assert stage["loss_after"] < 0.8 * stage["loss_before"]
        assert stage["mask_passed"]
        assert stage["parity_passed"]
        verify(Path(stage["artifact"]))
