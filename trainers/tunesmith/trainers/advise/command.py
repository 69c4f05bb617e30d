"""`tunesmith advise`: reads a draft, measures, decides, and writes a recipe that validates."""

from __future__ import annotations

import difflib
import json
import re
import textwrap
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast, get_args

import yaml

from tunesmith.cluster.errors import OutputError, RecipeError, UsageError
from tunesmith.cluster.fleet import Fleet, parse_fleet
from tunesmith.cluster.fleet_file import load_fleets
from tunesmith.cluster.recipe.lines import read_yaml
from tunesmith.cluster.recipe.load import load_recipe
from tunesmith.cluster.recipe.schema import Recipe
from tunesmith.cluster.storage import write_atomic
from tunesmith.trainers.advise.bases import Base, find_base, size_of
from tunesmith.trainers.advise.counts import Counts, count, has_documents
from tunesmith.trainers.advise.room import Room, changes
from tunesmith.trainers.advise.rules import Advice, Facts, Goal, recommend
from tunesmith.trainers.memory.choose import changed
from tunesmith.trainers.memory.predict import Planner

GOALS: tuple[Goal, ...] = get_args(Goal)


@dataclass(frozen=True)
class Request:
    """What the user typed."""

    what: list[str]
    """Data files, or one recipe."""
    model: str | None = None
    goal: str | None = None
    fleet: str | None = None
    fleets: Path | None = None
    tasks: int = 1
    out: Path | None = None


@dataclass(frozen=True)
class Report:
    """What was found and decided."""

    base: Base
    fleet: Fleet
    counts: Counts
    facts: Facts
    loss: Any
    """`closeness.Loss`, or why there is none."""
    advice: Advice
    goal_given: bool
    recipe: dict[str, Any]
    path: Path

    def as_json(self) -> dict[str, Any]:
        """One object for scripts."""
        measured = not isinstance(self.loss, str)
        return {
            "recipe": str(self.path),
            "written": self.recipe,
            "advice": asdict(self.advice),
            "facts": asdict(self.facts) | {"closeness": self.facts.closeness},
            "loss": asdict(self.loss) if measured else None,
            "loss_missing_because": None if measured else self.loss,
            "base": {"reference": self.base.reference, "known_from": self.base.known_from},
            "fleet": self.fleet.name,
        }


def run(request: Request) -> Report:
    """Advises, and writes the recipe.

    Raises:
        UsageError: the data, the model, the goal, the fleet or the draft is wrong, nothing fits, or the recipe's file exists.
    """
    _require_a_goal(request.goal)
    draft, has_objective = _draft(request)
    path = request.out or Path(f"{draft.name}-advised.yaml")
    if path.exists():
        raise OutputError(f"{path} is already there", "Name another file with --out, or delete it.")
    fleet = parse_fleet(request.fleet or "this machine", load_fleets(request.fleets), draft.cluster.most_workers)
    output = Path(draft.output.dir).expanduser().absolute()
    documents = has_documents(draft)
    objective = draft.objective.kind if has_objective else "cpt" if documents else "sft"
    draft = draft.model_copy(update={"objective": draft.objective.model_copy(update={"kind": objective})})
    base = find_base(draft.model, output)
    counts = count(draft, base.tokenizer, output / ".cache" / "data")
    size = size_of(base)
    loss = _loss(base, size.parameters, counts)
    facts = Facts(
        objective=objective,
        goal=cast(Goal, request.goal or ("knowledge" if documents else "ability")),
        tasks=request.tasks,
        rows=counts.rows,
        trained_tokens=counts.trained_tokens,
        bits_per_byte=None if isinstance(loss, str) else loss.bits_per_byte,
        size=size,
        gpus=fleet.gpus,
        gpu_gib=fleet.gpu.memory_gib,
        gpu=fleet.gpu.name,
    )
    advice = recommend(facts, Room(Planner(base.shape, fleet, max_length=counts.max_length), draft).layouts)
    recipe = advised(draft, advice, base.reference, fleet.gpus)
    _write(path, recipe, advice)
    return Report(base, fleet, counts, facts, loss, advice, request.goal is not None, recipe, path)


def advised(draft: Recipe, advice: Advice, base: str, workers: int) -> dict[str, Any]:
    """The draft as the user wrote it, with what was advised in its place."""
    layout, rank = advice.layout, advice.rank or 0
    changed_keys = changes(draft, layout.way, rank, layout.zero, layout.checkpointing)
    changed_keys |= {"model.base": base, "train.learning_rate": advice.learning_rate}
    if draft.train.epochs is None and draft.train.max_steps is None:
        changed_keys["train.epochs"] = advice.epochs
    if workers > 1:
        changed_keys["cluster.workers"] = workers
    elif draft.cluster.zero == "auto":
        del changed_keys["cluster.zero"]
    if not layout.checkpointing:
        del changed_keys["train.gradient_checkpointing"]
    recipe = changed(draft, changed_keys).model_dump(mode="json", exclude_unset=True)
    if recipe["model"]["quantization"] is None:
        del recipe["model"]["quantization"]
    first = {key: recipe[key] for key in ("name", "model", "data", "objective", "adaptation")}
    return first | recipe


def _require_a_goal(goal: str | None) -> None:
    if goal is not None and goal not in GOALS:
        near = difflib.get_close_matches(goal, GOALS, 1)
        hint = f"Did you mean {near[0]}? " if near else ""
        raise UsageError(f"--goal {goal}: no such goal", f"{hint}The goals are {', '.join(GOALS)}.")


def _draft(request: Request) -> tuple[Recipe, bool]:
    """The draft with placeholders for what the advice fills in, and whether it names an objective itself."""
    if [Path(item).suffix for item in request.what] in ([".yaml"], [".yml"]):
        path = Path(request.what[0])
        tree, _ = read_yaml(path, RecipeError, "recipe", "model and data")
        missing = [f"{key}={json.dumps(value)}" for key, value in _placeholders(path).items() if key not in tree]
        model = [] if request.model is None else [f"model.base={json.dumps(request.model)}"]
        return load_recipe(path, missing + model), "objective" in tree
    if mixed := [item for item in request.what if Path(item).suffix in (".yaml", ".yml")]:
        raise UsageError(
            f"{mixed[0]} is a recipe among {len(request.what)} inputs", "Give data files, or one recipe alone."
        )
    if not request.model:
        raise UsageError(
            "advise needs to know the base model", "Name it with --model: a folder, a hub id, run:NAME or builtin:NAME."
        )
    data = request.what[0] if len(request.what) == 1 else list(request.what)
    tree = {"model": {"base": request.model}, "data": {"train": data}}
    return Recipe.model_validate(_placeholders(Path(request.what[0])) | tree), False


def _placeholders(path: Path) -> dict[str, str]:
    """What a draft may leave out. The run is named after the file."""
    name = re.sub(r"[^a-z0-9._-]+", "-", path.name.partition(".")[0].lower()).strip("-._")[:63].rstrip("-._")
    return {"name": name or "advised", "objective": "sft", "adaptation": "lora"}


def _loss(base: Base, parameters: int, counts: Counts) -> Any:
    if base.weights is None:
        return "the base's weights are not on this machine"
    assert counts.store is not None, "who has the weights has the tokenizer"
    from tunesmith.trainers.advise.closeness import measure

    return measure(base.weights, parameters, counts.store)


def _write(path: Path, recipe: dict[str, Any], advice: Advice) -> None:
    reasons = [f"# {line}" for reason in advice.reasons for line in textwrap.wrap(reason, 110)]
    head = "\n".join([f"# Advised by the rule: {advice.rule}.", *reasons])
    write_atomic(path, f"{head}\n{yaml.safe_dump(recipe, sort_keys=False, allow_unicode=True)}")
    load_recipe(path)
