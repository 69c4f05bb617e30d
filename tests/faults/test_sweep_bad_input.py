"""What people get wrong in a search: exit code 2, where and what it is, before Ray is started and with nothing left behind."""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import small_runs
import yaml

from tunesmith.cluster import main as command_line
from tunesmith.cluster.session import RaySession

Recipe = dict[str, Any]
Run = Callable[..., tuple[int, str]]
RATE = {"train.learning_rate": {"loguniform": [1e-5, 1e-2]}}
RANK = {"adaptation.rank": {"choice": [4, 8]}}


@dataclass
class Case:
    """A mistake in the search of an otherwise good recipe, and what the message has to say."""

    name: str
    says: list[str]
    tune: dict[str, Any] = field(default_factory=dict)
    sections: dict[str, Any] = field(default_factory=dict)
    """Of the recipe."""
    at: str = ""
    """A text of the line that is named, as the file has it."""


def of(space: dict[str, Any], **more: Any) -> dict[str, Any]:
    return {"space": space, **more}


IN_THE_RECIPE = [
    Case(
        "key that does not exist",
        ["tune.space.train.lerning_rate: a recipe has no such key", "Did you mean train.learning_rate?"],
        of({"train.lerning_rate": {"choice": [1]}}),
        at="train.lerning_rate:",
    ),
    Case(
        "empty range",
        ["train.learning_rate.uniform: the range from 0.1 to 0.01 is empty; the lower end comes first"],
        of({"train.learning_rate": {"uniform": [0.1, 0.01]}}),
        at="uniform:",
    ),
    Case("empty list", ["rank.choice: an empty list leaves nothing"], of({"adaptation.rank": {"choice": []}})),
    Case(
        "metric that nobody reports",
        ["tune.metric: no trial reports 'evalloss'", "Did you mean eval_loss?", "tokens_per_second"],
        of(RATE, metric="evalloss"),
        at="metric:",
    ),
    Case(
        "grid of a range",
        ["tune.searcher: grid tries every value", "train.learning_rate has a loguniform range", "grid"],
        of(RATE, searcher="grid"),
        at="searcher:",
    ),
    Case(
        "condition that never holds",
        ["when adaptation.rank is 5 never holds; adaptation.rank is one of [4, 8]"],
        of(RANK | {"train.epochs": {"choice": [1], "when": {"adaptation.rank": 5}}}),
        at="train.epochs:",
    ),
    Case(
        "value that a key cannot take",
        ["tune.space.train.lr_scheduler_type: 'lineer' cannot be tried", "did you mean linear?"],
        of({"train.lr_scheduler_type": {"choice": ["cosine", "lineer"]}}),
        at="train.lr_scheduler_type:",
    ),
    Case(
        "values that contradict each other",
        ["tune.space: none of 16 configurations is a recipe", "epochs and max_steps are both given"],
        of({"train.epochs": {"choice": [1]}, "train.max_steps": {"choice": [5]}}),
        at="space:",
    ),
    Case(
        "base",
        ["tune.space.model.base: all trials of a sweep share it", "one sweep for each value"],
        of({"model.base": {"choice": ["a", "b"]}}),
        at="model.base:",
    ),
    Case(
        "evaluations",
        ["train.eval_steps: has no effect in a sweep: tune.reports says how often", "Take it out."],
        of(RATE),
        {"train": {"eval_steps": 4}},
        at="eval_steps:",
    ),
    Case(
        "population of shapes",
        ["tune.scheduler: pbt", "none of adaptation.rank may change then", "Search one of train.learning_rate"],
        of(RANK, scheduler="pbt"),
        at="scheduler:",
    ),
]
BEYOND_THE_RECIPE = [
    Case(
        "fused of all weights",
        ["tune.execution: fused is not possible: adaptation: full is not LoRA", "auto"],
        of(RATE, execution="fused"),
        {"adaptation": "full"},
        at="execution:",
    ),
    Case(
        "fused of different data",
        ["tune.execution: fused is not possible: the trials differ in data.packing"],
        of(RATE | {"data.packing": {"choice": [True, False]}}, execution="fused"),
        at="execution:",
    ),
    Case(
        "held-out loss of nothing",
        ["tune.metric: eval_loss is measured on held-out rows", "data.split.validation above 0", "tune.metric: loss"],
        of(RATE, metric="eval_loss"),
        {"data": {"split": {"validation": 0}}},
        at="metric:",
    ),
    Case("missing data", ["nowhere.jsonl", "does not exist"], of(RATE), {"data": {"train": "nowhere.jsonl"}}),
    Case("missing base", ["config.json"], of(RATE), {"model": {"base": "{here}"}}),
    Case(
        "workers",
        ["4096 workers × 1 CPU = 4096 CPUs; this machine has"],
        of(RATE),
        {"cluster": {"workers": 4096, "cpus_per_worker": 1}},
    ),
]


@pytest.fixture(scope="module")
def here(tmp_path_factory: pytest.TempPathFactory, tiny_base: Path) -> Path:
    here = tmp_path_factory.mktemp("sweeps")
    shutil.copytree(tiny_base, here / "base")
    small_runs.write_rows(here / "rows.jsonl", 60)
    return here


@pytest.fixture
def good(here: Path) -> Iterator[Recipe]:
    """A recipe without a search; what it leaves is removed."""
    recipe = small_runs.small_recipe("bad", here / "base", here / "rows.jsonl", here / "runs")
    del recipe["train"]["epochs"]
    recipe["cluster"] = {"cpus_per_worker": 0.5}
    yield recipe | {"adaptation": "lora"}
    shutil.rmtree(here / "runs", ignore_errors=True)


@pytest.fixture
def tunesmith(here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """`tunesmith COMMAND RECIPE --json` in this process, where Ray is never started: exit code and standard error."""
    monkeypatch.setattr(RaySession, "start", lambda _: pytest.fail("Ray was started"))
    monkeypatch.setattr(RaySession, "nodes", lambda _: pytest.fail("Ray was asked"))

    def run(command: str, recipe: Recipe, *options: str) -> tuple[int, str]:
        path = here / "bad.yaml"
        path.write_text(yaml.safe_dump(recipe, sort_keys=False))
        monkeypatch.setattr("sys.argv", ["tunesmith", command, str(path), "--json", *options])
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            command_line.main()
        out, said = capsys.readouterr()
        assert "Traceback" not in said
        assert isinstance(ended.value.code, int)
        assert ended.value.code == 0 or out == ""
        return ended.value.code, said if ended.value.code else out

    return run


def with_search(good: Recipe, case: Case, here: Path) -> Recipe:
    recipe = copy.deepcopy(good) | {"tune": copy.deepcopy(case.tune)}
    for name, section in case.sections.items():
        changed = json.loads(json.dumps(section).replace("{here}", str(here)))
        recipe[name] = changed if isinstance(changed, str) else {**recipe.get(name, {}), **changed}
    return recipe


def line_of(text: str, path: Path) -> int:
    return next(number for number, line in enumerate(path.read_text().splitlines(), start=1) if text in line)


def check(said: str, case: Case, here: Path) -> None:
    assert said.startswith("error: ")
    for part in case.says:
        assert part in said, said
    if case.at:
        path = here / "bad.yaml"
        assert f"{path}:{line_of(case.at, path)}: " in said, said


@pytest.mark.parametrize("case", [*IN_THE_RECIPE, *BEYOND_THE_RECIPE], ids=lambda case: case.name)
def test_a_sweep_names_the_mistake_and_leaves_nothing(case: Case, good: Recipe, here: Path, tunesmith: Run):
    code, said = tunesmith("sweep", with_search(good, case, here))
    assert code == 2, said
    check(said, case, here)
    assert {path.name for path in (here / "runs").glob("*")} <= {".cache"}


@pytest.mark.parametrize("case", IN_THE_RECIPE, ids=lambda case: case.name)
def test_validate_names_it_too(case: Case, good: Recipe, here: Path, tunesmith: Run):
    code, said = tunesmith("validate", with_search(good, case, here))
    assert code == 2, said
    check(said, case, here)
    assert not (here / "runs").exists()


def test_a_sweep_of_a_recipe_without_a_search_is_refused(good: Recipe, tunesmith: Run):
    code, said = tunesmith("sweep", good)
    assert code == 2
    assert "the recipe of bad has no tune section" in said
    assert "docs/sweep.md" in said
    assert "tunesmith train" in said


@pytest.mark.parametrize("options", [(), ("--dry-run",), ("--allow-change",)])
def test_training_a_recipe_with_a_search_is_refused(options: tuple[str, ...], good: Recipe, here: Path, tunesmith: Run):
    code, said = tunesmith("train", good | {"tune": of(RATE)}, *options)
    assert code == 2
    path = here / "bad.yaml"
    assert f"{path}:{line_of('tune:', path)}: " in said
    assert "this recipe has a tune section: run `tunesmith sweep`, or take it out" in said
    assert not (here / "runs").exists()


def test_a_mistake_on_the_command_line_is_named_as_such(good: Recipe, tunesmith: Run):
    code, said = tunesmith("sweep", good | {"tune": of(RATE)}, "--set", "tune.metric=los")
    assert code == 2
    assert "--set tune.metric=los: tune.metric: no trial reports 'los'" in said
    assert "Did you mean loss?" in said


def test_validate_accepts_a_good_search(good: Recipe, tunesmith: Run):
    code, said = tunesmith("validate", good | {"tune": of(RATE | RANK)})
    assert code == 0
    assert json.loads(said)["recipe"]["tune"]["space"]["adaptation.rank"]["choice"] == [4, 8]
