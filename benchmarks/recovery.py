"""What a fault costs: a worker killed on a schedule, and what is left of the time for training; and submit to first step.

A worker is killed with SIGKILL every 30 s for ten minutes, the ranks in turn. The effective training time ratio is the number of
steps that the run has kept times the median time of a step in unbroken runs before and after it, over the time from the first step
to the end of the schedule: saving, noticing, starting anew, reading the checkpoint and repeating steps are all on the other side.
The losses of the steps that the unbroken runs take as well must be the same to the bit.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import workload
import yaml
from measure import figure, save

workload.quiet()

from tunesmith.cluster.metrics import read_metrics  # noqa: E402
from tunesmith.cluster.runs import RunFolder  # noqa: E402
from tunesmith.trainers.builtin import builtin_folder  # noqa: E402

WORLD = 2
TUNESMITH = [sys.executable, "-m", "tunesmith.cluster.main"]
PATIENCE_SECONDS = 300
UNBROKEN_STEPS = 60
SAVE_STEPS = 2
"""Young's interval: a checkpoint costs 0.04 s here and a kill comes every 30 s; the root of 2 x 0.04 s x 30 s is two steps."""
POLL_SECONDS = 0.02


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--minutes", type=float, default=10)
    options.add_argument("--every", type=float, default=30, help="seconds from one kill to the next")
    options.add_argument("--submits", type=int, default=3)
    chosen = options.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        base = builtin_folder("tiny-llama", folder)
        workload.write_text_rows(folder / "rows.jsonl", 1000)
        before = unbroken(folder, base, "before")
        with trained(folder, base, "killed", max_steps=100_000) as (process, killed):
            wall, recoveries = kill_on_schedule(process, killed, chosen.minutes * 60, chosen.every)
            found = losses(killed)
        after = unbroken(folder, base, "after")
        step_seconds = statistics.median([*paces(before), *paces(after)])
        for expected in (losses(before), losses(after)):
            assert found[: len(expected)] == expected[: len(found)], "the killed run learned something else"
        with cluster_of_one(folder) as environment:
            submits = [first_step_of_a_job(folder, base, number, environment) for number in range(chosen.submits)]
    save(
        "recovery",
        f"builtin:tiny-llama, {WORLD} workers, ZeRO-2, steps of {step_seconds:.2f} s, a checkpoint every {SAVE_STEPS}; "
        f"{len(recoveries)} workers killed in {wall:.0f} s, one every {chosen.every:g} s. "
        "A job is submitted to a cluster of one node that is up and idle.",
        {"losses equal to the bit": min(UNBROKEN_STEPS, len(found)), "steps kept": len(found)},
        [
            figure("effective training time under kills", "%", [100 * len(found) * step_seconds / wall], aim="≥ 70 %"),
            figure("recovery: from the kill to the next step", "s", recoveries),
            figure("submit to first step", "s", submits),
        ],
    )


def written(folder: Path, base: Path, name: str, max_steps: int) -> Path:
    made = workload.recipe(
        folder, name, model={"base": str(base)}, cluster={"workers": WORLD},
        train={"max_steps": max_steps, "save_steps": SAVE_STEPS, "gradient_accumulation_steps": 8},
    )  # fmt: skip
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(made))
    return path


@contextlib.contextmanager
def trained(folder: Path, base: Path, name: str, max_steps: int) -> Iterator[tuple[subprocess.Popen[bytes], RunFolder]]:
    """The command at work, on a Ray of its own; asked to stop in the end."""
    recipe = written(folder, base, name, max_steps)
    with (folder / f"{name}.log").open("w") as log:
        process = subprocess.Popen([*TUNESMITH, "train", str(recipe)], stdout=log, stderr=log)
        try:
            yield process, RunFolder(folder / "runs" / name)
        except SystemExit:
            sys.stderr.write(Path(log.name).read_text()[-5000:])
            raise
        finally:
            if process.poll() is None:
                process.send_signal(signal.SIGTERM)
            process.wait(PATIENCE_SECONDS)


def unbroken(folder: Path, base: Path, name: str) -> RunFolder:
    """A run of the first steps that nobody kills."""
    with trained(folder, base, name, max_steps=UNBROKEN_STEPS) as (process, run):
        process.wait(PATIENCE_SECONDS)
    return run


def losses(run: RunFolder) -> list[float]:
    return [line["loss"] for line in read_metrics(run.metrics) if "loss" in line]


def paces(run: RunFolder) -> list[float]:
    return [line["step_seconds"] for line in read_metrics(run.metrics) if "loss" in line]


def kill_on_schedule(
    process: subprocess.Popen[bytes], run: RunFolder, seconds: float, every: float
) -> tuple[float, list[float]]:
    """Wall seconds of the schedule from the first step on, and those from each kill to the next step after it."""
    wait_until(lambda: size(run) > 0, process)
    began, recoveries = time.monotonic(), []
    for number in range(int(seconds / every)):
        time.sleep(max(0.0, began + (number + 0.5) * every - time.monotonic()))
        attempt = run.current_attempt()
        beat = json.loads((run.root / "control" / f"rank-{number % WORLD}.json").read_text())
        os.kill(beat["pid"], signal.SIGKILL)
        killed_at = time.monotonic()
        wait_until(lambda before=attempt: run.current_attempt() > before, process)
        wait_for_a_line(run, process)
        recoveries.append(time.monotonic() - killed_at)
        print(f"  kill {number + 1}: the next step after {recoveries[-1]:.1f} s", file=sys.stderr, flush=True)
    time.sleep(max(0.0, began + seconds - time.monotonic()))
    return time.monotonic() - began, recoveries


def size(run: RunFolder) -> int:
    with contextlib.suppress(FileNotFoundError):
        return run.metrics.stat().st_size
    return 0


def wait_for_a_line(run: RunFolder, process: subprocess.Popen[bytes]) -> None:
    """Until a step is added to the metrics, from which those that are repeated are taken out first."""
    seen = size(run)

    def has_grown() -> bool:
        nonlocal seen
        before, seen = seen, size(run)
        return seen > before

    wait_until(has_grown, process)


def wait_until(condition: Callable[[], bool], process: subprocess.Popen[bytes] | None = None) -> None:
    deadline = time.monotonic() + PATIENCE_SECONDS
    while not condition():
        if time.monotonic() > deadline or (process is not None and process.poll() is not None):
            raise SystemExit("the command ended or took no step; its output is above")
        time.sleep(POLL_SECONDS)


@contextlib.contextmanager
def cluster_of_one(folder: Path) -> Iterator[dict[str, str]]:
    """The environment of a cluster that is up on this machine and nobody uses."""
    environment = {**os.environ, "XDG_STATE_HOME": str(folder / "state")}
    subprocess.run([*TUNESMITH, "up", "--nodes", "1"], env=environment, check=True, stdout=sys.stderr)
    try:
        yield environment
    finally:
        subprocess.run([*TUNESMITH, "down"], env=environment, check=True, stdout=sys.stderr)


def first_step_of_a_job(folder: Path, base: Path, number: int, environment: dict[str, str]) -> float:
    """Seconds from `tunesmith submit` to the first step in the run's metrics; the job is stopped then."""
    name = f"job-{number}"
    run, began = RunFolder(folder / "runs" / name), time.monotonic()
    recipe = str(written(folder, base, name, max_steps=100_000))
    told = subprocess.run([*TUNESMITH, "submit", recipe, "--json"], env=environment, check=True, capture_output=True)
    wait_until(lambda: size(run) > 0)
    seconds = time.monotonic() - began
    subprocess.run([*TUNESMITH, "stop", json.loads(told.stdout)["id"]], env=environment, check=True, stdout=sys.stderr)
    return seconds


if __name__ == "__main__":
    main()
