"""Runs of a few seconds for tests, and the command line around them."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import psutil
import yaml

from tunesmith.cluster.metrics import read_metrics

PATIENCE_S = 300.0
ACCUMULATION = 4
"""Micro-batches a step of `small_recipe`."""


def write_rows(path: Path, count: int = 240) -> Path:
    """Sums as prompt and completion, about 40 bytes a row."""
    rows = (
        {"prompt": f"What is {n} plus {n * 7 % 50}?", "completion": f" It is {n + n * 7 % 50}."} for n in range(count)
    )
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def small_recipe(name: str, base: Path, rows: Path, output: Path) -> dict[str, Any]:
    """Two workers, fp32, about 8 steps an epoch for 2 epochs, a checkpoint every 3 steps."""
    return {
        "name": name,
        "model": {"base": str(base)},
        "data": {"train": str(rows), "max_length": 128, "split": {"validation": 0.1}},
        "objective": "sft",
        "adaptation": "full",
        "train": {
            "learning_rate": 1e-3,
            "epochs": 2,
            "gradient_accumulation_steps": ACCUMULATION,
            "precision": "fp32",
            "save_steps": 3,
        },
        "cluster": {"workers": 2, "cpus_per_worker": 0.5},
        "output": {"dir": str(output), "report_to": []},
    }


def write_recipe(folder: Path, recipe: dict[str, Any]) -> Path:
    path = folder / f"{recipe['name']}.yaml"
    path.write_text(yaml.safe_dump(recipe))
    return path


class Command:
    """`tunesmith train RECIPE --json`, as a shell runs it."""

    def __init__(self, recipe: Path, *options: str, environment: dict[str, str] | None = None) -> None:
        self._said = Path(f"{recipe}.stderr")
        with self._said.open("wb") as stderr:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "tunesmith.cluster.main", "train", str(recipe), "--json", *options],
                stdout=subprocess.PIPE,
                stderr=stderr,
                text=True,
                env=os.environ | (environment or {}),
                start_new_session=True,  # of which it is the process group's leader, as under a shell with a terminal
            )

    def finish(self) -> tuple[int, str, str]:
        """Exit code, standard output and standard error."""
        out, _ = self.process.communicate(timeout=PATIENCE_S)
        return self.process.returncode, out, self.said()

    def said(self) -> str:
        """Standard error so far."""
        return self._said.read_text()

    def wait_for_words(self, words: str) -> None:
        self.wait_until(lambda: words in self.said(), f"{words!r}")

    def wait_until(self, condition: Callable[[], bool], what: str) -> None:
        """Waits while the command runs; fails when it ends first."""
        deadline = time.monotonic() + PATIENCE_S
        while not condition():
            assert self.process.poll() is None, f"ended before {what}:\n{self.finish()[2]}"
            assert time.monotonic() < deadline, f"no {what} after {PATIENCE_S} s"
            time.sleep(0.01)

    def wait_for_step(self, run: Path, step: int) -> None:
        self.wait_until(lambda: last_step(run) >= step, f"step {step}")

    def signal_group(self, number: signal.Signals) -> None:
        """As Ctrl-C on a terminal, `timeout` or a batch system: to the whole process group."""
        os.killpg(self.process.pid, number)

    def kill(self) -> None:
        """Ends a command that a failing test left behind."""
        if self.process.poll() is None:
            self.process.kill()
            self.process.communicate()


def last_step(run: Path) -> int:
    return max((line["step"] for line in read_metrics(run / "metrics.jsonl")), default=-1)


def worker_pid(run: Path, rank: int) -> int:
    """Process of a rank of the current attempt."""
    return json.loads((run / "control" / f"rank-{rank}.json").read_text())["pid"]


@contextmanager
def frozen(*runs: Path) -> Iterator[None]:
    """The workers of these runs stand still within the block: they train nothing meanwhile, however long it takes."""
    pids = [json.loads(path.read_text())["pid"] for run in runs for path in (run / "control").glob("rank-*.json")]
    assert pids, f"no workers in {runs}"
    for pid in pids:
        os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        for pid in pids:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGCONT)


def kill_worker(run: Path, rank: int) -> None:
    os.kill(worker_pid(run, rank), 9)


def what_was_learned(run: Path) -> list[tuple[Any, ...]]:
    """All that must be equal in two runs of one recipe: losses, learning rates and steps, in order."""
    return [
        (line["step"], line.get("loss"), line.get("eval_loss"), line.get("learning_rate"), line.get("grad_norm"))
        for line in read_metrics(run / "metrics.jsonl")
    ]


def weights(artifact: Path) -> dict[str, str]:
    """sha256 of the artifact's weight files, as its manifest has them."""
    files = json.loads((artifact / "MANIFEST.json").read_text())["files"]
    return {name: about["sha256"] for name, about in files.items() if name.endswith(".safetensors")}


def processes_below(pid: int) -> list[int]:
    """Children of a process, their children, and so on."""
    children = [
        int(child) for task in Path(f"/proc/{pid}/task").glob("*/children") for child in task.read_text().split()
    ]
    return [found for child in children for found in (child, *processes_below(child))]


def listening(pids: list[int]) -> list[str]:
    """Addresses on which any of these processes accepts connections."""
    return [
        connection.laddr.ip
        for pid in pids
        for connection in psutil.Process(pid).net_connections("inet")
        if connection.status == psutil.CONN_LISTEN
    ]


def wait_for_end_of(pids: list[int], patience_s: float = 30) -> None:
    deadline = time.monotonic() + patience_s
    while left := [pid for pid in pids if is_alive(pid)]:
        assert time.monotonic() < deadline, f"processes {left} are still there"
        time.sleep(0.1)


def is_alive(pid: int) -> bool:
    """Whether the process is there; one that only waits to be reaped is not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False
