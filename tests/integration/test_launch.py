"""From a recipe to an artifact on Ray Train, in this process."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pytest
import small_runs

from tunesmith.cluster.artifacts import verify
from tunesmith.cluster.errors import ChangedError, RecipeError
from tunesmith.cluster.events import Event, Note, Step, Training
from tunesmith.cluster.recipe.load import load_recipe
from tunesmith.cluster.recipe.schema import Recipe
from tunesmith.cluster.session import RaySession
from tunesmith.trainers import launch
from tunesmith.trainers.closing import summary


@pytest.fixture
def recipe(tmp_path: Path, tiny_base: Path) -> dict[str, Any]:
    rows = small_runs.write_rows(tmp_path / "rows.jsonl", 80)
    recipe = small_runs.small_recipe("small", tiny_base, rows, tmp_path / "runs")
    recipe["train"] |= {"epochs": None, "max_steps": 4}
    return recipe


def loaded(recipe: dict[str, Any], folder: Path, *overrides: str) -> Recipe:
    return load_recipe(small_runs.write_recipe(folder, recipe), list(overrides))


def test_a_run_trains_answers_at_once_when_finished_and_refuses_to_be_another(
    recipe: dict[str, Any], tmp_path: Path, ray_session: RaySession
):
    # keys that the driver alone reads, so that the workers must be told of them
    recipe["cluster"] |= {"timeout_s": 600, "memory_gib_per_worker": 0.1, "gpus_per_worker": 0}
    recipe["train"]["max_failures"] = 2
    events: list[Event] = []

    def listen(event: Event) -> None:
        events.append(event)
        if isinstance(event, Step) and event.line["step"] == 2:  # slower than all that is left
            next(one for one in threading.enumerate() if one.name == "ray-train").join(120)

    result = launch.run(loaded(recipe, tmp_path), on_event=listen)
    assert result.steps == 4
    assert set(result.metrics) == {"train_loss", "eval_loss", "tokens_per_second"}
    verify(Path(result.artifact))
    run = tmp_path / "runs" / "small"
    for name in ("recipe.yaml", "run.json", "data.json", "metrics.jsonl", "loss.png", "log.txt", "receipts"):
        assert (run / name).exists(), name
    assert not (run / ".ray").exists()
    assert [e.line["step"] for e in events if isinstance(e, Step) and "loss" in e.line] == [1, 2, 3, 4]
    assert any("prompt and completion" in e.text for e in events if isinstance(e, Note))
    closing = summary(loaded(recipe, tmp_path), result, ["train", "small.yaml"])
    for what in (result.artifact, f"→ {result.metrics['eval_loss']:.3f}", "mask passed, parity passed", "loss.png"):
        assert what in closing
    assert closing.endswith(" train small.yaml")

    events.clear()
    assert launch.run(loaded(recipe, tmp_path), on_event=events.append) == result
    assert not any(isinstance(e, Training) for e in events)
    assert any("finished already" in e.text for e in events if isinstance(e, Note))

    with pytest.raises(ChangedError, match=r"train\.learning_rate: 0\.001 → 0\.01"):
        launch.run(loaded(recipe, tmp_path, "train.learning_rate=0.01"))
    (tmp_path / "rows.jsonl").write_text('{"prompt": "a", "completion": "b"}\n' * 20)
    with pytest.raises(ChangedError, match=r"rows\.jsonl"):
        launch.run(loaded(recipe, tmp_path))


def test_a_key_that_nothing_read_ends_the_set_up_and_leaves_no_run(
    recipe: dict[str, Any], tmp_path: Path, ray_session: RaySession
):
    recipe["data"]["split"] = {"validation": 0}
    recipe["train"]["eval_steps"] = 2  # nothing is held out, so nothing is evaluated
    with pytest.raises(RecipeError, match=r"train\.eval_steps"):
        launch.run(loaded(recipe, tmp_path))
    assert not (tmp_path / "runs" / "small").exists()


def test_a_dry_run_says_what_it_would_do_and_leaves_no_run(recipe: dict[str, Any], tmp_path: Path):
    plan = launch.plan(loaded(recipe, tmp_path))
    assert (plan["workers"], plan["cpus_per_worker"], plan["goes_on_from_step"]) == (2, 0.5, 0)
    assert plan["data"]["splits"]["train"]["rows"] == 72
    assert not (tmp_path / "runs" / "small").exists()
