"""RayServices of serving configurations."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from tunesmith.cluster.errors import FleetError, ModelError, ResourceError, ServeConfigError, UsageError
from tunesmith.cluster.kube import check
from tunesmith.cluster.kube.commands import Wanted
from tunesmith.cluster.kube.pods import Placement
from tunesmith.serving import kube
from tunesmith.serving.config import Serve
from tunesmith.trainers.memory.weights import weights_gib

LLAMA: dict[str, Any] = {"path": "meta-llama/Llama-3.1-8B", "engine": "vllm", "gpus": 1}
PLACEMENT = Placement(image="tunesmith:0.1.0-gpu")


def made(tmp_path: Path, tree: dict[str, Any], placement: Placement = PLACEMENT, **wanted: Any) -> dict[str, Any]:
    path = tmp_path / "serve.yaml"
    path.write_text(yaml.safe_dump(tree))
    return kube.documents(Wanted(path, True, placement, **wanted), weights_gib)[0]


@pytest.mark.parametrize(
    ("tree", "placement"),
    [
        ({"bases": {"llama": LLAMA}}, PLACEMENT),
        ({"bases": {"llama": {**LLAMA, "autoscaling": {"max_replicas": 4}}}}, PLACEMENT),
        ({"bases": {"llama": LLAMA, "small_one": {"path": "HuggingFaceTB/SmolLM2-135M", "cpus": 2}}}, PLACEMENT),
        ({"bases": {"llama": {**LLAMA, "autoscaling": {"max_replicas": 2}}}}, Placement("tunesmith:1", queue="gpu")),
        ({"bases": {"large": {"path": "meta-llama/Llama-3.1-70B", "gpus": 2}}}, Placement("tunesmith:1", priority="high")),
    ],
    ids=["one base", "autoscaling", "two bases", "in a queue", "two GPUs a replica"],
)  # fmt: skip
def test_every_rendered_service_is_valid(tmp_path: Path, tree: dict[str, Any], placement: Placement) -> None:
    assert check.check_documents([("it", made(tmp_path, tree, placement))]) == []


def test_the_configuration_rides_in_the_service_and_is_one(tmp_path: Path) -> None:
    tree = {"bases": {"llama": LLAMA}, "registry": "registry", "agents": {"panel": {"layers": [[{"model": "llama"}]]}}}
    config = yaml.safe_load(made(tmp_path, tree)["spec"]["serveConfigV2"])
    application = config["applications"][0]
    served = Serve.model_validate(application["args"])
    assert served.registry == "/shared/registry"
    assert served.agents["panel"].layers[0][0].model == "llama"
    assert (served.http.port, config["http_options"]["port"]) == (8000, 8000)
    module, _, function = application["import_path"].partition(":")
    assert hasattr(__import__(module, fromlist=[function]), function)


def test_ray_serve_accepts_the_configuration(tmp_path: Path) -> None:
    from ray.serve.schema import ServeDeploySchema

    config = yaml.safe_load(made(tmp_path, {"bases": {"llama": LLAMA}})["spec"]["serveConfigV2"])
    assert ServeDeploySchema.model_validate(config).applications[0].name == "tunesmith"


def test_replicas_follow_the_load_between_their_bounds(tmp_path: Path) -> None:
    scaling = {"min_replicas": 2, "max_replicas": 5}
    spec = made(tmp_path, {"bases": {"llama": {**LLAMA, "autoscaling": scaling}}})["spec"]["rayClusterConfig"]
    group = spec["workerGroupSpecs"][0]
    assert (group["replicas"], group["minReplicas"], group["maxReplicas"]) == (2, 2, 5)
    assert spec["enableInTreeAutoscaling"] is True
    fixed = made(tmp_path, {"bases": {"llama": {**LLAMA, "replicas": 3}}})["spec"]["rayClusterConfig"]
    assert fixed["workerGroupSpecs"][0]["maxReplicas"] == 3
    assert "enableInTreeAutoscaling" not in fixed


def test_weights_that_no_gpu_holds_are_refused(tmp_path: Path) -> None:
    tree = {"bases": {"large": {"path": "meta-llama/Llama-3.1-70B", "gpus": 1}}}
    with pytest.raises(ResourceError, match=r"131\.4 GiB, and 1 GPU\(s\) of 79\.1"):
        made(tmp_path, tree, fleet="8xH100-80GB")
    tree["bases"]["large"]["gpus"] = 2
    assert made(tmp_path, tree, fleet="8xH100-80GB")["kind"] == "RayService"


def test_a_service_for_everybody_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ServeConfigError, match="lets everybody in"):
        made(tmp_path, {"bases": {"llama": LLAMA}, "http": {"auth": "none"}})


def test_a_base_of_unknown_size_has_to_be_said(tmp_path: Path) -> None:
    tree = {"bases": {"own": {"path": "/shared/models/own", "gpus": 1}}}
    with pytest.raises(ModelError, match=r"bases\.own\.path") as refused:
        made(tmp_path, tree)
    assert "--weights NAME=GIB" in refused.value.fix
    assert made(tmp_path, tree, weights={"own": 15.0})["kind"] == "RayService"


def test_a_folder_of_this_machine_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="only the claim at /shared"):
        made(tmp_path, {"bases": {"own": {"path": "/data/model"}}})


@pytest.mark.parametrize(
    ("tree", "wanted", "error", "words"),
    [
        (LLAMA, {"weights": {"lama": 16.0}}, UsageError, "--weights lama=16: {path} has no base lama Did you mean llama?"),
        (LLAMA, {"weights": {"qwen": 16.0}}, UsageError, "Its bases are llama."),
        ({**LLAMA, "gpus": 0}, {"fleet": "1xH100-80GB"}, FleetError, "no base of {path} has gpus"),
    ],
    ids=["a misspelt base", "no such base", "GPUs for nothing"],
)  # fmt: skip
def test_sizes_and_fleets_that_no_base_uses_are_refused(
    tmp_path: Path, tree: dict[str, Any], wanted: dict[str, Any], error: type[UsageError], words: str
) -> None:
    with pytest.raises(error) as refused:
        made(tmp_path, {"bases": {"llama": tree}}, **wanted)
    assert words.format(path=tmp_path / "serve.yaml") in f"{refused.value.what} {refused.value.fix}"
    assert refused.value.exit_code == 2


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("--topology", "example.org/rack"),
        ("--set", "train.epochs=1"),
        ("--deadline", "60"),
        ("--start-deadline", "60"),
        ("--retries", "3"),
        ("--storage-gb-s", "1"),
        ("--network-resource", "rdma/ib=8"),
    ],
)
def test_options_of_recipes_are_refused_even_with_their_defaults(tmp_path: Path, option: str, value: str) -> None:
    from tunesmith.cluster.main import app

    path = tmp_path / "serve.yaml"
    path.write_text(yaml.safe_dump({"bases": {"llama": LLAMA}}))
    with pytest.raises(UsageError, match=rf"^{option}: of no use to .*serve\.yaml, a serving configuration") as refused:
        app(["k8s", "render", str(path), option, value], standalone_mode=False)
    assert refused.value.exit_code == 2


def test_one_document_is_told_of_as_one(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from tunesmith.cluster.main import app

    path, out = tmp_path / "serve.yaml", tmp_path / "out"
    path.write_text(yaml.safe_dump({"bases": {"llama": LLAMA}}))
    app(["k8s", "render", str(path), "--fleet", "1xH100-80GB", "--out", str(out)], standalone_mode=False)
    app(["k8s", "validate", str(out / "rayservice.yaml")], standalone_mode=False)
    told = " ".join(capsys.readouterr().err.split())
    assert told.startswith("1 document in ")
    assert told.endswith(" 1 document is valid")
