"""A rendered RayJob's own command and hook on a real run: saved when a pod is to end, and gone on with by the retry."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import small_runs
import yaml
from imports import REPOSITORY

from tunesmith.cluster.kube.commands import Wanted
from tunesmith.cluster.kube.pods import MOUNT, RECIPES, Placement
from tunesmith.cluster.metrics import read_metrics
from tunesmith.cluster.runs import RunFolder
from tunesmith.trainers import kube

pytestmark = pytest.mark.matrix

STEPS = 120
RECIPE = {
    "name": "bot",
    "model": {"base": "builtin:tiny-llama"},
    "data": {"train": "tickets.jsonl", "max_length": 128, "split": {"validation": 0.1}},
    "objective": "sft",
    "adaptation": "full",
    "train": {"max_steps": STEPS, "save_steps": STEPS, "learning_rate": 1.0e-3},
    "cluster": {"workers": 2, "zero": 2, "cpus_per_worker": 1},
}


@pytest.fixture
def rendered(tmp_path: Path) -> tuple[Path, dict[str, Any]]:
    """The claim, and the RayJob whose ConfigMap lies where its pods would have it."""
    claim, mounted = tmp_path / "shared", tmp_path / "mounted"
    claim.mkdir()
    mounted.mkdir()
    (claim / "tickets.jsonl").write_bytes((REPOSITORY / "examples" / "support" / "tickets.jsonl").read_bytes())
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(RECIPE))
    text = json.dumps(kube.documents(Wanted(recipe, False, Placement("tunesmith:1"))))
    config_map, job = json.loads(text.replace(MOUNT, str(claim)).replace(RECIPES, str(mounted)))
    for name, content in config_map["data"].items():
        (mounted / name).write_text(content)
    return claim, job


def test_a_pod_that_ends_saves_and_the_retry_goes_on_to_the_end(rendered: tuple[Path, dict[str, Any]]) -> None:
    claim, job = rendered
    run = claim / "runs" / "bot"
    entrypoint = [sys.executable, *job["spec"]["entrypoint"].split()[1:]]
    hook = job["spec"]["rayClusterSpec"]["workerGroupSpecs"][0]["template"]["spec"]["containers"][0]["lifecycle"]
    first = subprocess.Popen(entrypoint, stderr=subprocess.PIPE, text=True)
    try:
        end = time.monotonic() + 600
        while not run.exists() or len(read_metrics(run / "metrics.jsonl")) < 10:
            assert first.poll() is None, first.communicate()[1]
            assert time.monotonic() < end
            time.sleep(0.1)
        with small_runs.frozen(run):  # else a fast machine is done before the hook has begun
            ending = subprocess.Popen([sys.executable, *hook["preStop"]["exec"]["command"][1:]])
            while not RunFolder(run).attempt_stop_file(1).exists():
                assert ending.poll() is None
                assert time.monotonic() < end
                time.sleep(0.1)
        assert ending.wait(timeout=600) == 0
        said = first.communicate(timeout=600)[1]
    finally:
        first.kill()
    assert first.returncode == 75, said
    (checkpoint,) = (run / "checkpoints").glob("step-*")
    stopped_at = int(checkpoint.name.partition("-")[2])
    assert 10 <= stopped_at < STEPS

    second = subprocess.run(entrypoint, capture_output=True, text=True, check=False, timeout=600)
    assert second.returncode == 0, second.stderr
    assert (run / "artifact" / "MANIFEST.json").is_file()
    assert json.loads((run / "attempt.json").read_text()) == {"attempt": 2}
    steps = [line["step"] for line in read_metrics(run / "metrics.jsonl")]
    assert max(steps) == STEPS
    assert set(steps) - {0} == set(range(1, STEPS + 1)), "no step was left out"
    assert len(steps) - len(set(steps)) <= 2, "the retry began after the saved step; only evaluations repeat one"
