"""The queue's decision on a large cluster, against its plain twin: the same decision without arrays, bisection and memory.

1,000 nodes of 8 GPUs are full, 10,000 jobs of 100 users wait, and a higher priority has just come in, so that victims are chosen too.
Both must start, stop and queue the same jobs in the same places.
"""

from __future__ import annotations

import argparse
import random
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from measure import comparison, in_turn, save

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))

import plain_queue

from tunesmith.cluster.queue.decide import decide
from tunesmith.cluster.queue.state import Decision, Job, Running
from tunesmith.cluster.resources import Need, Node

NOW = 100_000.0
SHAPES = [(8, 1, 0), (16, 1, 0), (8, 1, 64), (4, 1, 0), (4, 0, 0), (16, 0, 32)]
"""CPUs, GPUs and GiB of a worker."""


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--rounds", type=int, default=3)
    options.add_argument("--jobs", type=int, default=10_000)
    options.add_argument("--nodes", type=int, default=1_000)
    given = options.parse_args()
    queue, running, nodes = situation(given.jobs, given.nodes)
    decided: dict[str, Any] = {}

    def timed(name: str, make: Callable[[], Any]) -> Callable[[int], float]:
        def once(_: int) -> float:
            began = time.process_time()  # neither has a second thread
            decided[name] = make()
            return (time.process_time() - began) * 1000

        return once

    figures = in_turn(
        {
            "ours": timed("ours", lambda: decide(queue, running, nodes, NOW)),
            "plain": timed("plain", lambda: plain_queue.decide(queue, running, nodes, NOW, {})),
        },
        given.rounds,
    )
    starts, preempts, waits = decided["plain"]
    if as_plain(decided["ours"]) != (starts, preempts, waits):
        raise SystemExit("no parity: the two decide differently")
    save(
        "scheduler",
        f"{len(queue):,} waiting jobs of 100 users, {len(running):,} running, {len(nodes):,} nodes of 8 GPUs; "
        "milliseconds of CPU, one thread.",
        {"starts": len(starts), "victims": len(preempts), "waiting": len(waits), "same decision": True},
        [
            comparison(f"decision at {len(queue):,} jobs × {len(nodes):,} nodes", "plain twin", "ms",
                       figures["ours"], figures["plain"], ratio="peer/ours", aim="ours < 50 ms")
        ],
    )  # fmt: skip


def situation(jobs: int, nodes: int) -> tuple[list[Job], list[Running], list[Node]]:
    """A full cluster, a queue, and at its head a job of high priority that needs most of the cluster's GPUs."""
    chance = random.Random(0)
    cluster = [Node(128, 8, 1024, f"node-{at:04}", ("A100", "H100")[at % 2]) for at in range(nodes)]

    def job(name: str) -> Job:
        cpus, gpus, memory = chance.choice(SHAPES)
        need = Need(chance.choice([1, 2, 4, 8, 16, 64]), cpus, gpus, memory)
        expected_s = chance.choice([None, 600.0, 3600.0])
        user = f"user-{chance.randrange(100)}"
        return Job(name, user, need, chance.random() * NOW, chance.randrange(3), expected_s=expected_s)

    earlier = decide([job(f"running-{at:05}") for at in range(jobs)], [], cluster, NOW).starts
    running = [
        Running(start.job, start.placed, NOW - chance.random() * 1e4, chance.choice([None, 100.0, 5000.0]))
        for start in earlier
    ]
    queue = [job(f"waiting-{at:05}") for at in range(jobs - 1)]
    return [*queue, Job("urgent", "user-0", Need(4 * nodes // 10, 8, 1), NOW, priority=9)], running, cluster


def as_plain(decision: Decision) -> plain_queue.Decided:
    """In the twin's terms."""
    return (
        [(start.job.id, start.placed, start.lent_until) for start in decision.starts],
        [(preempt.victim.id, preempt.beneficiary.id) for preempt in decision.preempts],
        list(decision.waits),
    )


if __name__ == "__main__":
    main()
