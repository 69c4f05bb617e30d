"""Eight LoRA trials end to end: `tunesmith sweep` side by side against Ray Tune with one process a trial; and what ASHA saves.

The peer is Ray Tune as it is usually used: a function that imports, loads the base, trains and evaluates, as many at a time
as there are cores, a thread each. It trains with our own code on a row of one lane, so every trial ends with the same
held-out loss. Both start Ray; ours also writes the report and the winner's artifact.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import workload
import yaml
from measure import assert_close, comparison, save, spread

workload.quiet()

TRIALS = 8
RANKS = [4, 8, 16]


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--rounds", type=int, default=3)
    options.add_argument("--steps", type=int, default=40)
    options.add_argument("--part", choices=["all", "makespan", "asha"], default="all")
    chosen = options.parse_args()
    lines: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        workload.write_text_rows(folder / "rows.jsonl", 600)
        if chosen.part in ("all", "makespan"):
            lines += makespan(folder, chosen.rounds, chosen.steps)
        if chosen.part in ("all", "asha"):
            lines.append(asha(folder))
    setting = (
        f"builtin:tiny-llama, rows of 64 tokens, {TRIALS} random trials of ranks {RANKS}, {chosen.steps} steps, 4 evaluations "
        "each; seconds from the command to its end. Training alone: from the first step of any trial to the last of all, "
        "the peer's as if its two processes were never idle. ASHA: 27 trials of 36 steps and 9 rungs, reduction 3, seeded random search"
    )
    parity = {"held-out losses": "every trial's last one equal to 1e-4", "best": "the same trial"}
    save("sweep", setting, parity, lines)


def recipe(folder: Path, name: str, steps: int, **tune: Any) -> dict[str, Any]:
    """A recipe with eight random LoRA trials."""
    made = workload.recipe(folder, name, adaptation="lora", train={"max_steps": steps, "precision": "fp32"})
    made["model"]["base"] = "builtin:tiny-llama"
    made["data"] = {"train": str(folder / "rows.jsonl"), "max_length": 64, "split": {"validation": 0.05}}
    space = {"train.learning_rate": {"loguniform": [1e-4, 3e-2]}, "adaptation.rank": {"choice": RANKS}}
    made["tune"] = {"space": space, "searcher": "random", "scheduler": "none", "trials": TRIALS, "reports": 4, **tune}
    return made


def makespan(folder: Path, rounds: int, steps: int) -> list[dict[str, Any]]:
    """Both ways in turn, each in a process of its own."""
    walls: dict[str, list[float]] = {"fused": [], "apart": []}
    bare: dict[str, list[float]] = {"fused": [], "apart": []}
    for number in range(-1, rounds):  # the first is not counted: it tokenises the rows, for both
        written = recipe(folder, f"round-{number + 1}", steps)
        path = folder / "recipe.yaml"
        path.write_text(yaml.safe_dump(written))
        wall, _ = timed([sys.executable, "-m", "tunesmith.cluster.main", "sweep", str(path), "--json"])
        results = json.loads((folder / "runs" / written["name"] / "results.json").read_text())
        walls["fused"].append(wall)
        bare["fused"].append(training_seconds(folder / "runs" / written["name"]))
        wall, said = timed([sys.executable, __file__.replace("sweep.py", "plain_tune.py"), str(path)])
        apart = json.loads(said.strip().splitlines()[-1])
        walls["apart"].append(wall)
        bare["apart"].append(sum(trial["seconds"] for trial in apart.values()) / min(2, os.cpu_count() or 1))
        for trial in results["trials"]:
            assert_close(f"trial {trial['trial']}", trial["value"], apart[str(trial["trial"])]["eval_loss"], 1e-4)
        if number < 0:
            walls, bare = {"fused": [], "apart": []}, {"fused": [], "apart": []}
            continue
        print(f"  round {number + 1}: {walls} {bare}", file=sys.stderr, flush=True)
    against = "Ray Tune, a process a trial"
    return [
        comparison(
            "8 LoRA trials, end to end", against, "s", walls["fused"], walls["apart"], ratio="peer/ours", aim="≥ 3"
        ),
        comparison(
            "8 LoRA trials, training alone", against, "s", bare["fused"], bare["apart"], ratio="peer/ours", aim=None
        ),
    ]


def training_seconds(sweep: Path) -> float:
    """From the moment that the first trial is brought to the worker to the last report of all."""
    reports = [
        json.loads(line) for path in sweep.glob("trials/*/reports.jsonl") for line in path.read_text().splitlines()
    ]
    first = min(report["at"] - report["seconds"] for report in reports if report["report"] == 1)
    return max(report["at"] for report in reports) - first


def asha(folder: Path) -> dict[str, Any]:
    """Tokens that ASHA spends against all trials to their ends, for the same best trial."""
    spent, best = {}, {}
    for scheduler in ("none", "asha"):
        written = recipe(folder, f"tokens-{scheduler}", 36, trials=27, reports=9, scheduler=scheduler)
        path = folder / "recipe.yaml"
        path.write_text(yaml.safe_dump(written))
        timed([sys.executable, "-m", "tunesmith.cluster.main", "sweep", str(path), "--json"])
        results = json.loads((folder / "runs" / written["name"] / "results.json").read_text())
        spent[scheduler] = float(results["budget"]["spent"]["tokens"])
        best[scheduler] = next(trial["value"] for trial in results["trials"] if trial["trial"] == results["best"])
    assert_close("best held-out loss", best["asha"], best["none"], 1e-6)
    return {
        "what": "ASHA, tokens of 27 trials", "against": "every trial to its end", "unit": "tokens", "rounds": 1,
        "aim": "≤ 0.4", "ours": spread([spent["asha"]]), "peer": spread([spent["none"]]),
        "ratio": spread([spent["asha"] / spent["none"]]),
    }  # fmt: skip


def timed(command: list[str]) -> tuple[float, str]:
    """Seconds of a command, and what it printed."""
    began = time.perf_counter()
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} failed:\n{done.stderr[-3000:]}")
    return time.perf_counter() - began, done.stdout


if __name__ == "__main__":
    main()
