"""The peer of sweep.py: Ray Tune with one process a trial, each with the base, the imports and the data of its own."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import workload
import yaml

workload.quiet()


def train_one(config: dict[str, Any]) -> None:
    """A trial from its imports to its last evaluation."""
    import time

    import torch
    from ray import tune

    torch.set_num_threads(1)
    from tunesmith.cluster.recipe.schema import Recipe
    from tunesmith.trainers.adaptations.lora import matches
    from tunesmith.trainers.data.prepare import prepare
    from tunesmith.trainers.models import resolve_base, skeleton
    from tunesmith.tuning.eligible import lane_length
    from tunesmith.tuning.fused.begin import begin
    from tunesmith.tuning.fused.group import Group
    from tunesmith.tuning.fused.trial import Trial

    recipe = Recipe.model_validate(config["recipe"])
    folder = Path(recipe.output.dir)
    base = resolve_base(recipe.model.base, None, folder)
    data = prepare(recipe, base, folder / ".cache" / "data")
    device = torch.device("cpu")
    names = matches(skeleton(base), "all-linear")
    group = Group(recipe, base, data, names, lane_length(recipe, data), 1, device, torch.float32)
    trial = Trial("one", recipe, data, begin(group, recipe, base), group.length)
    every = -(-trial.total_steps // config["reports"])
    began, loss = time.perf_counter(), 0.0
    while trial.step < trial.total_steps:
        assert group.tick([trial]) == []
        if not trial.units and (trial.step % every == 0 or trial.step == trial.total_steps):
            loss = group.held_out_loss(trial.adapter)
    tune.report({"trial": config["trial"], "eval_loss": loss, "seconds": time.perf_counter() - began})


def main() -> None:
    import ray
    from ray import tune

    from tunesmith.cluster.recipe.load import load_recipe
    from tunesmith.tuning.space import draw, recipe_of

    loaded = load_recipe(sys.argv[1])
    written = yaml.safe_load(Path(sys.argv[1]).read_text())["tune"]
    assert loaded.tune is not None
    trials = []
    for number in range(1, written["trials"] + 1):
        made = recipe_of(loaded, draw(loaded.tune.space, loaded.tune.seed, number))
        trials.append(made.model_dump(mode="json", exclude_unset=True))
    ray.init(num_cpus=os.cpu_count(), include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    done = {}
    space = {
        "case": tune.grid_search([{"trial": i, "recipe": one} for i, one in enumerate(trials, start=1)]),
    }
    tuner = tune.Tuner(
        tune.with_resources(lambda config: train_one({**config["case"], "reports": written["reports"]}), {"CPU": 1}),
        param_space=space,
        run_config=tune.RunConfig(storage_path=str(Path(loaded.output.dir).absolute() / ".plain"), verbose=0),
    )
    for result in tuner.fit():
        assert result.metrics is not None, result.error
        done[result.metrics["trial"]] = {key: result.metrics[key] for key in ("eval_loss", "seconds")}
    ray.shutdown()
    print(json.dumps(done))


if __name__ == "__main__":
    main()
