"""From the command to the first step: `tunesmith train` on a Ray of its own against `torchrun` of the same loop.

Both begin with an empty token cache and end when the first optimizer step stands in metrics.jsonl. The loss of that
step must be the same.
"""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import workload
import yaml
from measure import assert_close, comparison, in_turn, save

workload.quiet()

from tunesmith.cluster.metrics import read_metrics  # noqa: E402
from tunesmith.cluster.runs import RunFolder  # noqa: E402
from tunesmith.trainers.builtin import builtin_folder  # noqa: E402

WORLD = 2
PATIENCE_SECONDS = 300
TUNESMITH = [sys.executable, "-m", "tunesmith.cluster.main", "train"]
TORCHRUN = [
    sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={WORLD}",
    str(Path(__file__).with_name("plain_worker.py")),
]  # fmt: skip


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--rounds", type=int, default=4)
    rounds = options.parse_args().rounds
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        base = builtin_folder("tiny-llama", folder)
        losses: dict[str, list[float]] = {"tunesmith": [], "torchrun": []}

        def starter(kind: str, command: list[str]) -> Callable[[int], float]:
            def start(number: int) -> float:
                seconds, loss = first_step(folder / f"{kind}-{number}", base, command)
                losses[kind].append(loss)
                return seconds

            return start

        figures = in_turn(
            {"tunesmith": starter("tunesmith", TUNESMITH), "torchrun": starter("torchrun", TORCHRUN)}, rounds
        )
        for ours, theirs in zip(losses["tunesmith"], losses["torchrun"], strict=True):
            assert_close("loss of the first step", ours, theirs, 1e-5)
    save(
        "startup",
        f"builtin:tiny-llama, 1,000 rows to tokenise, {WORLD} workers, ZeRO-2; Ray is started anew each time.",
        {"first loss": [losses["tunesmith"][0], losses["torchrun"][0]]},
        [
            comparison("command to first step", "torchrun", "s", figures["tunesmith"], figures["torchrun"],
                       bigger_is_better=False, aim="≥ 0.67")
        ],
    )  # fmt: skip


def first_step(folder: Path, base: Path, command: list[str]) -> tuple[float, float]:
    """Seconds until the first step is written, and its loss; the run is then stopped as a user would."""
    folder.mkdir()
    workload.write_text_rows(folder / "rows.jsonl", 1000)
    written: dict[str, Any] = workload.recipe(
        folder, "first", model={"base": str(base)}, train={"max_steps": 100_000, "save_steps": 100_000}, cluster={"workers": WORLD}
    )  # fmt: skip
    (folder / "recipe.yaml").write_text(yaml.safe_dump(written))
    run = RunFolder(folder / "runs" / "first")
    log = folder / "log.txt"
    with log.open("w") as output:
        began = time.perf_counter()
        process = subprocess.Popen(
            [*command, str(folder / "recipe.yaml")], stdout=output, stderr=output, env=os.environ
        )
        try:
            while not (steps := [line for line in read_metrics(run.metrics) if "loss" in line]):
                if process.poll() is not None or time.perf_counter() - began > PATIENCE_SECONDS:
                    raise SystemExit(f"{command[2]} took no step:\n{log.read_text()[-4000:]}")
                time.sleep(0.02)
            seconds = time.perf_counter() - began
        finally:
            run.request_stop()
            if process.poll() is None and command is TUNESMITH:
                process.send_signal(signal.SIGTERM)
            process.wait(PATIENCE_SECONDS)
    return seconds, steps[0]["loss"]


if __name__ == "__main__":
    main()
