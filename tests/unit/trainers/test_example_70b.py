"""What lies in examples/llama-70b-full is what the commands make today, and it holds what it claims."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from types import ModuleType

import pytest
import yaml
from imports import REPOSITORY

from tunesmith.cluster.kube import check

EXAMPLE = REPOSITORY / "examples" / "llama-70b-full"
FLEETS = ("2x8-h100", "4x8-a100")


def maker() -> ModuleType:
    spec = importlib.util.spec_from_file_location("llama_70b_make", EXAMPLE / "make.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_plans_manifests_and_arithmetic_are_what_the_commands_make_today(tmp_path: Path) -> None:
    maker().make(tmp_path)
    made = sorted(path.relative_to(tmp_path) for path in tmp_path.rglob("*") if path.is_file())
    assert len(made) == 1 + 2 * 5
    for path in made:
        assert (EXAMPLE / path).read_text() == (tmp_path / path).read_text(), f"{path}: python {EXAMPLE.name}/make.py"


@pytest.mark.parametrize("name", FLEETS)
def test_it_fits_and_takes_the_whole_fleet(name: str) -> None:
    plan = json.loads((EXAMPLE / name / "plan.json").read_text())
    assert plan["fits"]
    assert plan["trainable"] == plan["parameters"] == 70_553_706_496
    assert plan["tokens_per_step"] == 262_144
    job = yaml.safe_load((EXAMPLE / name / "manifests" / "rayjob.yaml").read_text())
    group = job["spec"]["rayClusterSpec"]["workerGroupSpecs"][0]
    limits = group["template"]["spec"]["containers"][0]["resources"]["limits"]
    assert group["replicas"] * limits["nvidia.com/gpu"] == plan["gpus"]
    assert job["spec"]["activeDeadlineSeconds"] >= 3 * plan["step_seconds_high"] * plan["steps"]
    saving = plan["checkpoint_gib"] * 2**30 / group["replicas"] / 2e9
    assert group["template"]["spec"]["terminationGracePeriodSeconds"] > plan["step_seconds_high"] + saving


@pytest.mark.parametrize("name", FLEETS)
def test_the_manifests_are_valid(name: str) -> None:
    folder = EXAMPLE / name / "manifests"
    files = [folder / file for file in ("configmap.yaml", "rayjob.yaml")]
    assert check.check_documents(check.read(files)) == []
    recipe = yaml.safe_load(files[0].read_text())["data"]["recipe.yaml"]
    assert recipe == (EXAMPLE / f"{name}.yaml").read_text()


def test_the_first_rules_of_the_arithmetic_hold() -> None:
    for name, gpus, moments in (("2x8-h100", 16, 2.03125), ("4x8-a100", 32, 8)):
        parts = json.loads((EXAMPLE / name / "plan.json").read_text())["parts"]
        shard = 70_553_706_496 / gpus / 2**30
        assert parts["weights"] == pytest.approx(2 * shard, rel=0.002)  # small parameters stay whole
        assert parts["gradients"] == pytest.approx(4 * shard, rel=0.002)
        assert parts["optimizer state"] == pytest.approx((4 + moments) * shard, rel=0.002)
