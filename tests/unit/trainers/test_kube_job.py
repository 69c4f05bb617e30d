"""RayJobs of real recipes: sized by the planner, valid by every rule, refused where they cannot run."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from imports import REPOSITORY

from tunesmith.cluster.errors import FleetError, PlanError, RecipeError, ResourceError, UsageError
from tunesmith.cluster.kube import check, schemas
from tunesmith.cluster.kube.commands import Wanted
from tunesmith.cluster.kube.objects import quantity
from tunesmith.cluster.kube.pods import Placement
from tunesmith.trainers import kube

DEFINITIONS = REPOSITORY.parent / "shared" / "crds"
PLACEMENT = Placement(image="tunesmith:0.1.0-gpu")
QUEUED = Placement(
    "tunesmith:0.1.0-gpu", "team", "claim", "gpu", "high", "tokens", network={"rdma/ib": 8}, topology="example.org/rack"
)
SUPPORT = REPOSITORY / "examples" / "support"
SMOL = ["model.base=HuggingFaceTB/SmolLM2-360M"]
SHAPES: dict[str, tuple[str, list[str], str | None, Placement]] = {
    "one CPU worker": ("lora.yaml", [], None, PLACEMENT),
    "two CPU workers, ZeRO-2": ("full.yaml", [], None, PLACEMENT),
    "a sweep on CPUs": ("sweep.yaml", ["tune.concurrent=2"], None, PLACEMENT),
    "LoRA on one GPU": ("lora.yaml", SMOL, "1xL4", PLACEMENT),
    "QLoRA on two GPUs of a node": ("qlora.yaml", SMOL, "2xL40S", PLACEMENT),
    "every weight on 2x8": ("full.yaml", [*SMOL, "cluster.workers=16", "cluster.zero=3"], "2x8xH100-80GB", QUEUED),
    "a mixture of experts on 2x4": ("moe.yaml", ["cluster.workers=8"], "2x4xA100-40GB", QUEUED),
    "a sweep in a queue": ("sweep.yaml", SMOL, "4xL4", QUEUED),
    "one to eight CPU workers": ("full.yaml", ["cluster.workers={min: 1, max: 8}", "cluster.zero=3"], None, PLACEMENT),
    "offloaded to the host": (
        "full.yaml", [*SMOL, "cluster.workers=4", "cluster.zero=3", "cluster.offload=cpu"], "4xL4", PLACEMENT,
    ),
}  # fmt: skip


def rendered(shape: str) -> list[dict[str, Any]]:
    file, overrides, fleet, placement = SHAPES[shape]
    return kube.documents(Wanted(SUPPORT / file, False, placement, overrides, fleet))


def worker(documents: list[dict[str, Any]]) -> dict[str, Any]:
    return documents[1]["spec"]["rayClusterSpec"]["workerGroupSpecs"][0]


def limits(documents: list[dict[str, Any]]) -> dict[str, Any]:
    return worker(documents)["template"]["spec"]["containers"][0]["resources"]["limits"]


@pytest.mark.parametrize("shape", SHAPES)
def test_every_rendered_job_is_valid(shape: str) -> None:
    documents = rendered(shape)
    assert [document["kind"] for document in documents] == ["ConfigMap", "RayJob"]
    assert check.check_documents((shape, document) for document in documents) == []
    if DEFINITIONS.is_dir():  # the operators' own, beside this checkout
        extra = schemas.load_folder(DEFINITIONS)
        assert check.check_documents(((shape, document) for document in documents), extra) == []


def test_the_gang_is_whole_and_the_run_is_told_its_size() -> None:
    documents = rendered("every weight on 2x8")
    group, spec = worker(documents), documents[1]["spec"]
    assert (group["replicas"], group["minReplicas"], group["maxReplicas"]) == (2, 2, 2)
    assert limits(documents)["nvidia.com/gpu"] == 8
    assert limits(documents)["rdma/ib"] == 8
    command = json.loads(documents[0]["data"]["job.json"])["command"]
    assert command[:3] == ["tunesmith", "train", "/etc/tunesmith/recipe.yaml"]
    assert set(command[3::2]) == {"--set"}
    words = set(command[4::2])
    assert {"cluster.workers=16", "cluster.gpus_per_worker=1", "cluster.cpus_per_worker=8"} <= words
    assert spec["rayClusterSpec"]["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0"


def test_only_pods_with_gpus_tolerate_the_taint_of_gpu_nodes() -> None:
    spec = rendered("LoRA on one GPU")[1]["spec"]
    pods = {
        "submitter": spec["submitterPodTemplate"],
        "head": spec["rayClusterSpec"]["headGroupSpec"]["template"],
        "worker": spec["rayClusterSpec"]["workerGroupSpecs"][0]["template"],
    }
    assert {name: pod["spec"].get("tolerations") for name, pod in pods.items()} == {
        "submitter": None,
        "head": None,
        "worker": [{"key": "nvidia.com/gpu", "operator": "Exists", "effect": "NoSchedule"}],
    }


def test_a_sweep_has_the_whole_fleet_and_a_trial_its_own_workers() -> None:
    documents = rendered("a sweep in a queue")
    command = json.loads(documents[0]["data"]["job.json"])["command"]
    assert command[:2] == ["tunesmith", "sweep"]
    assert "cluster.workers=1" in command
    assert limits(documents)["nvidia.com/gpu"] == 4
    assert "lifecycle" not in worker(documents)["template"]["spec"]["containers"][0]


def test_the_recipe_is_mounted_as_it_was_written_and_a_changed_one_is_another() -> None:
    first = rendered("one CPU worker")[0]
    assert first["data"]["recipe.yaml"] == (SUPPORT / "lora.yaml").read_text()
    assert first["immutable"] is True
    other = rendered("two CPU workers, ZeRO-2")[0]
    assert first["metadata"]["name"].rpartition("-")[2] != other["metadata"]["name"].rpartition("-")[2]


def test_what_is_offloaded_is_host_memory() -> None:
    plain = Wanted(SUPPORT / "full.yaml", False, PLACEMENT, [*SMOL, "cluster.workers=4", "cluster.zero=3"], "4xL4")
    before = quantity(limits(kube.documents(plain))["memory"])
    after = quantity(limits(rendered("offloaded to the host"))["memory"])
    parameters = 361.8e6
    assert float(after - before) / 2**30 == pytest.approx(1.25 * 18 * parameters / 2**30, abs=1.1)


def test_the_pods_of_an_elastic_run_hold_what_the_fewest_workers_need() -> None:
    """Under ZeRO-3 one worker alone holds all that eight share."""

    def rendered_with(workers: str) -> list[dict[str, Any]]:
        overrides = [*SMOL, "cluster.zero=3", f"cluster.workers={workers}"]
        return kube.documents(Wanted(SUPPORT / "full.yaml", False, PLACEMENT, overrides))

    elastic, alone, eight = (rendered_with(workers) for workers in ("{min: 1, max: 8}", "1", "8"))
    assert worker(elastic)["replicas"] == 8
    assert quantity(limits(elastic)["memory"]) == quantity(limits(alone)["memory"]) > quantity(limits(eight)["memory"])
    deadlines = [documents[1]["spec"]["activeDeadlineSeconds"] for documents in (elastic, eight)]
    assert deadlines[0] > deadlines[1], "the fewest take longest"


def test_an_elastic_run_that_the_fewest_workers_cannot_hold_is_refused() -> None:
    overrides = ["model.base=HuggingFaceTB/SmolLM2-1.7B", "cluster.zero=3", "cluster.workers={min: 1, max: 8}"]
    with pytest.raises(ResourceError, match="with 1 of its workers: this recipe needs"):
        kube.documents(Wanted(SUPPORT / "full.yaml", False, PLACEMENT, overrides, "8xL4"))


def test_a_pod_has_time_to_save_and_a_retry_goes_on() -> None:
    spec = rendered("every weight on 2x8")[1]["spec"]
    pod = spec["rayClusterSpec"]["workerGroupSpecs"][0]["template"]["spec"]
    hook = pod["containers"][0]["lifecycle"]["preStop"]["exec"]["command"]
    assert hook[3:5] == ["save", "/shared/runs/support-full"]
    assert int(hook[-1]) < pod["terminationGracePeriodSeconds"]
    assert spec["backoffLimit"] == 3
    job = json.loads(rendered("every weight on 2x8")[0]["data"]["job.json"])
    assert (job["run"], job["directory"]) == ("/shared/runs/support-full", "/shared")
    assert job["within_s"] > pod["terminationGracePeriodSeconds"], "a retry waits longer than a save may take"


def test_a_larger_checkpoint_and_slower_storage_get_more_time() -> None:
    def grace(storage_gb_s: float) -> int:
        overrides = ["model.base=meta-llama/Llama-3.1-8B", "cluster.workers=8", "cluster.zero=3"]
        wanted = Wanted(SUPPORT / "full.yaml", False, PLACEMENT, overrides, "8xH100-80GB", storage_gb_s=storage_gb_s)
        return worker(kube.documents(wanted))["template"]["spec"]["terminationGracePeriodSeconds"]

    checkpoint = 8.03e9 * 14
    assert grace(0.1) - grace(0.2) == pytest.approx(checkpoint / 0.1e9 - checkpoint / 0.2e9, abs=2)


def test_what_does_not_fit_is_refused_with_what_would() -> None:
    wanted = Wanted(
        SUPPORT / "full.yaml",
        False,
        PLACEMENT,
        ["model.base=meta-llama/Llama-3.1-8B", "cluster.workers=1", "cluster.zero=0"],
        "1xL4",
    )
    with pytest.raises(ResourceError, match="GiB on each GPU") as refused:
        kube.documents(wanted)
    assert "These fit" in refused.value.fix


@pytest.mark.parametrize(
    ("overrides", "fleet", "error", "words"),
    [
        (["cluster.workers=3"], "2x8xH100-80GB", ResourceError, "2 × 8 = 16 GPUs"),
        (["cluster.gpus_per_worker=1"], None, UsageError, "--fleet 2x8xH100-80GB"),
        (["cluster.gpus_per_worker=0"], "1xL4", FleetError, "need no fleet"),
        (["data.train=/elsewhere/rows.jsonl"], None, UsageError, "only the claim at /shared"),
        (["output.dir=~/runs"], None, UsageError, "a folder of this machine"),
        (["cluster.memory_gib_per_worker=0.5"], None, ResourceError, "GiB on each worker"),
        (["train.epochs=0"], None, RecipeError, "train.epochs"),
    ],
)  # fmt: skip
def test_what_cannot_run_there_is_refused(
    overrides: list[str], fleet: str | None, error: type[Exception], words: str
) -> None:
    with pytest.raises(error) as refused:
        kube.documents(Wanted(SUPPORT / "full.yaml", False, PLACEMENT, overrides, fleet))
    assert words in str(refused.value)


def test_what_cannot_be_simulated_cannot_be_sized() -> None:
    with pytest.raises(PlanError, match="its pods cannot be sized") as refused:
        kube.documents(Wanted(SUPPORT / "moe.yaml", False, PLACEMENT))
    assert "--fleet" in refused.value.fix


@pytest.mark.parametrize(
    ("options", "rule"),
    [
        (["--image", "tunesmith:latest"], "security.image"),
        (["--image", "tunesmith"], "security.image"),
        (["--queue", "GPU queue"], "kueue.labels"),
        (["--namespace", "My_Team"], "core.name"),
        (["--set", "data.train=s3://bucket/rows?token=hf_" + "a" * 30], "security.plain-secret"),
    ],
)
def test_an_option_that_nobody_should_apply_is_refused(options: list[str], rule: str) -> None:
    from tunesmith.cluster.main import app

    with pytest.raises(check.InvalidManifestError, match=rf"\({re.escape(rule)}\)"):
        app(["k8s", "render", str(SUPPORT / "lora.yaml"), *options], standalone_mode=False)


def test_the_command_writes_a_folder_that_the_other_command_accepts(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from tunesmith.cluster.main import app

    folder = tmp_path / "out"
    app(["k8s", "render", str(SUPPORT / "lora.yaml"), "--out", str(folder), "--json"], standalone_mode=False)
    told = capsys.readouterr()
    said = json.loads(told.out)
    errors = " ".join(told.err.split())
    begins, copied = errors.index("sizing the pods of"), errors.index("copy to the claim tunesmith-shared first")
    assert begins < copied < errors.index("/shared/examples/support/tickets.jsonl")
    assert sorted(path.name for path in folder.iterdir()) == ["configmap.yaml", "kustomization.yaml", "rayjob.yaml"]
    assert said["files"] == [str(folder / name) for name in ("configmap.yaml", "rayjob.yaml", "kustomization.yaml")]
    assert yaml.safe_load((folder / "rayjob.yaml").read_text()) == said["documents"][1]
    files = [str(folder / name) for name in ("configmap.yaml", "rayjob.yaml")]
    app(["k8s", "validate", *files, "--json"], standalone_mode=False)
    assert json.loads(capsys.readouterr().out) == {"valid": True, "documents": 2, "left_out": [], "findings": []}


@pytest.mark.parametrize(
    ("option", "value", "needed"),
    [
        ("--network-resource", "rdma/ib=8", "--fleet"),
        ("--fleets", "fleets.yaml", "--fleet"),
        ("--topology", "example.org/rack", "--queue"),
    ],
)
def test_options_that_do_nothing_alone_are_refused(option: str, value: str, needed: str) -> None:
    from tunesmith.cluster.main import app

    with pytest.raises(UsageError, match=rf"^{option}: of no use without {needed}") as refused:
        app(["k8s", "render", str(SUPPORT / "lora.yaml"), option, value], standalone_mode=False)
    assert refused.value.exit_code == 2


@pytest.mark.parametrize(("option", "value"), [("--name", "bot"), ("--weights", "llama=16")])
def test_options_of_serving_configurations_are_refused(option: str, value: str) -> None:
    from tunesmith.cluster.main import app

    with pytest.raises(UsageError, match=rf"^{option}: of no use to .*lora\.yaml, a recipe") as refused:
        app(["k8s", "render", str(SUPPORT / "lora.yaml"), option, value], standalone_mode=False)
    assert refused.value.exit_code == 2
