"""What `tunesmith serve` says of a configuration that cannot be served: the line, the key and what was meant."""

from __future__ import annotations

import signal
import threading
from pathlib import Path

import pytest
import tiny_adapters
from serving_service import free_port

from tunesmith.cluster.errors import ModelError, ResourceError, ServeConfigError
from tunesmith.cluster.resources import Node
from tunesmith.serving.bases import base_of
from tunesmith.serving.config import Serve, load_config
from tunesmith.serving.deployment import reason
from tunesmith.serving.registry import Registry
from tunesmith.serving.serve_command import check, check_room, names, signals

BASES = "bases:\n  tiny: {path: x}\n"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("bases:\n  tiny:\n    path: x\n    engin: vllm\n", "4: bases.tiny.engin: no such key; did you mean engine?"),
        ("bases:\n  tiny: {engine: vllm}\n", "2: bases.tiny.path: missing"),
        ("bases:\n  tiny: {path: x, autoscaling: {max: 2}}\n", "autoscaling.max: no such key; did you mean max_replicas?"),
        ("bases:\n  a/b: {path: x}\n", "2: bases.a/b: string should match pattern"),
        (BASES + "agents:\n  p: {layers: [[{modell: tiny}]]}\n", "modell: no such key; did you mean model?"),
        (BASES + "agents:\n  p: {layers: [[{model: p}]]}\n", "4: agents.p: it asks the mixture p; mixtures do not nest"),
        (BASES + "endpoints:\n  e: {uri: http://x}\n", "4: endpoints.e.uri: no such key; did you mean url?"),
    ],
)  # fmt: skip
def test_a_mistake_is_answered_with_its_line_and_the_nearest_key(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "serve.yaml").write_text(text, encoding="utf-8")
    with pytest.raises(ServeConfigError) as error:
        load_config(tmp_path / "serve.yaml")
    assert f"{message}" in str(error.value)


@pytest.mark.parametrize("reference", ["./nowhere", "run:none", "builtin:tiny-llama", "empty"])
def test_a_base_that_cannot_be_had_is_named_by_its_own_key(
    tmp_path: Path, reference: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ModelError, match=r"^bases\.tiny\.path: ") as error:
        base_of("bases.tiny.path", reference, tmp_path)
    assert "model.base" not in str(error.value)


def test_replicas_that_never_fit_are_refused_with_the_numbers() -> None:
    config = Serve.model_validate({"bases": {"tiny": {"path": "x", "gpus": 1, "replicas": 3}, "other": {"path": "y"}}})
    with pytest.raises(ResourceError, match=r"reserve 3 gpus \(tiny 3\), and this machine has 2"):
        check_room(config, [Node(cpus=8, gpus=2)])
    check_room(config, [Node(cpus=8, gpus=3)])


def test_an_adapter_of_a_base_s_name_is_warned_about_and_the_base_is_served(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    registry = Registry(str(tmp_path / "registry"))
    for name in ("tiny", "panel", "support"):
        registry.add(name, tiny_adapters.artifact(tmp_path / name))
    panel = {"layers": [[{"model": "tiny"}]]}
    written = {"bases": {"tiny": {"path": "x"}}, "agents": {"panel": panel}, "registry": registry.root}
    config = Serve.model_validate({**written, "http": {"port": free_port()}})
    check(config)
    shown = " ".join(capsys.readouterr().err.split())
    assert shown.startswith("panel, tiny: a base or mixture of the configuration, and also an adapter of")
    assert names(config) == ["tiny", "panel", "support"]


def test_a_member_that_is_not_there_yet_is_warned_about(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    layer = [{"model": "tiny"}, {"model": "suport@prod"}, {"model": "gpt", "endpoint": "outside"}]
    config = Serve.model_validate(
        {
            "bases": {"tiny": {"path": "x"}},
            "agents": {"panel": {"layers": [layer]}},
            "endpoints": {"outside": {"url": "http://127.0.0.1:1/v1"}},
            "registry": str(tmp_path / "registry"),
            "http": {"port": free_port()},
        }
    )
    check(config)
    shown = " ".join(capsys.readouterr().err.split())
    assert shown.startswith("agents.panel: it asks suport@prod: neither a base, nor an adapter of")


def test_what_a_replica_failed_with_is_told_without_its_traceback() -> None:
    message = (
        "The deployment failed to start 3 times in a row. Error:\nray::ServeReplica() (pid=1)\n"
        '  File "a.py", line 1, in f\n    raise KeyError\nKeyError: 1\n\nDuring handling:\n'
        '  File "b.py", line 2, in g\n    raise ValueError(\n    ^^^^^^^\nValueError: 5000 GiB are asked for;\n 23 are free'
    )
    assert reason(message) == "ValueError: 5000 GiB are asked for; 23 are free"
    assert reason("The gateway\nis gone") == "The gateway is gone"


@pytest.mark.parametrize(("number", "raised"), [(signal.SIGINT, KeyboardInterrupt), (signal.SIGTERM, SystemExit)])
def test_a_signal_ends_a_service_that_is_not_up_yet(number: signal.Signals, raised: type[BaseException]) -> None:
    stop, up = threading.Event(), threading.Event()
    with pytest.raises(raised), signals(stop, up):
        signal.raise_signal(number)
    with signals(stop, up):
        up.set()
        signal.raise_signal(number)
    assert stop.is_set()
