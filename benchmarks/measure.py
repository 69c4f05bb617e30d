"""How every benchmark measures and reports: rounds in turn, medians with their spread, one JSON file a claim."""

from __future__ import annotations

import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import psutil

RESULTS = Path(__file__).parent / "results"
LIBRARIES = ("torch", "deepspeed", "transformers", "peft", "trl", "ray")

Spread = dict[str, float]


def machine() -> dict[str, Any]:
    """What the figures were measured on; names no host."""
    return {
        "cpu": _cpu_model(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_gib": round(psutil.virtual_memory().total / 2**30),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "libraries": {name: version(name) for name in LIBRARIES},
        "load_average": round(os.getloadavg()[0], 2),
    }


def now() -> float:
    """Seconds of a clock: this process's CPU time where torch has one thread, which other work on the machine does not
    lengthen; else the wall's."""
    import torch

    return time.process_time() if torch.get_num_threads() == 1 else time.perf_counter()


def in_turn(contestants: dict[str, Callable[[int], float]], rounds: int) -> dict[str, list[float]]:
    """Runs every contestant once a round, so that a change of the machine's load meets them all.

    Args:
        contestants: each takes the round's number, from 0, and returns its figure.
        rounds: how often.

    Returns:
        The figures of each contestant, by round.
    """
    figures: dict[str, list[float]] = {name: [] for name in contestants}
    for number in range(rounds):
        for name, contestant in contestants.items():
            cpu, wall = time.process_time(), time.perf_counter()
            figures[name].append(contestant(number))
            cpu, wall = time.process_time() - cpu, time.perf_counter() - wall
            shown = f"{name}: {figures[name][-1]:.4g}  ({wall:.1f} s, {cpu:.1f} s of CPU)"
            print(f"  round {number + 1}/{rounds}  {shown}", file=sys.stderr, flush=True)
    return figures


def spread(figures: list[float]) -> Spread:
    """Median, lowest and highest."""
    return {"median": statistics.median(figures), "low": min(figures), "high": max(figures)}


def comparison(
    what: str, against: str, unit: str, ours: list[float], peer: list[float], *, ratio: str, aim: str | None
) -> dict[str, Any]:
    """One line of the table.

    Args:
        what: the thing measured.
        against: the peer.
        unit: of both figures.
        ours: our figures, by round; `peer`: the peer's, by round.
        ratio: `ours/peer`, or `peer/ours` where less is better.
        aim: what the ratio should reach, in words.
    """
    pairs = zip(ours, peer, strict=True)
    ratios = [mine / theirs if ratio == "ours/peer" else theirs / mine for mine, theirs in pairs]
    return {
        "what": what, "against": against, "unit": unit, "rounds": len(ours), "aim": aim,
        "ours": spread(ours), "peer": spread(peer), "ratio": spread(ratios),
    }  # fmt: skip


def figure(what: str, unit: str, figures: list[float], aim: str | None = None) -> dict[str, Any]:
    """A line of what has no peer to be compared with.

    Args:
        what: the thing measured.
        unit: of the figures.
        figures: one each time it was measured.
        aim: what it should reach, in words.
    """
    return {"what": what, "unit": unit, "rounds": len(figures), "aim": aim, "figure": spread(figures)}


def assert_close(what: str, ours: float, theirs: float, tolerance: float) -> None:
    """Parity comes before any ratio.

    Raises:
        SystemExit: the two differ by more than the tolerance, so they do not do the same work.
    """
    if not abs(ours - theirs) <= tolerance:
        raise SystemExit(f"no parity in {what}: ours {ours!r}, theirs {theirs!r}, tolerance {tolerance}")
    print(f"  parity: {what}: ours {ours:.7g}, theirs {theirs:.7g}", file=sys.stderr, flush=True)


def save(name: str, setting: str, parity: dict[str, Any], lines: list[dict[str, Any]]) -> None:
    """Writes results/<name>.json and prints it.

    Args:
        name: of the benchmark.
        setting: what was run, in a sentence.
        parity: what was found equal, and how closely.
        lines: from `comparison` or `figure`, or with a `what` and figures of their own.
    """
    report = {"name": name, "setting": setting, "machine": machine(), "parity": parity, "lines": lines}
    RESULTS.mkdir(exist_ok=True)
    text = json.dumps(report, indent=1, ensure_ascii=False)
    (RESULTS / f"{name}.json").write_text(text + "\n", encoding="utf-8")
    print(text)


def _cpu_model() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor()
