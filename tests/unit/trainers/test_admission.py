"""The launcher refuses and chooses by the planner's own answer."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tunesmith.cluster import errors
from tunesmith.cluster.errors import FleetError, ResourceError
from tunesmith.cluster.events import Note, Warned
from tunesmith.cluster.fleet import parse_fleet
from tunesmith.cluster.identity import Identity
from tunesmith.cluster.recipe.load import resolved
from tunesmith.cluster.recipe.schema import Recipe
from tunesmith.cluster.resources import Need, Node
from tunesmith.trainers import launch
from tunesmith.trainers.admission import admit, fleet_of
from tunesmith.trainers.memory import plan as planning
from tunesmith.trainers.memory.geometry import geometry
from tunesmith.trainers.models import resolve_base

ROOMY = Node(cpus=4, memory_gib=64)
NEED = Need(workers=2, cpus=2)


@pytest.fixture
def written(tmp_path: Path, tiny_base: Path) -> dict[str, Any]:
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps({"text": "one two three " * 4}) + "\n" for _ in range(40)))
    return {
        "name": "admitted",
        "model": {"base": str(tiny_base)},
        "data": {"train": str(rows), "max_length": 64},
        "objective": "cpt",
        "adaptation": "full",
        "train": {"max_steps": 2},
        "cluster": {"workers": 2, "cpus_per_worker": 0.5},
        "output": {"dir": str(tmp_path / "runs"), "report_to": []},
    }


def ask(written: dict[str, Any], folder: Path, node: Node = ROOMY, begun: Path = Path("none")) -> tuple[Any, ...]:
    recipe, said = Recipe.model_validate(written), []
    base = resolve_base(recipe.model.base, None, folder)
    concrete, plan = admit(recipe, base, [node], NEED, recipe.data.max_length, begun, said.append)
    return concrete, plan, said


def test_the_command_and_the_launcher_give_one_answer(written: dict[str, Any]) -> None:
    asked = launch.plan(Recipe.model_validate(written))["plan"]
    recipe = Recipe.model_validate(written)
    model = geometry(recipe.model.base, recipe.output.dir)
    answer = planning.make_plan(recipe, model, parse_fleet("this machine", workers=2)).as_json()
    same = ("allocated_gib", "overhead_gib", "total_gib", "parts", "gpus", "chosen", "fits", "parameters", "trainable")
    assert {key: asked[key] for key in same} == {key: answer[key] for key in same}


def test_what_cannot_fit_is_refused_before_anything_is_started(written: dict[str, Any], tmp_path: Path) -> None:
    written["train"]["per_device_train_batch_size"] = 4096
    with pytest.raises(ResourceError, match=r"needs .* GiB on each worker and this machine has 1\.0") as refused:
        ask(written, tmp_path, replace(ROOMY, memory_gib=2))
    assert "train.per_device_train_batch_size: " in refused.value.fix
    assert not (tmp_path / "runs" / "admitted").exists()


def test_auto_is_settled_said_and_stays_when_the_run_goes_on(written: dict[str, Any], tmp_path: Path) -> None:
    written["train"]["per_device_train_batch_size"] = "auto"
    concrete, plan, said = ask(written, tmp_path)
    assert concrete.train.rows > 1
    assert plan["chosen"]["train.per_device_train_batch_size"] == concrete.train.rows
    assert [event.text for event in said if isinstance(event, Note)] == [
        f"chosen: train.per_device_train_batch_size: {concrete.train.rows}"
    ]
    other = {**resolved(concrete), "train": {**resolved(concrete)["train"], "per_device_train_batch_size": 2}}
    Identity(recipe=other).save(tmp_path / "run.json")
    again, _, said = ask(written, tmp_path, begun=tmp_path / "run.json")
    assert again.train.rows == 2
    assert said == []


def test_keys_count_as_read_as_they_did_before(written: dict[str, Any], tmp_path: Path) -> None:
    recipe = Recipe.model_validate(written)
    recipe.forget_reads()
    assert recipe.data.max_length == 64
    base = resolve_base(written["model"]["base"], None, tmp_path)
    concrete, _ = admit(recipe, base, [ROOMY], NEED, 64, Path("none"), lambda _event: None)
    assert "data.max_length" in concrete.read_keys()
    assert "train.max_steps" in concrete.unread_keys()


def test_a_model_that_cannot_be_simulated_trains_with_a_warning(
    written: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def cannot(*_: Any, **__: Any) -> None:
        raise errors.PlanError("its code asks for numbers")

    monkeypatch.setattr(planning, "make_plan", cannot)
    written["train"]["per_device_train_batch_size"] = "auto"
    concrete, plan, said = ask(written, tmp_path)
    assert plan is None
    assert concrete.train.rows == 1
    assert [event.text for event in said if isinstance(event, Warned)] == [
        "whether it fits was not checked: its code asks for numbers"
    ]


def test_the_workers_of_a_cluster_are_a_fleet_of_its_gpus() -> None:
    nodes = [Node(cpus=64, gpus=8, gpu_kind="H100", name=f"node {number}") for number in range(2)]
    fleet = fleet_of(nodes, Need(workers=16, cpus=4, gpus=1))
    assert (fleet.gpu.name, fleet.nodes, fleet.gpus_per_node) == ("H100-80GB", 2, 8)
    mixed = [nodes[0], replace(nodes[1], gpu_kind="A100")]
    with pytest.raises(FleetError, match="GPUs of 2 kinds: A100, H100"):
        fleet_of(mixed, Need(workers=16, cpus=4, gpus=1))
    assert fleet_of([ROOMY], NEED).gpu.memory_gib == 32
    head = Node(cpus=0, memory_gib=1)
    assert fleet_of([head, ROOMY], NEED) == fleet_of([ROOMY], NEED), "a head that offers nothing is no worker's machine"
    with pytest.raises(FleetError, match="room for a worker"):
        fleet_of([head], NEED)


def test_an_elastic_run_must_fit_with_its_fewest_and_with_its_most_workers(
    written: dict[str, Any], tmp_path: Path
) -> None:
    written["cluster"] |= {"zero": 3, "zero3_persistence_threshold": 0}
    alone, together = (ask_for(written | with_workers(written, n), n, tmp_path) for n in (1, 2))
    assert alone["allocated_gib"] > together["allocated_gib"]
    assert ask_for(written | with_workers(written, {"min": 1, "max": 2}), 2, tmp_path)["fits"]
    between = Node(cpus=4, memory_gib=(alone["total_gib"] + together["total_gib"]) / 2)
    assert ask_for(written | with_workers(written, 2), 2, tmp_path, between)["fits"]
    with pytest.raises(ResourceError, match="with 1 worker: this recipe needs"):
        ask_for(written | with_workers(written, {"min": 1, "max": 2}), 2, tmp_path, between)


def with_workers(written: dict[str, Any], workers: Any) -> dict[str, Any]:
    return {"cluster": written["cluster"] | {"workers": workers}}


def ask_for(written: dict[str, Any], workers: int, folder: Path, node: Node = ROOMY) -> dict[str, Any]:
    """The plan of a model of some size on two such machines."""
    recipe = Recipe.model_validate(written)
    base, need = resolve_base(recipe.model.base, None, folder), replace(NEED, workers=workers)
    shape = json.loads((Path(base.path) / "config.json").read_text())
    larger = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 6, "head_dim": 64}
    heads = {"num_attention_heads": 16, "num_key_value_heads": 16}
    (folder / "config.json").write_text(json.dumps(shape | larger | heads))
    base = replace(base, path=str(folder))
    plan = admit(recipe, base, [node, node], need, recipe.data.max_length, Path("none"), lambda _: None)[1]
    assert plan is not None
    return plan
