"""Keys that can have no effect in this run, refused with the reason before any worker starts.

The workers' own account of what they read has the last word (`tunesmith.cluster.recipe.load.unread_error`); this one is
what the driver can tell cheaply, without torch.
"""

from __future__ import annotations

from pathlib import Path

from tunesmith.cluster.base import BaseRef
from tunesmith.cluster.errors import RecipeError
from tunesmith.cluster.recipe.schema import Recipe
from tunesmith.trainers import zero
from tunesmith.trainers.data.report import DataReport

_NEEDS_HELD_OUT = ("train.eval_steps", "train.early_stopping", "train.load_best_model_at_end", "eval.max_rows")
_WHY_DATA = {
    "template": "no row is a conversation",
    "validation": "data.validation names the held-out rows",
    "split": "only a hub data set or a saved `datasets` folder has splits",
    "weight": "rows held out are not mixed",
}


def refuse_idle_keys(recipe: Recipe, base: BaseRef, report: DataReport | None = None) -> None:
    """Refuses keys that the user wrote and nothing in this run would read.

    Args:
        report: what the data is; None before it is known, and then keys that depend on it pass.

    Raises:
        RecipeError: naming each key and why it has no effect.
    """
    reasons = _of_the_layout(recipe, base)
    written = recipe.unread_keys()
    if report is not None:
        reasons |= {key: why for key in written if (why := _of_the_data(key, report))}
    idle = [f"  {key}: {why}" for key in written if (why := reasons.get(key))]
    if idle:
        what = "a key has" if len(idle) == 1 else f"{len(idle)} keys have"
        raise RecipeError(
            f"{what} no effect in this run:\n" + "\n".join(idle),
            f"Take {'it' if len(idle) == 1 else 'them'} out, or change what keeps {'it' if len(idle) == 1 else 'them'} "
            "from having an effect.",
        )


def _of_the_layout(recipe: Recipe, base: BaseRef) -> dict[str, str]:
    """Why keys have no effect, from the recipe and the base's config alone."""
    quiet = recipe.model_copy(deep=True)  # looking at a key here is not what makes it count
    reasons = {}
    if (stage := zero.stage(quiet.cluster)) != 3:
        reasons["cluster.zero3_persistence_threshold"] = f"the ZeRO stage is {stage}, and only stage 3 shards weights"
    if quiet.cluster.offload != "nvme":
        reasons["cluster.nvme_path"] = f"cluster.offload is {quiet.cluster.offload}, not nvme"
    if not quiet.cluster.is_elastic:
        reasons["cluster.grow_after_s"] = "cluster.workers is a plain number, so the run never grows"
    if "expert" not in (Path(base.path) / "config.json").read_text(encoding="utf-8"):
        reasons["model.router_aux_loss_coef"] = f"{base.reference} is no mixture of experts"
    return reasons


def _of_the_data(key: str, report: DataReport) -> str:
    """Why a key that preparing the data has not read will not be read later either; empty when a worker may read it."""
    if key.startswith(_NEEDS_HELD_OUT):
        return "" if report.splits["validation"].examples else "no rows are held out to evaluate on"
    last = key.rpartition(".")[2]
    by_worker = key == "data.packing" or (key.startswith("data.train.") and last == "weight")
    return "" if by_worker or not key.startswith("data.") else _WHY_DATA.get(last, "preparing the data does not use it")
