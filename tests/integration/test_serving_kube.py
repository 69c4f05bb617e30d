"""What a RayService hands to Ray Serve starts the service: the rendered configuration, deployed as KubeRay deploys it."""

from __future__ import annotations

import copy
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import ray
import tiny_models
import yaml
from serving_service import free_port

from tunesmith.cluster.kube.commands import Wanted
from tunesmith.cluster.kube.pods import Placement
from tunesmith.cluster.session import RaySession
from tunesmith.serving import kube
from tunesmith.serving.service import DESK
from tunesmith.serving.statelog import StateLog
from tunesmith.serving.tenants import Keys


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What Serve's controller is given."""
    folder = tmp_path_factory.mktemp("kube")
    tree = {"bases": {"tiny": {"path": str(tiny_models.make("llama", folder / "tiny")), "engine": "transformers"}}}
    return deployed(folder / "serve.yaml", tree, folder)


@pytest.fixture(scope="module")
def address(ray_session: RaySession, config: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """URL and key of a service that Serve's controller was given as a configuration."""
    from ray import serve

    from tunesmith.serving.deployment import take_down

    ray_session.nodes()
    port = config["http_options"]["port"]
    serve.start(http_options=config["http_options"])
    deploy(config, wait=True)
    url = f"http://127.0.0.1:{port}"
    deadline = time.monotonic() + 60
    while httpx.get(f"{url}/readyz").status_code != 200:
        assert time.monotonic() < deadline, serve.status()
        time.sleep(0.2)
    yield (
        url,
        Keys(StateLog(registry_of(config), "keys")).create("acme", time.time(), scopes=("infer",), limits=None),
    )
    take_down(is_alone=True)  # the next service has a port of its own


def deploy(config: dict[str, Any], wait: bool) -> None:
    """As KubeRay does it."""
    from ray.serve.context import _get_global_client
    from ray.serve.schema import ServeDeploySchema

    client: Any = _get_global_client()
    client.deploy_apps(ServeDeploySchema.model_validate(config), _blocking=wait)


def registry_of(config: dict[str, Any]) -> str:
    return config["applications"][0]["args"]["registry"]


def deployed(written: Path, tree: dict[str, Any], folder: Path) -> dict[str, Any]:
    """The configuration in a rendered RayService, with this machine's folders and a port on the loopback interface."""
    served = {"bases": {"tiny": {**tree["bases"]["tiny"], "path": "/shared/tiny"}}}
    written.write_text(yaml.safe_dump(served))
    document = kube.documents(Wanted(written, True, Placement("tunesmith:1"), weights={"tiny": 0.1}), lambda *_: 0.1)[0]
    config = yaml.safe_load(document["spec"]["serveConfigV2"])
    config["http_options"] = http = {"host": "127.0.0.1", "port": free_port()}
    arguments = config["applications"][0]["args"]
    arguments |= {"http": http, "registry": str(folder / "registry")}
    arguments["bases"]["tiny"]["path"] = tree["bases"]["tiny"]["path"]
    return config


def test_the_application_of_a_rayservice_answers(address: tuple[str, str]) -> None:
    url, key = address
    headers = {"Authorization": f"Bearer {key}"}
    body = {"model": "tiny", "prompt": [5, 9, 30], "max_tokens": 4, "temperature": 0}
    deadline = time.monotonic() + 15  # until the desk has read the new key
    while (answer := httpx.post(f"{url}/v1/completions", json=body, headers=headers, timeout=30)).status_code == 401:
        assert time.monotonic() < deadline
        time.sleep(0.2)
    assert answer.status_code == 200, answer.text
    assert answer.json()["usage"]["completion_tokens"] == 4


def test_nobody_is_answered_without_a_key(address: tuple[str, str]) -> None:
    url, _ = address
    assert httpx.get(f"{url}/v1/models").status_code == 401
    assert httpx.get(f"{url}/healthz").status_code == 200


def test_a_changed_configuration_is_rolled_out_in_place_and_nobody_notices(
    address: tuple[str, str], config: dict[str, Any]
) -> None:
    url, key = address
    headers = {"Authorization": f"Bearer {key}"}
    body = {"model": "tiny", "prompt": [5, 9, 30], "max_tokens": 20, "ignore_eos": True}
    changed = copy.deepcopy(config)
    changed["applications"][0]["args"]["agents"] = {
        "panel": {"layers": [[{"model": "tiny"}]], "aggregator": {"model": "tiny"}}
    }
    answers: list[tuple[int, str]] = []
    known: list[int] = []
    """How many had been answered when the change was seen."""
    done = threading.Event()

    def keep_asking() -> None:
        with httpx.Client(base_url=url, headers=headers, timeout=60) as client:
            while not done.is_set():
                answer = client.post("/v1/completions", json=body)
                answers.append((answer.status_code, answer.text))

    before = actors(DESK)
    askers = [threading.Thread(target=keep_asking) for _ in range(4)]
    for one in askers:
        one.start()
    try:
        deploy(changed, wait=False)
        deadline = time.monotonic() + 90
        while "panel" not in (models := httpx.get(f"{url}/v1/models", headers=headers, timeout=30)).text:
            assert models.status_code == 200, models.text
            assert time.monotonic() < deadline, "the change never comes"
            time.sleep(0.1)
        known.append(len(answers))
        while len(answers) < known[0] + 20:
            assert time.monotonic() < deadline + 60, "nothing is answered any more"
            time.sleep(0.1)
    finally:
        done.set()
        for one in askers:
            one.join(60)
    assert known[0] > 0, "nobody asked while it came"
    assert [one for one in answers if one[0] != 200] == []
    assert len(actors(DESK) - before) == 1, "the new one has a desk of its own"


def actors(prefix: str) -> set[str]:
    """Names of the detached actors that live."""
    everywhere: Any = ray.util.list_named_actors(all_namespaces=True)
    names = (one["name"] for one in everywhere)
    return {name for name in names if name.startswith(prefix)}
