"""What a base reference may be, and what is said when it is not."""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import tiny_models

from tunesmith.cluster import base as bases
from tunesmith.cluster.errors import ModelError
from tunesmith.cluster.storage import manifest_digest
from tunesmith.trainers.base import resolve_base


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_models.make("llama", tmp_path_factory.mktemp("base") / "llama")


@pytest.fixture
def copy(llama: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(llama, tmp_path / "copy"))


def refused(reference: str | Path, output: Path) -> str:
    with pytest.raises(ModelError) as error:
        resolve_base(str(reference), None, output)
    assert error.value.exit_code == 2
    return str(error.value)


def test_a_folder_resolves_to_its_path_context_and_digest(llama: Path, tmp_path: Path) -> None:
    found = resolve_base(str(llama), None, tmp_path)
    weights = hashlib.sha256((llama / "model.safetensors").read_bytes()).hexdigest()
    assert (found.path, found.context_length, found.revision) == (str(llama), 256, None)
    assert found.digest == hashlib.sha256(weights.encode()).hexdigest()
    assert found.loadable == str(llama)


def test_the_digest_follows_the_weights_and_not_their_names(copy: Path, tmp_path: Path) -> None:
    first = resolve_base(str(copy), None, tmp_path).digest
    (copy / "model.safetensors").rename(copy / "model-00001.safetensors")
    assert resolve_base(str(copy), None, tmp_path).digest == first
    tiny_models.make("llama", copy, seed=1)
    (copy / "model-00001.safetensors").unlink()
    assert resolve_base(str(copy), None, tmp_path).digest != first


def test_hashes_are_remembered_until_the_file_changes(copy: Path, tmp_path: Path) -> None:
    resolve_base(str(copy), None, tmp_path)
    remembered = list((tmp_path / ".cache" / "hashes").iterdir())
    assert len(remembered) == 1
    remembered[0].write_text("0" * 64)
    assert resolve_base(str(copy), None, tmp_path).digest == hashlib.sha256(("0" * 64).encode()).hexdigest()
    (copy / "model.safetensors").touch()
    assert resolve_base(str(copy), None, tmp_path).digest != hashlib.sha256(("0" * 64).encode()).hexdigest()


def test_a_run_is_its_artifact_and_its_manifest_gives_the_hashes(copy: Path, tmp_path: Path) -> None:
    artifact = tmp_path / "runs" / "first" / "artifact"
    artifact.parent.mkdir(parents=True)
    copy.rename(artifact)
    document = {"kind": "artifact", "files": {"model.safetensors": {"size": 1, "sha256": "a" * 64}}}
    (artifact / "MANIFEST.json").write_text(json.dumps({**document, "digest": manifest_digest(document)}))
    found = resolve_base("run:first", None, tmp_path / "runs")
    assert (found.path, found.reference) == (str(artifact), "run:first")
    assert found.digest == hashlib.sha256(("a" * 64).encode()).hexdigest()
    assert "Runs with an artifact there: first" in refused("run:frist", tmp_path / "runs")
    (tmp_path / "runs" / "second").mkdir()
    assert "no artifact yet" in refused("run:second", tmp_path / "runs")


@pytest.mark.parametrize(
    ("missing", "said"),
    [("config.json", "config.json"), ("tokenizer.json", "tokenizer"), ("model.safetensors", "weights")],
)
def test_a_folder_without_a_part_is_refused_by_its_name(copy: Path, tmp_path: Path, missing: str, said: str) -> None:
    (copy / missing).unlink()
    assert said in refused(copy, tmp_path)


def test_damaged_parts_are_refused(copy: Path, tmp_path: Path) -> None:
    weights = copy / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    assert "its header says" in refused(copy, tmp_path)
    weights.write_bytes(b"version https://git-lfs.github.com/spec/v1\n")
    assert "not a whole safetensors file" in refused(copy, tmp_path)
    (copy / "config.json").write_text("{")
    assert "cannot be read" in refused(copy, tmp_path)
    (copy / "config.json").write_text("{}")
    assert "names no model_type" in refused(copy, tmp_path)


def test_a_missing_shard_is_named(copy: Path, tmp_path: Path) -> None:
    index = {"weight_map": {"a": "model.safetensors", "b": "model-00002-of-00002.safetensors"}}
    (copy / "model.safetensors.index.json").write_text(json.dumps(index))
    assert "model-00002-of-00002.safetensors" in refused(copy, tmp_path)


def test_an_adapter_is_no_base(copy: Path, tmp_path: Path) -> None:
    (copy / "config.json").rename(copy / "adapter_config.json")
    assert "LoRA adapter" in refused(copy, tmp_path)


def test_a_misspelt_folder_names_the_near_one(copy: Path, tmp_path: Path) -> None:
    assert f"did you mean {copy}?" in refused(copy.with_name("copi"), tmp_path)


def test_a_hub_id_that_cannot_be_had_is_an_error_of_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert "as a hub id it cannot be had" in refused("nobody/no-such-model", tmp_path)


def test_resolving_imports_neither_torch_nor_transformers(llama: Path, tmp_path: Path) -> None:
    code = (
        "import sys; from tunesmith.trainers.models import resolve_base; "
        f"resolve_base({str(llama)!r}, None, {str(tmp_path)!r}); "
        "print([name for name in ('torch', 'transformers', 'peft', 'deepspeed') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_weights_hashed_by_the_hub_cache_are_not_read(tmp_path: Path) -> None:
    blob = tmp_path / "blobs" / ("b" * 64)
    blob.parent.mkdir()
    blob.write_bytes(b"x")
    (tmp_path / "snapshot").mkdir()
    (tmp_path / "snapshot" / "pytorch_model.bin").symlink_to(blob)
    expected = hashlib.sha256(("b" * 64).encode()).hexdigest()
    assert bases.digest(tmp_path / "snapshot", tmp_path) == expected
