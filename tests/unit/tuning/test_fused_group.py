"""Trials that share a base equal the same trials alone, and do not notice their neighbours."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from fused_runs import group_for, losses_of, train_all, trial_in
from tiny_models import make
from trainings import gradient_norms, losses, recipe, train_here, write_rows
from workers import run_workers

from tunesmith.cluster.recipe.schema import Recipe
from tunesmith.trainers.export import whole_weights

STEPS = 20
TRIALS: dict[str, dict[str, Any]] = {
    "low": {
        "adaptation": {"rank": 4, "lora_alpha": 8},
        "train": {"learning_rate": 5e-3, "per_device_train_batch_size": 1},
    },
    "middle": {
        "adaptation": {"rank": 8, "lora_alpha": 32},
        "train": {
            "learning_rate": 2e-3,
            "per_device_train_batch_size": 3,
            "weight_decay": 0.1,
            "lr_scheduler_type": "linear",
            "seed": 7,
        },
    },
    "high": {
        "adaptation": {"rank": 16, "target_modules": ["q_proj", "down_proj"]},
        "train": {
            "learning_rate": 1e-3,
            "gradient_accumulation_steps": 2,
            "max_grad_norm": 0.05,
            "adam_beta2": 0.95,
            "warmup_steps": 5,
        },
    },
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    make("llama", tmp_path / "llama")
    write_rows(tmp_path / "rows.jsonl")
    return tmp_path


def written(folder: Path, name: str, **sections: Any) -> dict[str, Any]:
    adaptation = {"kind": "lora", **sections.pop("adaptation", {})}
    train = {"max_steps": STEPS, "warmup_steps": 2, "precision": "fp32", **sections.pop("train", {})}
    made = recipe(folder, name, "llama", adaptation=adaptation, **sections)
    made["train"] = train
    return made


def recipes(folder: Path, **extra: Any) -> list[Recipe]:
    return [Recipe.model_validate(written(folder, name, **trial, **extra)) for name, trial in TRIALS.items()]


def _compare_with_each_alone(folder: Path, packing: bool) -> None:
    torch.set_num_threads(1)
    data = {"packing": packing}
    alone = {name: train_here(folder, written(folder, name, **trial, data=data)) for name, trial in TRIALS.items()}
    group = group_for(folder, recipes(folder, data=data), lanes=4)
    trials = [trial_in(group, folder, one) for one in recipes(folder, data=data)]
    train_all(group, trials, STEPS)
    for trial in trials:
        torch.testing.assert_close(losses_of(trial), losses(folder, trial.key), atol=1e-5, rtol=0)
        norms = [line["grad_norm"] for line in trial.lines]
        torch.testing.assert_close(norms, gradient_norms(folder, trial.key), atol=1e-4, rtol=1e-4)
        weights = whole_weights(alone[trial.key].engine.module.model, lambda name, _: "lora_" in name)
        assert weights
        for name, weight in weights.items():
            layer, _, matrix = name.removeprefix("base_model.model.").partition(".lora_")
            ours = trial.adapter.matrices(layer)["AB".index(matrix[0])]
            torch.testing.assert_close(ours, weight, atol=1e-5, rtol=0, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("packing", [True, False])
def test_fused_trials_equal_each_trial_alone(folder: Path, packing: bool) -> None:
    run_workers(1, _compare_with_each_alone, folder, packing)


def _compare_dropout(folder: Path) -> None:
    torch.set_num_threads(1)
    trial = {"adaptation": {"rank": 4, "lora_dropout": 0.3}, "train": {"learning_rate": 5e-3}}
    train_here(folder, written(folder, "dropped", **trial))
    dropped, other = Recipe.model_validate(written(folder, "dropped", **trial)), recipes(folder)[1]
    group = group_for(folder, [dropped, other], lanes=2)
    trials = [trial_in(group, folder, one) for one in (dropped, other)]
    train_all(group, trials, STEPS)
    torch.testing.assert_close(losses_of(trials[0]), losses(folder, "dropped"), atol=1e-5, rtol=0)


def test_a_trials_dropout_is_the_one_it_has_alone(folder: Path) -> None:
    run_workers(1, _compare_dropout, folder)


def _a_neighbour(folder: Path) -> None:
    torch.set_num_threads(1)
    low, middle, high = recipes(folder)

    def others(neighbour: Recipe | None, poison: int | None, replace_at: int | None) -> dict[str, list[float]]:
        group = group_for(folder, [low, middle, high], lanes=4)
        assert group.is_steady, "this machine's matrix products depend on the number of rows"
        kept = [trial_in(group, folder, one) for one in (low, high)]
        beside = [trial_in(group, folder, neighbour)] if neighbour else []
        for tick in range(200):
            at_work = [trial for trial in [*beside, *kept] if trial.step < STEPS]
            if not [trial for trial in at_work if trial in kept]:
                break
            if tick == poison:
                with torch.no_grad():
                    beside[0].adapter.weights.fill_(float("nan"))
            if tick == replace_at:
                beside = [trial_in(group, folder, high.model_copy(update={"name": "next"}))]
            broken = group.tick(at_work)
            assert broken == [] or (broken == beside and tick == poison)
            beside = [trial for trial in beside if trial not in broken]
        return {trial.key: [line["loss"] for line in trial.lines] for trial in kept}

    undisturbed = others(middle, None, None)
    assert all(len(losses) == STEPS for losses in undisturbed.values())
    assert others(middle, 5, None) == undisturbed, "a neighbour that goes NaN"
    assert others(middle, None, 6) == undisturbed, "a neighbour that is replaced"
    assert others(None, None, None) == undisturbed, "no neighbour"


def test_the_others_do_not_notice_a_neighbour_to_the_bit(folder: Path) -> None:
    run_workers(1, _a_neighbour, folder)


def _top_layers(folder: Path) -> None:
    torch.set_num_threads(1)
    top = "model.layers.3.(self_attn|mlp).*_proj"
    trials = {
        name: {**trial, "adaptation": {**trial["adaptation"], "target_modules": top}} for name, trial in TRIALS.items()
    }
    data = {"packing": True}
    for name, trial in trials.items():
        train_here(folder, written(folder, name, **trial, data=data))
    made = [Recipe.model_validate(written(folder, name, **trial, data=data)) for name, trial in trials.items()]
    group = group_for(folder, made, lanes=4)
    assert group.prefix is not None
    assert group.prefix.depth == 3
    some = [trial_in(group, folder, one) for one in made]
    train_all(group, some, STEPS)
    for trial in some:
        torch.testing.assert_close(losses_of(trial), losses(folder, trial.key), atol=1e-5, rtol=0)
    assert group.prefix.computed <= int(group.data.train.lengths.sum()), (
        "an example went through the frozen layers twice"
    )
    assert group.prefix.served > 2 * group.prefix.computed
    group.prefix.limit = 0
    again = [trial_in(group, folder, one) for one in made]
    train_all(group, again, 3)
    assert [losses_of(trial)[:3] for trial in again] == [losses_of(trial)[:3] for trial in some], (
        "what is not kept is made anew"
    )


def test_frozen_layers_below_every_adapter_are_computed_once_an_example(folder: Path) -> None:
    make("llama", folder / "llama", num_hidden_layers=4)
    run_workers(1, _top_layers, folder)
