"""A rendered RayJob's way through Ray, with raylets in place of pods: submitted, saved by the hook of a pod that ends, retried."""

from __future__ import annotations

import json
import os
import secrets
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml
from imports import REPOSITORY
from serving_service import free_port

from tunesmith.cluster.kube.commands import Wanted
from tunesmith.cluster.kube.pods import MOUNT, RECIPES, Placement
from tunesmith.cluster.metrics import read_metrics
from tunesmith.trainers import kube

pytestmark = pytest.mark.matrix

RECIPE = {
    "name": "bot",
    "model": {"base": "builtin:tiny-llama"},
    "data": {"train": "tickets.jsonl", "max_length": 128, "split": {"validation": 0.1}},
    "objective": "sft",
    "adaptation": "full",
    "train": {"max_steps": 400, "save_steps": 200, "learning_rate": 1.0e-3},
    "cluster": {"workers": 2, "zero": 2},
}


def until(what: str, holds: Callable[[], Any], seconds: float = 120) -> Any:
    end = time.monotonic() + seconds
    while not (found := holds()):
        assert time.monotonic() < end, what
        time.sleep(0.2)
    return found


class Raylets:
    """A head without CPUs and a node for each worker, as the rendered groups have them; ended by their process ids."""

    def __init__(self, folder: Path, head: dict[str, str], workers: int, cpus: int) -> None:
        self.folder, self.port, self.dashboard = folder, free_port(), free_port()
        self.token = secrets.token_hex(16)
        self.environment = {
            **os.environ,
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN": self.token,
            "RAY_USAGE_STATS_ENABLED": "0",
            "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
            "RAY_TMPDIR": str(folder),
        }
        self.processes: list[subprocess.Popen[bytes]] = []
        address = ["--port", str(self.port), "--dashboard-host", "127.0.0.1", "--dashboard-port", str(self.dashboard)]
        self._start("--head", "--num-cpus", head["num-cpus"], *address, "--temp-dir", str(folder))
        until("a head", lambda: self._listens(self.dashboard), 60)
        for _ in range(workers):
            self._start("--address", f"127.0.0.1:{self.port}", "--num-cpus", str(cpus))

    def _start(self, *arguments: str) -> None:
        command = [sys.executable, "-m", "ray.scripts.scripts", "start", "--block", "--node-ip-address", "127.0.0.1"]
        size = ["--object-store-memory", str(100 * 2**20)]
        log = (self.folder / f"raylet-{len(self.processes)}.log").open("wb")
        self.processes.append(
            subprocess.Popen(
                [*command, *size, *arguments], env=self.environment, stdout=log, stderr=log, cwd=self.folder
            )
        )

    def _listens(self, port: int) -> bool:
        import socket

        with socket.socket() as probe:
            return probe.connect_ex(("127.0.0.1", port)) == 0

    def end(self) -> None:
        """Ends every process of these nodes."""
        family = [one for process in self.processes for one in (*psutil.Process(process.pid).children(True),)]
        for process in reversed(self.processes):
            process.send_signal(signal.SIGTERM)
        for process in self.processes:
            process.wait(60)
        for one in psutil.wait_procs(family, timeout=10)[1]:
            one.kill()


@pytest.fixture
def rendered(tmp_path: Path) -> tuple[Path, dict[str, Any]]:
    """The claim, and the RayJob whose ConfigMap lies where its pods would have it."""
    claim, mounted = tmp_path / "shared", tmp_path / "mounted"
    claim.mkdir()
    mounted.mkdir()
    (claim / "tickets.jsonl").write_bytes((REPOSITORY / "examples" / "support" / "tickets.jsonl").read_bytes())
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(RECIPE))
    documents = kube.documents(Wanted(recipe, False, Placement("tunesmith:1")))
    text = json.dumps(documents).replace(MOUNT, str(claim)).replace(RECIPES, str(mounted))
    config_map, job = json.loads(text)
    for name, content in config_map["data"].items():
        (mounted / name).write_text(content)
    return claim, job


@pytest.fixture
def raylets(rendered: tuple[Path, dict[str, Any]], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Raylets]:
    import tempfile

    spec = rendered[1]["spec"]["rayClusterSpec"]
    group = spec["workerGroupSpecs"][0]
    cpus = int(group["template"]["spec"]["containers"][0]["resources"]["limits"]["cpu"])
    with tempfile.TemporaryDirectory(prefix="ray-", dir="/tmp") as folder:  # a socket's path has 107 bytes
        started = Raylets(Path(folder), spec["headGroupSpec"]["rayStartParams"], group["replicas"], cpus)
        try:
            yield started
        finally:
            started.end()


def test_a_pod_that_ends_saves_and_the_retry_goes_on_to_the_end(
    rendered: tuple[Path, dict[str, Any]], raylets: Raylets, monkeypatch: pytest.MonkeyPatch
) -> None:
    claim, job = rendered
    for name in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN"):
        monkeypatch.setenv(name, raylets.environment[name])
    from ray.job_submission import JobStatus, JobSubmissionClient

    client = until("a jobs API", lambda: connected(JobSubmissionClient, raylets.dashboard))
    run = claim / "runs" / "bot"
    first = client.submit_job(entrypoint=job["spec"]["entrypoint"])
    until("30 steps", lambda: run.exists() and len(read_metrics(run / "metrics.jsonl")) >= 30, 240)
    container = job["spec"]["rayClusterSpec"]["workerGroupSpecs"][0]["template"]["spec"]["containers"][0]
    hook = container["lifecycle"]["preStop"]["exec"]["command"]
    saved = subprocess.run([sys.executable, *hook[1:]], capture_output=True, text=True, check=False, timeout=120)
    assert saved.returncode == 0, saved.stderr
    until("the end of the first attempt", lambda: client.get_job_status(first).is_terminal())
    assert client.get_job_info(first).driver_exit_code == 75, client.get_job_logs(first)
    stopped_at = max(int(path.name.partition("-")[2]) for path in (run / "checkpoints").glob("step-*"))
    assert 30 <= stopped_at < 400

    second = client.submit_job(entrypoint=job["spec"]["entrypoint"])
    until("the end of the second attempt", lambda: client.get_job_status(second).is_terminal(), 300)
    assert client.get_job_status(second) == JobStatus.SUCCEEDED, client.get_job_logs(second)
    assert (run / "artifact" / "MANIFEST.json").is_file()
    steps = [line["step"] for line in read_metrics(run / "metrics.jsonl") if "loss" in line or "train_loss" in line]
    assert steps[-1] == 400
    assert json.loads((run / "attempt.json").read_text()) == {"attempt": 2}


def connected(client: Any, port: int) -> Any:
    """A client of the jobs API, once it answers."""
    try:
        made = client(f"http://127.0.0.1:{port}")
        made.list_jobs()
    except (ConnectionError, RuntimeError):
        return None
    return made
