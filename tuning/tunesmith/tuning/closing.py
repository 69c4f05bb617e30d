"""What a finished sweep says last."""

from __future__ import annotations

import shlex

from tunesmith.tuning.board import spelled
from tunesmith.tuning.results import Result


def summary(result: Result) -> str:
    """The winner, where everything is, and what can be done next."""
    counted = ", ".join(f"{count} {state}" for state, count in result.trials.items())
    return "\n".join(
        (
            f"trial {result.best} is best: {result.value:.4f} with {spelled(result.values)} ({counted})",
            f"model   {result.artifact}",
            f"recipe  {result.winner}",
            f"report  {result.report}",
            f"next    tunesmith adapters add NAME {shlex.quote(result.artifact)}",
        )
    )
