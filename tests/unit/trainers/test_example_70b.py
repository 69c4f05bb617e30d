"""What lies in examples/llama-70b-full is what the commands make today, and it holds what it claims."""

from __future__ import annotations

import importlib.util
import json
import re
import shutil
from collections import defaultdict
from decimal import Decimal
from pathlib import Path
from types import ModuleType

import pytest
import yaml
from imports import REPOSITORY

from tunesmith.cluster.kube import check
from tunesmith.cluster.kube.objects import pods, quantity

EXAMPLE = REPOSITORY / "examples" / "llama-70b-full"
OVERLAY = REPOSITORY / "k8s" / "overlays" / "gpu-multi-node"
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


def page() -> str:
    return (EXAMPLE / "README.md").read_text()


def numbers(text: str) -> list[float]:
    return [float(found.replace(",", "")) for found in re.findall(r"\d[\d,]*(?:\.\d+)?", text)]


class Column:
    """One fleet's figures, by the beginning of their line."""

    def __init__(self, index: int) -> None:
        table = page().partition("<!-- made by make.py -->")[2].partition("<!-- end -->")[0]
        rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in table.split("\n") if line]
        self.rows = {row[0]: row[1 + index] for row in rows}

    def line(self, begin: str) -> tuple[str, str]:
        (found,) = [(label, cell) for label, cell in self.rows.items() if label.startswith(begin)]
        return found

    def __call__(self, begin: str) -> list[float]:
        return numbers(self.line(begin)[1])

    def shares(self, begin: str) -> list[float]:
        """The usual, the best and the worst share of a peak that a line's label states."""
        return [float(found) / 100 for found in re.findall(r"(\d+)%", self.line(begin)[0])]


def near(shown: list[float], reckoned: list[float], digits: int) -> None:
    """Equal to what is shown, as it is rounded there, with a little for what the page has rounded before."""
    for one, other in zip(shown, reckoned, strict=True):
        assert one == pytest.approx(other, abs=0.5 * 10**-digits + 0.003 * other), (shown, reckoned)


@pytest.mark.parametrize("index", [0, 1])
def test_memory_follows_from_what_the_page_states(index: int) -> None:
    of = Column(index)
    (parameters,) = numbers(of.line("weights:")[0].partition("P = ")[2])
    shard = parameters / of("tokens:")[3] / 2**30
    optimizer, moments = of("optimizer: P")
    near([*of("weights:"), *of("gradients:"), optimizer], [2 * shard, 4 * shard, (4 + moments) * shard], 2)
    names = ("weights:", "gradients:", "activations", "gathered", "buckets", "CUDA")
    near(of("in all, of")[:1], [optimizer + sum(of(name)[0] for name in names)], 1)


@pytest.mark.parametrize("index", [0, 1])
def test_the_step_follows_from_what_the_page_states(index: int) -> None:
    of = Column(index)
    (parameters,) = numbers(of.line("weights:")[0].partition("P = ")[2])
    rows, length, accumulation, workers, tokens = of("tokens:")
    assert tokens == rows * length * accumulation * workers
    operations, peak, rate = of("operations")[0] * 1e12, of("a GPU's peak")[0] * 1e12, of("a GPU's peak")[-1] * 1e9
    (sent,), (link,) = of("a GPU sends"), of("the link")
    near([sent], [accumulation * 3 * parameters * 2 * (workers - 1) / workers / 1e9], 0)
    full = {
        "compute:": operations * tokens / workers / peak,
        "memory:": accumulation * (10 + 8 / workers) * parameters / rate,
        "messages:": sent / link,
        "optimizer: 30": 30 * parameters / workers / rate,
    }
    times = [[seconds / share for share in of.shares(name)] for name, seconds in full.items()]
    for name, reckoned in zip(full, times, strict=True):
        near(of(name), reckoned, 2 if name.startswith("optimizer") else 1)
    usual, best, worst = ([piece[at] for piece in times] for at in range(3))
    near(of("the step:"), [max(usual[:3]) + usual[3], max(best[:3]) + best[3], sum(worst)], 1)
    near(of("tokens a second"), [tokens / (max(usual[:3]) + usual[3])], 0)
    near(of("busy"), [100 * usual[2] / (max(usual[:3]) + usual[3])], 0)


@pytest.mark.parametrize("index", [0, 1])
def test_storage_and_cost_follow_from_what_the_page_states(index: int) -> None:
    of = Column(index)
    (parameters,) = numbers(of.line("weights:")[0].partition("P = ")[2])
    nodes = int(FLEETS[index].partition("x")[0])
    recipe = yaml.safe_load((EXAMPLE / f"{FLEETS[index]}.yaml").read_text())["train"]
    moments, (speed,) = of("optimizer: P")[1], numbers(of.line("a node writes")[0])
    checkpoint, model = parameters * (6 + moments), parameters * 2
    near(of("P × (2 bytes"), [checkpoint / 2**30], 0)
    near(of("a node writes"), [checkpoint / nodes / 1e9, checkpoint / nodes / 1e9 / speed], 0)
    kept = recipe["save_total_limit"] + 2
    assert f"{kept} checkpoints" in of.line("the run:")[0]
    claim = [model, 2 * checkpoint + model, kept * checkpoint + model]
    near([*of("the model"), *of("the rehearsal"), *of("the run:")], [size / 2**30 for size in claim], 0)
    near(numbers(of.rows["in all"]), [sum(claim) / 2**30], 0)
    hours = [recipe["max_steps"] * seconds / 3600 for seconds in of("the step:")]
    saves = recipe["max_steps"] // recipe["save_steps"]
    saving = saves * checkpoint / nodes / 1e9 / speed / 3600
    near(of(f"{recipe['max_steps']:,} steps"), hours, 1)
    near(of(f"{saves} checkpoints"), [saving], 1)
    near(of("both"), [each + saving for each in hours], 1)
    gpus, (price,) = of("tokens:")[3], of("list price")
    near(of("GPU hours"), [(hours[0] + saving) * gpus], 0)
    near(of("at list price"), [(each + saving) * gpus * price for each in hours], 0)


def test_the_claim_is_as_large_as_the_table_says() -> None:
    needed = max(numbers(Column(index).rows["in all"])[0] for index in (0, 1)) * 2**30
    (asked,) = re.findall(r"hold across\s+them: (\d+) TiB", page())
    assert needed <= int(asked) * 2**40 < needed + 2**40
    (overlay,) = re.findall(r"storage, value: (\S+)\}", (OVERLAY / "kustomization.yaml").read_text())
    assert quantity(overlay) >= int(asked) * 2**40
    assert f"which asks for {overlay.removesuffix('Ti')} TiB" in page()


@pytest.mark.parametrize("name", FLEETS)
def test_the_queue_of_the_runbook_admits_the_job(name: str) -> None:
    """Head, workers and submitter together are within the quota, and no pod that always runs takes a GPU from them."""
    if not any(shutil.which(words[0]) for words in check.KUSTOMIZE):
        pytest.skip("neither kubectl nor kustomize is here to build the overlay")
    documents = [document for _, document in check.read([OVERLAY])]
    (queue,) = (document["spec"] for document in documents if document["kind"] == "ClusterQueue")
    quotas = {
        one["name"]: quantity(one["nominalQuota"]) for one in queue["resourceGroups"][0]["flavors"][0]["resources"]
    }
    spec = yaml.safe_load((EXAMPLE / name / "manifests" / "rayjob.yaml").read_text())["spec"]
    cluster = spec["rayClusterSpec"]
    templates = [(1, spec["submitterPodTemplate"]), (1, cluster["headGroupSpec"]["template"])]
    templates += [(group["replicas"], group["template"]) for group in cluster["workerGroupSpecs"]]
    needed: defaultdict[str, Decimal] = defaultdict(Decimal)
    for count, template in templates:
        for box in template["spec"]["containers"]:
            for kind, amount in box["resources"]["requests"].items():
                needed[kind] += count * quantity(amount)
    assert {kind: amount for kind, amount in needed.items() if amount > quotas[kind]} == {}
    assert "RayService" not in {document["kind"] for document in documents}
    (desk,) = (document["spec"] for document in documents if document["kind"] == "RayCluster")
    for group in desk["workerGroupSpecs"]:
        asks = group["template"]["spec"]["containers"][0]["resources"]["limits"]
        assert group["minReplicas"] == 0 or "nvidia.com/gpu" not in asks


def test_the_runbook_names_one_image_throughout(tmp_path: Path) -> None:
    commands = re.findall(r"(?:tunesmith k8s render|docker build)(?:.*\\\n)*.*", page())
    assert len(commands) == 2
    assert all('"$IMAGE"' in command for command in commands)
    if not any(shutil.which(words[0]) for words in check.KUSTOMIZE):
        pytest.skip("neither kubectl nor kustomize is here to build what is applied")
    for name in FLEETS:
        folder = tmp_path / name
        shutil.copytree(EXAMPLE / name / "manifests", folder)
        listing = yaml.safe_load((folder / "kustomization.yaml").read_text())
        listing["images"] = [{"name": "tunesmith", "newName": "registry.example.org/tunesmith", "newTag": "0.1.0-gpu"}]
        (folder / "kustomization.yaml").write_text(yaml.safe_dump(listing))
        boxes = [box for _, document in check.read([folder]) for pod in pods(document) for _, box in pod.containers]
        assert [box["image"] for box in boxes] == ["registry.example.org/tunesmith:0.1.0-gpu"] * 3


def test_the_runbook_stops_a_queued_job_by_its_workload() -> None:
    for name in FLEETS:
        job = yaml.safe_load((EXAMPLE / name / "manifests" / "rayjob.yaml").read_text())
        assert "kueue.x-k8s.io/queue-name" in job["metadata"]["labels"]
    assert re.findall(r"-p '(.*)'", page()) == ['{"spec":{"active":false}}']
    assert "workloads -l kueue.x-k8s.io/job-uid=" in page()
