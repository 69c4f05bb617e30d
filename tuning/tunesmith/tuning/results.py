"""What came of a sweep: one document, from the records alone, for the report and for programs."""

from __future__ import annotations

import json
import math
import time
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from tunesmith.cluster.storage import write_atomic
from tunesmith.tuning.records import TrialFolder
from tunesmith.tuning.space import described

if TYPE_CHECKING:
    from tunesmith.tuning.sweep import Ground


@dataclass(frozen=True)
class Result:
    """A sweep that has ended.

    Attributes:
        best: number of the best trial.
        value: its metric.
        values: its configuration.
        winner: its recipe.
        artifact: its model.
        report: the report.
        trials: how many there are of each state.
    """

    sweep: str
    best: int
    value: float
    values: dict[str, Any]
    winner: str
    artifact: str
    report: str
    trials: dict[str, int] = field(default_factory=dict)


def best_trial(trials: list[TrialFolder], mode: str) -> TrialFolder | None:
    """The trial whose last report is best; failed ones and values that are not finite do not count, of equals the first."""
    sign = 1 if mode == "min" else -1
    able = []
    for trial in trials:
        ended, reports = trial.ended(), trial.reports()
        is_able = reports and math.isfinite(reports[-1].value)
        if is_able and not (ended and ended.state in ("failed", "infeasible")):
            able.append((sign * reports[-1].value, trial.number, trial))
    return min(able, key=lambda one: one[:2])[2] if able else None


def write_results(ground: Ground, baseline: float | None, began: float, complete: bool, **more: Any) -> dict[str, Any]:
    """Writes results.json and the report, and returns what they say.

    Args:
        baseline: the metric before training, if it is known.
        began: `time.time()` at the sweep's start.
        complete: whether the sweep has come to its end.
        more: what is known of the winner.
    """
    from tunesmith.tuning.report import render

    tune, folder = ground.tune, ground.folder
    trials = [_trial(record, complete) for record in folder.trials()]
    seconds = time.time() - began
    best = best_trial(folder.trials(), tune.mode)
    results = {
        "name": ground.recipe.name,
        "metric": tune.metric,
        "mode": tune.mode,
        "searcher": tune.searcher,
        "scheduler": tune.scheduler,
        "execution": "fused" if ground.why_isolated is None else "isolated",
        "why": ground.why_isolated or "LoRA on one frozen base that fits one device",
        "started": datetime.fromtimestamp(began, UTC).isoformat(timespec="seconds"),
        "seconds": seconds,
        "complete": complete,
        "budget": {
            **{key: getattr(tune, key) for key in ("trials", "max_hours", "max_gpu_hours", "max_tokens")},
            "spent": {
                "trials": len(trials),
                "hours": seconds / 3600,
                "gpu_hours": seconds / 3600 * ground.gpus,
                "tokens": sum(trial["tokens"] for trial in trials),
            },
        },
        "space": described(tune.space),
        "baseline": baseline if tune.metric == "eval_loss" else None,
        "trials": trials,
        "best": None if best is None else best.number,
        "retrained": None,
        "artifact": None,
        "winner": None,
    } | more
    write_atomic(folder.results, json.dumps(results, indent=1))
    write_atomic(folder.report, render(results))
    return results


def _trial(record: TrialFolder, complete: bool) -> dict[str, Any]:
    reports, ended = record.reports(), record.ended()
    last = reports[-1] if reports else None
    return {
        "trial": record.number,
        "values": record.values_after(),
        "state": ended.state if ended else "stopped" if complete else "running" if reports else "waiting",
        "why": ended.why if ended else "the budget was spent" if complete else "",
        "value": _finite(last.value) if last else None,
        "std": last.std if last else None,
        "reports": [
            {
                "report": one.report,
                "step": one.step,
                "tokens": one.tokens,
                "seconds": one.at,
                "value": _finite(one.value),
            }
            for one in reports
        ],
        "tokens": last.tokens if last else 0,
        "lineage": [
            {"from": one.source, "step": one.step, "report": one.report, "changed": one.changed}
            for one in record.lineage()
        ],
    }


def _finite(value: float) -> float | None:
    """The value as JSON has it."""
    return value if math.isfinite(value) else None
