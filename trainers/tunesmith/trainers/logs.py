"""Where metrics go besides metrics.jsonl."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from typing import Any, Protocol

from tunesmith.cluster.errors import RecipeError
from tunesmith.cluster.recipe.load import resolved
from tunesmith.cluster.recipe.schema import Recipe
from tunesmith.cluster.runs import RunFolder


class Log(Protocol):
    """A place that takes numbers by step."""

    def write(self, step: int, values: dict[str, float]) -> None:
        """Takes the values of a step."""
        ...

    def close(self) -> None:
        """Flushes what is left."""
        ...


def require_installed(names: Sequence[str]) -> None:
    """Fails early when a place that the recipe names is not installed.

    Raises:
        RecipeError: naming the missing packages.
    """
    missing = [name for name in names if importlib.util.find_spec(name) is None]
    if missing:
        raise RecipeError(
            f"output.report_to names {', '.join(missing)}, not installed here",
            f"pip install {' '.join(missing)}, or take it out of output.report_to.",
        )


def open_logs(recipe: Recipe, run: RunFolder, first_step: int) -> list[Log]:
    """Opens what `output.report_to` names; earlier entries from `first_step` on are superseded."""
    opened: list[Log] = []
    for name in recipe.output.report_to:
        if name == "tensorboard":
            opened.append(TensorBoard(run, first_step))
        elif name == "wandb":
            opened.append(WeightsAndBiases(recipe, run))
        else:
            opened.append(MlFlow(recipe))
    return opened


class TensorBoard:
    """Event files in `<run>/tensorboard`."""

    def __init__(self, run: RunFolder, first_step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(run.tensorboard), purge_step=first_step)

    def write(self, step: int, values: dict[str, float]) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        self._writer.close()


class WeightsAndBiases:
    """A W&B run that goes on under the same id when the run resumes."""

    def __init__(self, recipe: Recipe, run: RunFolder) -> None:
        import wandb  # pyright: ignore[reportMissingImports]

        self._run: Any = wandb.init(
            id=recipe.name, name=recipe.name, dir=str(run.root), config=resolved(recipe), resume="allow"
        )

    def write(self, step: int, values: dict[str, float]) -> None:
        self._run.log(values, step=step)

    def close(self) -> None:
        self._run.finish()


class MlFlow:
    """An MLflow run of the recipe's name."""

    def __init__(self, recipe: Recipe) -> None:
        import mlflow  # pyright: ignore[reportMissingImports]

        self._mlflow: Any = mlflow
        mlflow.start_run(run_name=recipe.name)

    def write(self, step: int, values: dict[str, float]) -> None:
        self._mlflow.log_metrics(values, step=step)

    def close(self) -> None:
        self._mlflow.end_run()


def numbers(record: dict[str, Any]) -> dict[str, float]:
    """The numeric entries of a metrics line, without the step."""
    return {k: float(v) for k, v in record.items() if isinstance(v, int | float) and k not in ("step", "total_steps")}
