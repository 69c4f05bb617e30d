from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from tunesmith.cluster.errors import CheckpointError, DiskFullError
from tunesmith.cluster.storage import sha256_file
from tunesmith.trainers.checkpoint_files import SignedFiles, module_names, tensor_bytes
from tunesmith.trainers.checkpoint_folder import to_remove


def test_the_newest_and_the_best_are_kept() -> None:
    assert to_remove([10, 20, 30, 40], [(0.5, 20), (0.7, 40)], keep=1) == [10, 30]
    assert to_remove([10, 20, 30, 40], [], keep=2) == [10, 20]
    assert to_remove([10, 20], [(0.5, 20), (0.5, 10)], keep=1) == []
    assert to_remove([], [], keep=2) == []


def test_a_file_is_hashed_as_it_is_written_and_holds_only_what_is_needed(tmp_path: Path) -> None:
    files = SignedFiles(tmp_path, ["kept"])
    files.save({"module": {"kept": torch.arange(5), "frozen": torch.zeros(1000)}, "step": 3}, str(tmp_path / "a.pt"))
    assert files.error is None
    assert files.files["a.pt"].sha256 == sha256_file(tmp_path / "a.pt")
    assert files.files["a.pt"].size == files.wanted == (tmp_path / "a.pt").stat().st_size
    state = SignedFiles(tmp_path, ["kept"], files.files).load(str(tmp_path / "a.pt"))
    assert list(state["module"]) == ["kept"]
    assert state["module"]["kept"].tolist() == [0, 1, 2, 3, 4]


def test_a_file_made_in_memory_is_the_one_that_would_have_been_written(tmp_path: Path) -> None:
    shared = torch.arange(8.0)
    state = {"module": {"kept": shared[2:4], "frozen": torch.zeros(9)}, "again": shared, "step": 3}
    now, later = SignedFiles(tmp_path, ["kept"]), SignedFiles(tmp_path, ["kept"], in_memory=True)
    now.save(state, str(tmp_path / "now.pt"))
    later.save(state, str(tmp_path / "later.pt"))
    shared.zero_()
    state["step"] = 4
    assert (later.files, (tmp_path / "later.pt").exists()) == ({}, False)
    later.write_copies()
    assert later.files["later.pt"] == now.files["now.pt"]
    assert (tmp_path / "later.pt").read_bytes() == (tmp_path / "now.pt").read_bytes()
    assert later.wanted == now.wanted


def test_a_file_made_in_memory_whose_disk_is_full_is_told_with_its_bytes(tmp_path: Path) -> None:
    files = SignedFiles(tmp_path, [], in_memory=True)
    (tmp_path / "full.pt").symlink_to("/dev/full")
    files.save({"weights": torch.zeros(1000)}, str(tmp_path / "full.pt"))
    files.write_copies()
    assert isinstance(files.error, DiskFullError)
    assert files.wanted > 4000
    assert files.files == {}


def test_a_file_that_the_manifest_does_not_name_is_not_unpickled(tmp_path: Path) -> None:
    torch.save({"module": {}}, tmp_path / "a.pt")
    with pytest.raises(CheckpointError, match="does not name this file"):
        SignedFiles(tmp_path, []).load(str(tmp_path / "a.pt"))


def test_a_write_that_fails_is_kept_until_asked_for_and_counts_all_bytes(tmp_path: Path) -> None:
    files = SignedFiles(tmp_path, [])
    (tmp_path / "full.pt").symlink_to("/dev/full")
    files.save({"weights": torch.zeros(1000)}, str(tmp_path / "full.pt"))
    files.save({"weights": torch.zeros(1000)}, str(tmp_path / "b.pt"))
    assert isinstance(files.error, DiskFullError)
    assert files.wanted > 8000
    assert files.files == {}
    assert not (tmp_path / "b.pt").exists()


def test_trainable_weights_by_all_their_names_and_buffers_are_needed() -> None:
    model = nn.Module()
    model.embedding = nn.Embedding(4, 2)
    model.head = nn.Linear(2, 4, bias=False)
    model.head.weight = model.embedding.weight
    model.body = nn.Linear(2, 2).requires_grad_(False)
    model.norm = nn.BatchNorm1d(2, affine=False)
    model.register_buffer("cache", torch.zeros(1), persistent=False)
    running = {"norm.running_mean", "norm.running_var", "norm.num_batches_tracked"}
    assert module_names(model) == {"embedding.weight", "head.weight"} | running


def test_bytes_of_shared_storage_count_once() -> None:
    whole = torch.zeros(100)
    assert tensor_bytes({"a": whole[:10], "b": [whole, (torch.zeros(3, dtype=torch.uint8),)], "c": "text"}) == 403
