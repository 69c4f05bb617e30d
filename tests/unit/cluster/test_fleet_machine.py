from __future__ import annotations

import os
from pathlib import Path

import pytest

from tunesmith.cluster.errors import FleetError
from tunesmith.cluster.fleet import parse_fleet
from tunesmith.cluster.fleet_file import BUILT_IN, load_fleets
from tunesmith.cluster.fleet_machine import measured_flops, of_cpus, of_gpus
from tunesmith.cluster.resources import Node, this_machine

KNOWN = load_fleets(BUILT_IN)


def test_gpus_are_known_by_what_their_driver_calls_them():
    fleet = of_gpus(
        Node(64, gpus=2, memory_gib=500), "NVIDIA A100-SXM4-80GB, 81920\nNVIDIA A100-SXM4-80GB, 81920\n", KNOWN
    )
    assert (fleet.gpus, fleet.gpu.name, fleet.gpu.memory_gib, fleet.host_memory_gib_per_gpu) == (
        2,
        "A100-80GB",
        79.15,
        250,
    )


def test_a_driver_that_reports_less_memory_is_believed():
    assert of_gpus(Node(8, gpus=1), "Tesla T4, 13312", KNOWN).gpu.memory_gib == 13


def test_gpus_of_two_kinds_are_refused():
    with pytest.raises(FleetError, match=r"2 kinds \(NVIDIA L4, Tesla T4\)"):
        of_gpus(Node(8, gpus=2), "Tesla T4, 15360\nNVIDIA L4, 23034\n", KNOWN)


def test_a_gpu_that_is_not_in_the_table_is_refused_with_the_line_to_add():
    with pytest.raises(FleetError, match=r"'NVIDIA X9' \(8\.0 GiB\)") as error:
        of_gpus(Node(8, gpus=1), "NVIDIA X9, 8192\n", KNOWN)
    assert "driver_names: [NVIDIA X9]" in error.value.fix


def test_workers_without_gpus_share_cores_and_memory():
    one, two = (of_cpus(Node(4, memory_gib=16), workers, 200e9) for workers in (1, 2))
    assert (one.gpus, one.gpu.memory_gib, one.gpu.flops, one.gpu.is_cpu) == (1, 16, 200e9, True)
    assert (two.gpus, two.gpu.memory_gib, two.gpu.flops, two.host_memory_gib_per_gpu) == (2, 8, 100e9, 8)
    assert two.gpu.name == "CPU (2 of 4 cores)"


@pytest.mark.skipif(os.path.exists("/dev/nvidia0"), reason="has a GPU")
def test_this_machine_is_its_cores_and_free_memory():
    fleet = parse_fleet("this machine", KNOWN, workers=2)
    assert fleet.gpus == 2
    assert fleet.gpu.is_cpu
    assert fleet.gpu.memory_gib == pytest.approx(this_machine().memory_gib / 2, rel=0.2)


def test_the_measured_rate_is_one_that_cores_can_have():
    assert 1e9 < measured_flops(0.02) < 1e14


def test_gpus_whose_driver_is_silent_are_an_error(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    from tunesmith.cluster import fleet_machine

    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(fleet_machine, "this_machine", lambda: Node(8, gpus=1))
    with pytest.raises(FleetError, match="nvidia-smi does not say which"):
        parse_fleet("this machine", KNOWN)
