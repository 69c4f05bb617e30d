"""What lies in k8s/: every manifest and every overlay is valid, services are what `render` makes, and the network is shut."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml
from imports import REPOSITORY

from tunesmith.cluster.kube import check, output, schemas
from tunesmith.cluster.kube.commands import Wanted
from tunesmith.cluster.kube.objects import pods
from tunesmith.cluster.kube.pods import USER, Placement
from tunesmith.serving import kube
from tunesmith.trainers.memory.weights import weights_gib

FOLDER = REPOSITORY / "k8s"
OVERLAYS = sorted(path.parent for path in FOLDER.glob("overlays/*/kustomization.yaml"))
PATCHES = ("desk-gpus.yaml", "serve.yaml", "kustomization.yaml")
FILES = sorted(path for path in FOLDER.rglob("*.yaml") if path.name not in PATCHES)
DEFINITIONS = REPOSITORY.parent / "shared" / "crds"


def name_of(path: Path) -> str:
    return str(path.relative_to(FOLDER))


def built(overlay: Path) -> list[tuple[str, Any]]:
    if not any(shutil.which(words[0]) for words in check.KUSTOMIZE):
        pytest.skip("neither kubectl nor kustomize is here to build the overlay")
    return check.read([overlay])


def of_kind(documents: list[tuple[str, Any]], kind: str) -> list[Any]:
    return [document for _, document in documents if document["kind"] == kind]


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_every_file_is_valid(path: Path) -> None:
    assert check.check_documents(check.read([path])) == []


@pytest.mark.parametrize("overlay", OVERLAYS, ids=name_of)
def test_every_overlay_is_valid(overlay: Path) -> None:
    documents = built(overlay)
    assert check.check_documents(documents) == []
    if DEFINITIONS.is_dir():  # the operators' own, beside this checkout
        assert check.check_documents(documents, schemas.load_folder(DEFINITIONS)) == []


@pytest.mark.parametrize("overlay", OVERLAYS, ids=name_of)
def test_every_overlay_is_whole(overlay: Path) -> None:
    documents = built(overlay)
    assert {"Namespace", "NetworkPolicy", "ResourceQuota", "PersistentVolumeClaim"} <= {d["kind"] for _, d in documents}
    assert [cluster["metadata"]["name"] for cluster in of_kind(documents, "RayCluster")] == ["desk"]
    strategies = [service["spec"]["upgradeStrategy"]["type"] for service in of_kind(documents, "RayService")]
    assert strategies == ([] if overlay.name == "gpu-multi-node" else ["NewCluster"])
    claims = {claim["metadata"]["name"] for claim in of_kind(documents, "PersistentVolumeClaim")}
    for _, document in documents:
        for pod in pods(document):
            assert pod.spec["securityContext"]["runAsUser"] == USER
            used = {
                volume["persistentVolumeClaim"]["claimName"]
                for volume in pod.spec["volumes"]
                if "persistentVolumeClaim" in volume
            }
            assert used <= claims


def test_overlays_with_gpus_have_queues_scaling_groups_and_monitors() -> None:
    for overlay in OVERLAYS:
        if "gpu" not in overlay.name:
            continue
        documents = built(overlay)
        queue = of_kind(documents, "ClusterQueue")[0]["spec"]
        flavors = {flavor["metadata"]["name"] for flavor in of_kind(documents, "ResourceFlavor")}
        assert {flavor["name"] for group in queue["resourceGroups"] for flavor in group["flavors"]} <= flavors
        assert (
            of_kind(documents, "LocalQueue")[0]["spec"]["clusterQueue"]
            == of_kind(documents, "ClusterQueue")[0]["metadata"]["name"]
        )
        desk = of_kind(documents, "RayCluster")[0]["spec"]
        group = desk["workerGroupSpecs"][-1]
        limits = group["template"]["spec"]["containers"][0]["resources"]["limits"]
        assert desk["enableInTreeAutoscaling"]
        assert group["minReplicas"] == 0 < group["maxReplicas"]
        assert limits["nvidia.com/gpu"] in (1, 8)
        covered = {name for resources in queue["resourceGroups"] for name in resources["coveredResources"]}
        assert limits.keys() <= covered
        assert len(of_kind(documents, "PodMonitor")) == 2
        assert "tunesmith-serving.json" in of_kind(documents, "ConfigMap")[0]["data"]


@pytest.mark.parametrize(("name", "held", "gpus"), [("gpu-single-node", 1, 8), ("gpu-multi-node", 0, 32)])
def test_the_queue_grants_no_gpu_that_others_have(name: str, held: int, gpus: int) -> None:
    """What runs outside the queue is counted by its topology; what always runs there is not in its quota."""
    documents = built(FOLDER / "overlays" / name)
    (queue,), (flavor,) = of_kind(documents, "ClusterQueue"), of_kind(documents, "ResourceFlavor")
    assert flavor["spec"]["topologyName"] in [it["metadata"]["name"] for it in of_kind(documents, "Topology")]
    groups = [
        group
        for document in (*of_kind(documents, "RayCluster"), *of_kind(documents, "RayService"))
        for group in (document["spec"].get("rayClusterConfig") or document["spec"])["workerGroupSpecs"]
    ]
    always = sum(
        group["minReplicas"] * box["resources"]["limits"].get("nvidia.com/gpu", 0)
        for group in groups
        for box in group["template"]["spec"]["containers"]
    )
    (resources,) = (given["resources"] for given in queue["spec"]["resourceGroups"][0]["flavors"])
    (quota,) = (one["nominalQuota"] for one in resources if one["name"] == "nvidia.com/gpu")
    assert (always, quota + always) == (held, gpus)


@pytest.mark.parametrize(("device", "fleet", "secret"), [("cpu", None, None), ("gpu", "1xL40S", "tunesmith")])
def test_the_services_are_what_render_makes_today(device: str, fleet: str | None, secret: str | None) -> None:
    folder = FOLDER / "serving" / device
    placement = Placement(image=f"tunesmith:0.1.0-{device}", secret=secret)
    wanted = Wanted(folder / "serve.yaml", True, placement, fleet=fleet, name="serving")
    made = output.as_yaml(kube.documents(wanted, weights_gib))
    assert (folder / "rayservice.yaml").read_text() == made, f"tunesmith k8s render k8s/serving/{device}/serve.yaml …"


RAY = {"ray.io/is-ray-node": "yes", "app.kubernetes.io/name": "tunesmith"}
HEAD = {**RAY, "ray.io/node-type": "head", "app.kubernetes.io/component": "head"}
WORKER = {**RAY, "ray.io/node-type": "worker", "app.kubernetes.io/component": "worker"}
ENGINE = {**WORKER, "app.kubernetes.io/component": "engine"}
SUBMITTER = {"app.kubernetes.io/name": "tunesmith", "app.kubernetes.io/component": "submitter"}
OPERATOR = {"app.kubernetes.io/name": "kuberay-operator"}
DNS = {"k8s-app": "kube-dns"}
STRANGER = {"app": "stranger"}
OURS, SYSTEM, KUBERAY, MONITORING = (
    {"kubernetes.io/metadata.name": name} for name in ("tunesmith", "kube-system", "kuberay-system", "monitoring")
)
GATEWAY, ELSEWHERE = (
    {"kubernetes.io/metadata.name": "web", "tunesmith.dev/gateway": "true"},
    {"kubernetes.io/metadata.name": "a"},
)

FLOWS = [
    # from namespace and pod, to namespace and pod, port, whether it may
    (OURS, WORKER, OURS, HEAD, 6379, True),
    (OURS, HEAD, OURS, WORKER, 10002, True),
    (OURS, WORKER, OURS, WORKER, 29500, True),
    (OURS, SUBMITTER, OURS, HEAD, 8265, True),
    (OURS, SUBMITTER, OURS, HEAD, 6379, False),
    (OURS, SUBMITTER, OURS, WORKER, 8265, False),
    (OURS, SUBMITTER, SYSTEM, DNS, 53, True),
    (OURS, WORKER, SYSTEM, DNS, 53, True),
    (OURS, WORKER, SYSTEM, DNS, 443, False),
    (OURS, WORKER, ELSEWHERE, STRANGER, 443, False),
    (OURS, HEAD, ELSEWHERE, STRANGER, 443, True),  # the API server has no labels to choose it by
    (OURS, STRANGER, OURS, HEAD, 8265, False),
    (KUBERAY, OPERATOR, OURS, HEAD, 8265, True),
    (KUBERAY, STRANGER, OURS, HEAD, 8265, False),
    (GATEWAY, STRANGER, OURS, ENGINE, 8000, True),
    (GATEWAY, STRANGER, OURS, HEAD, 8265, False),
    (GATEWAY, STRANGER, OURS, WORKER, 8000, False),
    (ELSEWHERE, STRANGER, OURS, ENGINE, 8000, False),
    (MONITORING, STRANGER, OURS, WORKER, 8080, True),
    (MONITORING, STRANGER, OURS, HEAD, 8265, False),
]  # fmt: skip


@pytest.mark.parametrize(("source", "client", "target", "server", "port", "may"), FLOWS)
def test_the_network_lets_through_what_is_needed_and_nothing_else(
    source: dict[str, str], client: dict[str, str], target: dict[str, str], server: dict[str, str], port: int, may: bool
) -> None:
    policies = [d for _, d in check.read([*sorted((FOLDER / "base").glob("network-*.yaml"))])]
    out = source is not OURS or passes(policies, "egress", client, (target, server), port)
    into = target is not OURS or passes(policies, "ingress", server, (source, client), port)
    assert (out and into) is may


def passes(
    policies: list[Any], way: str, pod: dict[str, str], peer: tuple[dict[str, str], dict[str, str]], port: int
) -> bool:
    """Whether a pod of our namespace may speak with a peer, by Kubernetes' rules: what any policy allows is allowed."""
    about = [
        p["spec"]
        for p in policies
        if way.capitalize() in p["spec"]["policyTypes"] and chosen(p["spec"]["podSelector"], pod)
    ]
    assert about, "a policy that denies everything concerns every pod"
    key = {"ingress": "from", "egress": "to"}[way]
    return any(
        (key not in rule or any(matches(one, *peer) for one in rule[key]))
        and ("ports" not in rule or any(one["port"] == port for one in rule["ports"]))
        for spec in about
        for rule in spec.get(way, [])
    )


def matches(peer: dict[str, Any], namespace: dict[str, str], pod: dict[str, str]) -> bool:
    if "ipBlock" in peer:
        return False
    there = chosen(peer["namespaceSelector"], namespace) if "namespaceSelector" in peer else namespace is OURS
    return there and chosen(peer.get("podSelector", {}), pod)


def chosen(selector: dict[str, Any], labels: dict[str, str]) -> bool:
    assert selector.keys() <= {"matchLabels"}, "these policies select by labels alone"
    return selector.get("matchLabels", {}).items() <= labels.items()


def test_a_kustomization_that_cannot_be_built_is_said_to_be(tmp_path: Path) -> None:
    (tmp_path / "kustomization.yaml").write_text(yaml.safe_dump({"resources": ["nothing.yaml"]}))
    if not any(shutil.which(words[0]) for words in check.KUSTOMIZE):
        pytest.skip("neither kubectl nor kustomize is here")
    with pytest.raises(check.UsageError, match=r"nothing\.yaml"):
        check.read([tmp_path])


def test_folders_without_a_kustomization_are_the_kustomizations_in_them() -> None:
    if not any(shutil.which(words[0]) for words in check.KUSTOMIZE):
        pytest.skip("neither kubectl nor kustomize is here")
    example = REPOSITORY / "examples" / "llama-70b-full"
    sources, others = check.sources([FOLDER, example])
    kustomizations = [*FOLDER.rglob("kustomization.yaml"), *example.rglob("kustomization.yaml")]
    assert {source[0][0] for source in sources} == {str(path.parent) for path in kustomizations}
    assert {Path(name).name for name in others} == {"2x8-h100.yaml", "4x8-a100.yaml", "plan.json"}
    assert [finding for source in sources for finding in check.check_documents(source)] == []
