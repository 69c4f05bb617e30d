"""Starts `checkpoint_job.py` and hands it stages, for the tests of checkpoints and of what may happen to them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]


class Stages:
    """One process that has torch and DeepSpeed imported, and forks the ranks of each stage."""

    def __init__(self) -> None:
        roots = os.pathsep.join(str(ROOT / name) for name in ("cluster", "trainers"))
        env = {**os.environ, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "PYTHONPATH": roots}
        command = [sys.executable, "-W", "ignore", str(Path(__file__).with_name("checkpoint_job.py"))]
        self.process = subprocess.Popen(command, env=env, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def run(self, run: Path, steps: int, **stage: Any) -> list[dict[str, Any]]:
        """What each rank saw; see `checkpoint_job.Stage`."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        print(json.dumps({"run": str(run), "steps": steps, **stage}), file=self.process.stdin, flush=True)
        line = self.process.stdout.readline()
        assert line, "checkpoint_job.py has died; its own output says why"
        ranks = json.loads(line)
        assert not any(rank["hung"] for rank in ranks), ranks
        return ranks

    def close(self) -> None:
        """Ends the process."""
        self.process.kill()
        self.process.communicate()


@pytest.fixture(scope="module")
def stages() -> Iterator[Stages]:
    """A process for the stages of one test file."""
    process = Stages()
    yield process
    process.close()


def folders(run: Path) -> list[str]:
    """Names in the run's folder of checkpoints."""
    return sorted(path.name for path in (run / "checkpoints").iterdir())


def after(losses: dict[str, str], step: int) -> dict[str, str]:
    """The losses of the steps after a checkpoint."""
    return {key: value for key, value in losses.items() if int(key) > step}
