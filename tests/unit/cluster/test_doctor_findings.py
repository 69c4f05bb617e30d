"""What the doctor says of facts: each finding from a fact that is good and one that is not."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
from imports import REPOSITORY

from tunesmith.cluster.doctor import between, hardware, software
from tunesmith.cluster.doctor.checks import CHECKS, findings
from tunesmith.cluster.doctor.facts import Clock, Disk, Exchange, Facts, Gpu, Listener, Machine, Torch, Volume
from tunesmith.cluster.doctor.finding import Finding
from tunesmith.cluster.resources import Need, Node

GIB = 2**30
H100 = Gpu(uuid="GPU-1", name="NVIDIA H100 80GB HBM3", memory_mib=81559, used_mib=4, driver="580.95.05", ecc_errors=0)
BUILT = Torch(cuda="13.0", devices=1, nccl="2.29.7", nvcc="13.0", cuda_home="/usr/local/cuda")
ROOM = {"output": 500, "temporary": 100, "shared memory": 64}
DISKS = [Disk(kind=kind, path=f"/{kind}", total_bytes=1000 * GIB, free_bytes=free * GIB) for kind, free in ROOM.items()]


def machine(name: str, **changed: Any) -> Machine:
    sound: dict[str, Any] = {
        "name": name,
        "python": "3.11.7",
        "versions": {"tunesmith": "0.1.0", "torch": "2.13.0+cu130", "peft": "0.21.2"},
        "gpu_devices": 1,
        "gpus": [H100],
        "torch": BUILT,
        "disks": DISKS,
        "compiler": "c++",
        "ninja": True,
        "open_files": 65536,
        "auth_mode": "token",
        "token_path": "/etc/ray/token",
        "token_mode": 0o600,
        "listeners": [Listener(process="raylet", pid=7, address="10.0.0.1", port=6379)],
    }
    return Machine(**{**sound, **changed})


def facts(**changed: Any) -> Facts:
    sound: dict[str, Any] = {
        "requirements": ["tunesmith", "torch<2.14,>=2.13", "peft<0.22,>=0.21"],
        "requires_python": ">=3.11,<3.14",
        "driver": machine("this machine"),
        "address": "10.0.0.1:6379",
        "loopback": False,
        "nodes": [machine("node a"), machine("node b")],
        "resources": [Node(64, gpus=1), Node(64, gpus=1)],
        "need": Need(workers=2, cpus=8, gpus=1),
        "dashboard": ("10.0.0.1:8265", 401),
        "volumes": [
            Volume(machine=name, reads_ours=True, we_read=True, sees_lock=True, write_mb_s=900, read_mb_s=2000)
            for name in ("node a", "node b")
        ],
        "clocks": [Clock(machine="node a", offset_s=0.002, uncertainty_s=0.001)],
        "exchange": Exchange(backend="nccl", machines=["node a", "node b"], bytes=64 * 2**20, seconds=0.004),
    }
    return Facts(**{**sound, **changed})


def second(**changed: Any) -> Facts:
    """A cluster whose second node is not like the first."""
    return facts(nodes=[machine("node a"), machine("node b", **changed)])


def torch(**changed: Any) -> Facts:
    return second(torch=BUILT.model_copy(update=changed))


def gpu(**changed: Any) -> Facts:
    return second(gpus=[H100.model_copy(update=changed)])


def disk(kind: str, free_gib: float, total_gib: float = 1000) -> Facts:
    tight = Disk(kind=kind, path="/tight", total_bytes=int(total_gib * GIB), free_bytes=int(free_gib * GIB))
    return second(disks=[tight])


def volume(**changed: Any) -> Facts:
    sound: dict[str, Any] = {"reads_ours": True, "we_read": True, "sees_lock": True}
    return facts(volumes=[Volume(machine="node b", **{**sound, **changed})])


def exchange(seconds: float | None, backend: str = "nccl", error: str = "") -> Facts:
    seen = Exchange(backend=backend, machines=["node a", "node b"], bytes=64 * 2**20, seconds=seconds, error=error)
    return facts(exchange=seen)


def skewed(offset_s: float, uncertainty_s: float = 0.01) -> Facts:
    return facts(clocks=[Clock(machine="node b", offset_s=offset_s, uncertainty_s=uncertainty_s)])


def open_to_others(loopback: bool, **changed: Any) -> Facts:
    return facts(nodes=[machine("node b", **changed)], loopback=loopback)


def named(facts: Facts, check: str) -> list[Finding]:
    return [finding for finding in findings(facts) if finding.check == check]


BAD: list[tuple[Callable[[], Facts], str, str, str, str]] = [
    # facts, check, verdict, part of what, part of the fix
    (lambda: facts(address_error="nobody at 10.0.0.1"), "address", "failure", "nobody at 10.0.0.1", "auth_token"),
    (lambda: facts(silent={"node c": "no answer in time"}), "address", "failure", "no answer in time", "raylet's log"),
    (lambda: second(python="3.10.2"), "python", "failure", "3.10.2, and Tunesmith needs >=3.11,<3.14", "Install"),
    (lambda: second(python="3.12.1"), "python", "failure", "3.12.1, and the driver has 3.11.7", "Install Python 3.11"),
    (
        lambda: second(versions={"tunesmith": "0.1.0", "torch": "2.12.0", "peft": None}),
        "versions",
        "failure",
        "torch 2.12.0, and Tunesmith needs <2.14,>=2.13; peft is not installed",
        "requirements/gpu.lock",
    ),
    (
        lambda: second(versions={"tunesmith": None, "torch": "2.13.0", "peft": "0.21.2"}),
        "versions",
        "failure",
        "tunesmith is not installed",
        "tunesmith itself",
    ),
    (
        lambda: second(versions={"tunesmith": "0.1.0", "torch": "2.13.1", "peft": "0.21.2"}),
        "same versions",
        "failure",
        "torch 2.13.1, and the driver has 2.13.0+cu130",
        "one lock file",
    ),
    (
        lambda: second(versions={"tunesmith": "0.1.0", "torch": "2.13.0+cu130", "peft": "0.21.1"}),
        "same versions",
        "warning",
        "peft 0.21.1, and the driver has 0.21.2",
        "one lock file",
    ),
    (lambda: second(gpus=[], driver_error="mismatch"), "drivers", "failure", "1 GPUs, and nvidia-smi fails", "reboot"),
    (lambda: torch(error="libcudart is missing"), "drivers", "failure", "libcudart is missing", "gpu.lock"),
    (lambda: torch(cuda=None), "drivers", "failure", "1 GPUs, and a torch built for CPUs (2.13.0+cu130)", "gpu.lock"),
    (lambda: torch(devices=0), "drivers", "failure", "has 1 GPUs, and torch can use 0", "dmesg"),
    (lambda: gpu(driver="570.86.10"), "drivers", "failure", "570.86.10 is too old for CUDA 13.0", "580.65.06"),
    (lambda: gpu(ecc_errors=3), "gpus", "failure", "GPU 0 (NVIDIA H100 80GB HBM3): 3 uncorrected", "replaced"),
    (lambda: gpu(processes=["python (pid 9)"]), "gpus", "warning", "are held by python (pid 9)", "end them"),
    (lambda: gpu(used_mib=2048), "gpus", "warning", "2048 of 81559 MiB", "end them"),
    (lambda: gpu(name="NVIDIA L4"), "same gpus", "warning", "node b: 1 × NVIDIA L4", "slowest"),
    (lambda: gpu(driver="590.1.1"), "same gpus", "warning", "node b: driver 590.1.1", "one version"),
    (lambda: torch(nccl="2.28.3"), "same gpus", "failure", "node b: NCCL 2.28.3", "same torch"),
    (
        lambda: facts(need=Need(workers=4, cpus=8, gpus=1)),
        "resources",
        "failure",
        "4 workers × 1 GPU = 4 GPUs; the cluster's 2 nodes have 2",
        "cluster.workers: 2",
    ),
    (lambda: disk("output", 0.5), "disks", "failure", "0.5 of 1e+03 GiB free, less than 1 GiB", "output.dir"),
    (lambda: disk("output", 5), "disks", "warning", "less than 10 GiB", "output.dir"),
    (lambda: disk("temporary", 40), "disks", "failure", "more than 95% full, so Ray", "TMPDIR"),
    (lambda: disk("temporary", 3, total_gib=20), "disks", "warning", "less than 5 GiB", "TMPDIR"),
    (lambda: disk("shared memory", 0.0625, 0.0625), "disks", "failure", "less than 0.125 GiB", "--shm-size"),
    (lambda: second(compiler_error="Python.h: No such file"), "compilers", "failure", "Python.h", "python3-dev"),
    (lambda: second(ninja=False), "compilers", "failure", "ninja is not on the path", "PATH"),
    (lambda: torch(nvcc=None), "compilers", "warning", "there is no nvcc", "CUDA_HOME"),
    (lambda: torch(nvcc="12.8"), "compilers", "warning", "nvcc is of CUDA 12.8", "CUDA 13.0 toolkit"),
    (
        lambda: torch(nvcc=None).model_copy(update={"offload": True}),
        "compilers",
        "failure",
        "there is no nvcc",
        "CUDA_HOME",
    ),
    (lambda: second(open_files=256), "open files", "failure", "256 files, fewer than 1024", "ulimit -n 65536"),
    (lambda: second(open_files=1024), "open files", "warning", "1024 files, and Ray wants 4096", "ulimit -n 65536"),
    (
        lambda: volume(reads_ours=False, error="/runs: No such file"),
        "storage",
        "failure",
        "does not see what the driver writes: /runs",
        "Mount the same",
    ),
    (lambda: volume(reads_ours=False), "storage", "failure", "another one than the driver's", "Mount the same"),
    (lambda: volume(we_read=False), "storage", "failure", "the driver does not read what it writes", "Mount the same"),
    (lambda: volume(sees_lock=False), "storage", "failure", "two commands could write one run", "nolock"),
    (lambda: volume(error="/runs: Read-only file system"), "storage", "failure", "Read-only", "output.dir"),
    (
        lambda: volume(write_mb_s=20, read_mb_s=300),
        "storage speed",
        "warning",
        "writes 20 MB/s (with fsync), reads 300 MB/s, less than 100: 14 GB, a checkpoint of 10^9 trained parameters, take 12",
        "train.save_steps",
    ),
    (lambda: skewed(-4.2), "clocks", "warning", "-4.2 s from the driver's clock, give or take 0.01 s", "chrony"),
    (lambda: skewed(400), "clocks", "failure", "+400 s", "chrony"),
    (lambda: exchange(0.4), "network", "failure", "over 2 nodes: 0.168 GB/s, less than 1", "NCCL_SOCKET_IFNAME"),
    (lambda: exchange(1.4, "gloo"), "network", "failure", "0.0479 GB/s, less than 0.1", "GLOO_SOCKET_IFNAME"),
    (lambda: exchange(None, error="connection refused"), "network", "failure", "connection refused", "all ports"),
    (lambda: second(auth_mode="disabled"), "token", "failure", "RAY_AUTH_MODE is disabled", "RAY_AUTH_MODE=token"),
    (lambda: open_to_others(True, auth_mode=""), "token", "warning", "RAY_AUTH_MODE is not set", "RAY_AUTH_MODE=token"),
    (
        lambda: second(token_mode=0o644, token_open=True),
        "token",
        "failure",
        "/etc/ray/token has mode 0644",
        "chmod 600 /etc/ray/token",
    ),
    (lambda: facts(dashboard=("10.0.0.1:8265", 200)), "token", "failure", "anybody (HTTP 200", "RAY_AUTH_MODE=token"),
    (lambda: facts(dashboard=("10.0.0.1:8265", 0)), "token", "warning", "does not answer", "dashboard.log"),
    (
        lambda: open_to_others(True),
        "listeners",
        "failure",
        "this machine alone, and listens for others: raylet (pid 7) on 10.0.0.1:6379",
        "End it",
    ),
    (lambda: open_to_others(False, auth_mode=""), "listeners", "failure", "without a token", "RAY_AUTH_MODE=token"),
    (lambda: facts(nodes=[], address=None), "listeners", "warning", "a Ray on this machine listens", "--address auto"),
]


@pytest.mark.parametrize(("bad", "check", "verdict", "what", "fix"), BAD)
def test_what_is_wrong_is_said_with_the_numbers_and_the_fix(
    bad: Callable[[], Facts], check: str, verdict: str, what: str, fix: str
):
    found = [finding for finding in named(bad(), check) if finding.verdict == verdict and what in finding.what]
    assert len(found) == 1, named(bad(), check)
    assert fix in found[0].fix


def test_nothing_is_wrong_with_a_sound_cluster_and_every_check_says_so():
    found = findings(facts())
    assert {finding.verdict for finding in found} == {"ok"}, [one for one in found if one.verdict != "ok"]
    said = {finding.check for finding in found}
    assert said == {check for _, check, *_ in BAD}, "a check is never good, or never bad, in these tests"
    assert len(CHECKS) == len(said) - 3  # versions, GPUs and storage are judged twice


@pytest.mark.parametrize("bad", [case[0] for case in BAD])
def test_whoever_is_told_of_a_fault_is_told_what_to_do(bad: Callable[[], Facts]):
    for finding in findings(bad()):
        assert bool(finding.fix) == (finding.verdict in ("warning", "failure")), finding


def test_a_machine_without_gpus_and_without_a_cluster_has_nothing_wrong():
    alone = machine("this machine", gpu_devices=0, gpus=[], torch=None, listeners=[], token_mode=None)
    plain = facts(driver=alone, nodes=[], address=None, need=None, dashboard=None, volumes=[], clocks=[], exchange=None)
    found = {finding.check: finding.verdict for finding in findings(plain)}
    skipped = ("address", "drivers", "gpus", "resources", "network", "listeners")
    assert found == {
        **dict.fromkeys(("python", "versions", "disks", "compilers", "open files"), "ok"),
        **dict.fromkeys(skipped, "skipped"),
    }


def test_what_a_cluster_has_that_was_not_joined_is_not_judged_by_this_machine():
    unjoined = facts(nodes=[], address_error="nothing answers there", resources=[Node(64, gpus=8)])
    assert [(one.verdict, one.where) for one in named(unjoined, "resources")] == [("skipped", "cluster")]


def test_an_offset_within_what_the_round_trip_leaves_open_is_no_finding():
    assert [one.verdict for one in named(skewed(2.0, uncertainty_s=1.5), "clocks")] == ["ok"]
    assert [one.verdict for one in named(skewed(2.0, uncertainty_s=0.5), "clocks")] == ["warning"]


def test_what_each_machine_sends_in_an_all_reduce_is_counted_once():
    four = Exchange(backend="nccl", machines=list("abcd"), bytes=10**9, seconds=0.5)
    assert four.gb_s == pytest.approx(3.0)  # 2 × 3/4 of the tensor


def test_machines_that_are_alike_share_a_line():
    assert [one.where for one in named(facts(), "python")] == ["this machine, node a, node b"]


def test_ports_of_rays_on_a_mapped_loopback_address_are_not_open():
    listening = [Listener(process="gcs_server", pid=7, address="::ffff:127.0.0.1", port=1)]
    assert [one.verdict for one in named(open_to_others(True, listeners=listening), "listeners")] == ["ok"]


def test_the_documentation_has_a_row_for_every_check_and_the_figures_of_the_code():
    page = (REPOSITORY / "docs" / "doctor.md").read_text(encoding="utf-8")
    rows = {name: row for name, row in re.findall(r"^\| `([a-z ]+)` \|(.*)$", page, re.MULTILINE)}
    assert set(rows) == {check for _, check, *_ in BAD}
    figures = {
        "drivers": [software.DRIVER_OF_CUDA[12], software.DRIVER_OF_CUDA[13]],
        "gpus": [f"{hardware.HELD_MIB} MiB"],
        "disks": [
            f"{hardware.LEAST_FREE['output']} GiB",
            f"{hardware.LEAST_FREE['shared memory']} of",
            "less than {output}, {temporary} and {shared memory} GiB".format(**hardware.FREE),
            f"{hardware.RAY_FULL:.0%}",
        ],
        "open files": [f" {software.OPEN_FILES},", f" {software.FEWEST_OPEN_FILES} "],
        "storage speed": [f"{between.LEAST_MB_S:g} MB/s"],
        "clocks": [f"{between.SKEW_S:g} s", f"{between.MOST_SKEW_S:g} s"],
        "network": [f"{between.LEAST_GB_S['nccl']:g} GB/s", f"{between.LEAST_GB_S['gloo']:g} GB/s"],
        "same versions": [f"`{name}`" for name in software.SAME_EVERYWHERE],
    }
    missing = [(name, figure) for name, wanted in figures.items() for figure in wanted if figure not in rows[name]]
    assert missing == []
