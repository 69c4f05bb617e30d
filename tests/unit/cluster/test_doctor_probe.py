"""The probes, on this machine and on files made for them."""

from __future__ import annotations

import csv
import fcntl
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tunesmith.cluster.doctor import probe
from tunesmith.cluster.doctor.facts import Gpu, Machine
from tunesmith.cluster.doctor.gather import requirements, scratch

NVIDIA_SMI = """\
GPU-5d1c, NVIDIA H100 80GB HBM3, 81559, 1204, 580.95.05, 2
GPU-77aa, NVIDIA H100 80GB HBM3, 81559, 4, 580.95.05, 0
GPU-90ff, NVIDIA GeForce RTX 4090, 24564, 311, 580.95.05, [N/A]
"""
BUSY = "GPU-5d1c, /usr/bin/python3, 4021\nGPU-5d1c, vllm, 4077\n"


def rows(text: str) -> list[list[str]]:
    return list(csv.reader(text.splitlines(), skipinitialspace=True))


def test_the_drivers_lines_become_gpus_with_their_errors_and_who_is_on_them():
    gpus = [Gpu.model_validate(probe.read_gpu(row, rows(BUSY))) for row in rows(NVIDIA_SMI)]
    assert [gpu.ecc_errors for gpu in gpus] == [2, 0, None]
    assert gpus[0].processes == ["/usr/bin/python3 (pid 4021)", "vllm (pid 4077)"]
    assert gpus[1].processes == []
    assert (gpus[2].name, gpus[2].memory_mib, gpus[2].driver) == ("NVIDIA GeForce RTX 4090", 24564, "580.95.05")


def test_a_driver_that_fails_is_quoted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    command = tmp_path / "nvidia-smi"
    command.write_text("#!/bin/sh\necho 'Failed to initialize NVML: Driver/library version mismatch'\nexit 18\n")
    command.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    assert probe.gpus_of_driver() == ([], "Failed to initialize NVML: Driver/library version mismatch")


def test_this_machine_is_described_whole(tmp_path: Path):
    seen = Machine.model_validate(probe.look("here", ["ray", "no-such-library"], str(tmp_path / "runs"), ""))
    assert seen.python == ".".join(map(str, sys.version_info[:3]))
    assert seen.versions["ray"] is not None
    assert seen.versions["no-such-library"] is None
    assert {disk.kind for disk in seen.disks} >= {"output", "temporary"}
    assert all(0 < disk.free_bytes <= disk.total_bytes for disk in seen.disks)


def test_a_compiler_is_asked_to_compile(tmp_path: Path):
    broken = tmp_path / "broken-c++"
    broken.write_text("#!/bin/sh\necho 'fatal error: Python.h: No such file or directory' >&2\nexit 1\n")
    broken.chmod(0o755)
    assert probe.compile_extension(str(broken)) == "fatal error: Python.h: No such file or directory"
    assert probe.compile_extension(str(tmp_path / "none")) == "there is none on the path"
    assert probe.compile_extension("c++") == ""


def test_what_hangs_is_a_finding_and_not_the_doctors_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    hangs = tmp_path / "hangs"
    hangs.write_text("#!/bin/sh\nexec sleep 60\n")
    hangs.chmod(0o755)
    monkeypatch.setattr(probe, "PATIENCE_S", 0.2)
    monkeypatch.setattr(probe, "TORCH_PATIENCE_S", 0.2)
    monkeypatch.setattr(sys, "executable", str(hangs))
    assert probe.compile_extension(str(hangs)) == "it has not compiled a small file within 0.2 s"
    assert probe.ask_torch() == {"error": "no answer within 0.2 s"}


@pytest.fixture
def shared(tmp_path: Path) -> Iterator[Path]:
    """The output folder as the driver prepares it, with its lock held."""
    (tmp_path / "driver").write_text("nonce")
    with open(tmp_path / "lock", "wb") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield tmp_path


def test_what_the_driver_wrote_is_read_answered_and_its_lock_respected(shared: Path):
    assert probe.read_and_answer(str(shared), "nonce", "answer") == {"reads_ours": True, "sees_lock": True}
    assert (shared / "answer").read_text() == "answer"


def test_a_folder_of_the_same_name_elsewhere_is_not_the_drivers(tmp_path: Path):
    missing = probe.read_and_answer(str(tmp_path / "elsewhere"), "nonce", "answer")
    assert not missing["reads_ours"]
    assert "No such file" in missing["error"]
    (tmp_path / "driver").write_text("another")
    (tmp_path / "lock").touch()
    assert probe.read_and_answer(str(tmp_path), "nonce", "answer") == {"reads_ours": False, "sees_lock": False}


def test_storage_is_measured_and_left_as_it_was(tmp_path: Path):
    measured = probe.measure_storage(str(tmp_path), "here", 2**20)
    assert measured["write_mb_s"] > 0
    assert measured["read_mb_s"] > 0
    assert list(tmp_path.iterdir()) == []
    assert "No such file" in probe.measure_storage(str(tmp_path / "none"), "here", 10)["error"]


def test_folders_made_for_the_probe_are_gone_and_those_that_were_there_stay(tmp_path: Path):
    with scratch(tmp_path / "a" / "b") as (folder, error):
        assert error == ""
        assert folder.is_relative_to(tmp_path / "a" / "b")
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "file").touch()
    with scratch(tmp_path / "file" / "runs") as (_, error):
        assert "Not a directory" in error


def test_a_token_counts_as_readable_only_where_its_folders_are_open(tmp_path: Path):
    token = tmp_path / "ray" / "token"
    token.parent.mkdir()
    token.write_text("secret")
    token.chmod(0o644)
    above = [folder for folder in tmp_path.parents if folder.stat().st_mode & 0o001 == 0]
    token.parent.chmod(0o755)
    assert probe.readable_by_others(token) is (not above and bool(tmp_path.stat().st_mode & 0o001))
    token.parent.chmod(0o700)
    assert not probe.readable_by_others(token)
    token.parent.chmod(0o755)
    token.chmod(0o600)
    assert not probe.readable_by_others(token)


def test_rays_processes_are_told_from_others():
    assert probe.is_of_ray(["/venv/ray/core/src/ray/raylet/raylet", "--raylet_socket_name=x"])
    assert probe.is_of_ray(["ray::Witness.look"])
    assert probe.is_of_ray(["/venv/bin/python", "-u", "/venv/ray/dashboard/dashboard.py"])
    assert not probe.is_of_ray(["tail", "-f", "raylet.out"])
    assert not probe.is_of_ray([])


def test_the_listeners_of_one_session_are_found(tmp_path: Path):
    """A process that looks like Ray's is one that Ray's name is given to."""
    code = "import socket, sys; s = socket.create_server(('127.0.0.1', 0)); print(s.getsockname()[1], flush=True); sys.stdin.read()"
    command = ["ray::stand-in", "-c", code, "session_of_this_test"]
    with subprocess.Popen(
        command, executable=sys.executable, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        port = int(process.stdout.readline())
        found = [(one["pid"], one["address"], one["port"]) for one in probe.ray_listeners("session_of_this_test")]
        assert found == [(process.pid, "127.0.0.1", port)]
        assert list(probe.ray_listeners("session_of_another")) == []
        process.communicate()
    with socket.socket() as gone:
        assert gone.connect_ex(("127.0.0.1", port)) != 0


def test_what_the_installed_tunesmith_asks_for_is_what_is_looked_for():
    wanted, python = requirements()
    assert wanted[0] == "tunesmith"
    assert any(line.startswith("ray") and ">=" in line for line in wanted)
    assert not any(line.startswith("wandb") for line in wanted) or probe.version_of("wandb")
    assert "3.11" in python
