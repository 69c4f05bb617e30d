from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tunesmith.cluster.artifacts import read_manifest, verify
from tunesmith.cluster.errors import CheckpointError, DiskFullError, StorageError
from tunesmith.cluster.storage import (
    MANIFEST,
    HashingFile,
    begin_folder,
    commit_folder,
    commit_once,
    manifest_digest,
    remove_leftovers,
    require_space,
    seal,
    sha256_file,
    write_atomic,
)


def _write(folder: Path, **files: str) -> Path:
    with commit_folder(folder, {"kind": "artifact", "step": 7}) as temporary:
        for name, text in files.items():
            path = temporary / name.replace("__", "/")
            path.parent.mkdir(exist_ok=True)
            path.write_text(text)
    return folder


def _write_and_fail(folder: Path) -> None:
    with commit_folder(folder, {"kind": "artifact"}) as temporary:
        (temporary / "a").write_text("half")
        raise KeyError("mine")


def test_a_committed_folder_names_every_file_and_what_else_was_said(tmp_path: Path) -> None:
    manifest = verify(_write(tmp_path / "model", a="one", sub__b="two"))
    assert manifest.kind == "artifact"
    assert manifest.about == {"step": 7}
    assert sorted(manifest.files) == ["a", "sub/b"]
    assert manifest.files["a"].size == 3
    assert manifest.files["a"].sha256 == sha256_file(tmp_path / "model" / "a")
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_an_error_inside_leaves_nothing_and_goes_on(tmp_path: Path) -> None:
    with pytest.raises(KeyError):
        _write_and_fail(tmp_path / "model")
    assert list(tmp_path.iterdir()) == []


def test_a_failed_replacement_keeps_the_earlier_folder(tmp_path: Path) -> None:
    final = _write(tmp_path / "model", a="old")
    with pytest.raises(KeyError):
        _write_and_fail(final)
    verify(final)
    assert (final / "a").read_text() == "old"
    verify(_write(final, a="new"))
    assert (final / "a").read_text() == "new"


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    final = _write(tmp_path / "model", a="one", b="two")
    (final / "b").unlink()
    with pytest.raises(CheckpointError, match=r"model/b: No such file"):
        verify(final)


def test_a_truncated_file_is_named_with_both_sizes(tmp_path: Path) -> None:
    final = _write(tmp_path / "model", a="one", b="two")
    os.truncate(final / "b", 2)
    with pytest.raises(CheckpointError, match=r"model/b: 2 bytes, but 3 were written"):
        verify(final)


@pytest.mark.parametrize("name", ["a", MANIFEST])
def test_every_flipped_byte_is_found(tmp_path: Path, name: str) -> None:
    final = _write(tmp_path / "model", a="some bytes")
    whole = (final / name).read_bytes()
    for index in range(len(whole)):
        flipped = bytearray(whole)
        flipped[index] ^= 1
        (final / name).write_bytes(flipped)
        if name == MANIFEST and _same_json(bytes(flipped), whole):
            continue  # a changed white space says the same
        with pytest.raises(CheckpointError, match=name):
            verify(final)


def _same_json(first: bytes, second: bytes) -> bool:
    try:
        return json.loads(first) == json.loads(second)
    except ValueError:
        return False


def test_a_folder_without_a_manifest_is_not_trusted(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("one")
    with pytest.raises(CheckpointError, match=MANIFEST):
        read_manifest(tmp_path)


def test_a_manifest_may_not_name_files_outside_its_folder(tmp_path: Path) -> None:
    final = _write(tmp_path / "model", a="one")
    document = json.loads((final / MANIFEST).read_text())
    document.pop("digest")
    document["files"]["../secret"] = document["files"].pop("a")
    (final / MANIFEST).write_text(json.dumps({**document, "digest": manifest_digest(document)}))
    with pytest.raises(CheckpointError, match=r"outside its folder: \.\./secret"):
        verify(final)


def test_hashing_while_writing_gives_the_hash_of_the_file(tmp_path: Path) -> None:
    file = HashingFile(tmp_path / "a")
    file.write(b"one")
    file.write(memoryview(b"two"))
    record = file.close()
    assert record.size == 6
    assert record.sha256 == sha256_file(tmp_path / "a")


def test_leftovers_of_the_dead_are_removed_and_work_of_the_living_stays(tmp_path: Path) -> None:
    script = (
        "import sys, time; from pathlib import Path; from tunesmith.cluster.storage import commit_folder\n"
        f"with commit_folder(Path({str(tmp_path / 'model')!r}), {{'kind': 'artifact'}}) as folder:\n"
        "    (folder / 'a').write_text('half'); print(folder, flush=True); time.sleep(60)\n"
    )
    with subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True) as writer:
        try:
            assert writer.stdout is not None
            folder = Path(writer.stdout.readline().strip())
            assert remove_leftovers(tmp_path) == []
            assert folder.exists()
        finally:
            writer.kill()
    (tmp_path / "metrics.tmp-12345678").write_text("half a file")
    assert remove_leftovers(tmp_path) == [tmp_path / "metrics.tmp-12345678", folder]
    assert list(tmp_path.iterdir()) == []


def test_leftovers_too_young_to_be_held_may_be_spared(tmp_path: Path) -> None:
    old, young = begin_folder(tmp_path / "a"), begin_folder(tmp_path / "b")
    os.utime(old, (0, 0))
    assert remove_leftovers(tmp_path, younger_stay_s=60) == [old]
    assert young.exists()


def test_a_folder_committed_once_stays_and_the_second_is_dropped(tmp_path: Path) -> None:
    outcomes = []
    for text in ("first", "second"):
        temporary = begin_folder(tmp_path / "model")
        (temporary / "a").write_text(text)
        outcomes.append(commit_once(temporary, tmp_path / "model", {"a": seal(temporary / "a")}, {"kind": "adapter"}))
    assert outcomes == [True, False]
    assert verify(tmp_path / "model").kind == "adapter"
    assert (tmp_path / "model" / "a").read_text() == "first"
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_an_atomic_write_replaces_and_leaves_no_other_file(tmp_path: Path) -> None:
    write_atomic(tmp_path / "a", "old")
    write_atomic(tmp_path / "a", b"new")
    assert (tmp_path / "a").read_text() == "new"
    assert len(list(tmp_path.iterdir())) == 1


def test_too_little_space_is_told_with_the_numbers(tmp_path: Path) -> None:
    require_space(tmp_path / "not" / "there", 1)
    with pytest.raises(DiskFullError, match=rf"{tmp_path}/x: disk full: {1 << 60} bytes needed, \d+ bytes free"):
        require_space(tmp_path / "x", 1 << 60)


def test_a_full_device_is_told_as_such(tmp_path: Path) -> None:
    with pytest.raises(DiskFullError, match="bytes free"), commit_folder(tmp_path / "model", {"kind": "artifact"}):
        Path("/dev/full").write_text("x")
    with pytest.raises(StorageError, match="Not a directory"):
        write_atomic(Path("/dev/null/x"), "x")


def test_importing_the_ground_needs_neither_torch_nor_ray() -> None:
    modules = ("storage", "artifacts", "runs", "identity", "metrics")
    script = "".join(f"import tunesmith.cluster.{name}\n" for name in modules)
    script += "import sys; sys.exit(any(name in sys.modules for name in ('torch', 'ray', 'numpy')))"
    start = time.monotonic()
    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == 0
    assert time.monotonic() - start < 5
