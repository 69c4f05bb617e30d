from __future__ import annotations

import pytest

from tunesmith.cluster.errors import FleetError
from tunesmith.cluster.fleet import GIB, MOST_GPUS, Gpu, parse_fleet
from tunesmith.cluster.fleet_file import BUILT_IN, load_fleets

KNOWN = load_fleets(BUILT_IN)


@pytest.mark.parametrize(
    ("text", "nodes", "per_node", "gpu"),
    [
        ("8xH100-80GB", 1, 8, "H100-80GB"),
        ("2x8xA100-80GB", 2, 8, "A100-80GB"),
        ("1xRTX4090", 1, 1, "RTX4090"),
        ("1xL40S", 1, 1, "L40S-48GB"),
        ("T4", 1, 1, "T4"),
        (" 2 X 8 x a100 80g ", 2, 8, "A100-80GB"),
        ("4*geforce rtx 3090", 1, 4, "RTX3090"),
    ],
)
def test_a_fleet_is_read_as_nodes_gpus_and_kind(text: str, nodes: int, per_node: int, gpu: str):
    fleet = parse_fleet(text, KNOWN)
    assert (fleet.nodes, fleet.gpus_per_node, fleet.gpu.name) == (nodes, per_node, gpu)
    assert fleet.gpus == nodes * per_node


@pytest.mark.parametrize(
    "name", ["h200", "H200", "H200-141GB", "h200 141 gb", "NVIDIA H200", "h200-sxm5", "H200_141GB"]
)
def test_case_dashes_makers_and_an_unambiguous_memory_size_do_not_matter(name: str):
    assert parse_fleet(name, KNOWN).gpu.name == "H200-141GB"


@pytest.mark.parametrize(
    ("name", "gpu"), [("RTX 4090 24GB", "RTX4090"), ("b200-192", "B200-180GB"), ("A6000", "A6000-48GB")]
)
def test_other_names_are_understood(name: str, gpu: str):
    assert parse_fleet(name, KNOWN).gpu.name == gpu


def test_every_gpu_is_found_by_its_name_and_by_what_its_driver_calls_it():
    for gpu in KNOWN.gpus.values():
        assert parse_fleet(f"1x{gpu.name}", KNOWN).gpu is gpu
        assert all(parse_fleet(name, KNOWN).gpu is gpu for name in gpu.also)
    names = [name for gpu in KNOWN.gpus.values() for name in gpu.driver_names]
    assert len(names) == len(set(names))


def test_a_name_that_fits_two_sizes_is_refused_with_both():
    with pytest.raises(FleetError) as error:
        parse_fleet("8xA100", KNOWN)
    assert error.value.fix == "Write A100-40GB or A100-80GB."
    assert error.value.exit_code == 2


def test_an_unknown_gpu_is_refused_with_the_nearest_names_and_the_way_to_add_one():
    with pytest.raises(FleetError, match="no GPU is known as H10O") as error:
        parse_fleet("8xH10O", KNOWN)
    assert "H100-80GB" in error.value.fix
    assert "docs/fleets.md" in error.value.fix
    with pytest.raises(FleetError, match="Known are T4"):
        parse_fleet("quux", KNOWN)


@pytest.mark.parametrize(
    ("text", "message", "advice"),
    [
        ("0xH100", "1 nodes × 0 GPUs is no fleet", "1xH100-80GB"),
        ("0x8xH100", "0 nodes × 8 GPUs is no fleet", "1xH100-80GB"),
        ("-2xT4", "-2 GPUs is no fleet", "1xT4"),
        ("16xH100", "the largest there is holds 8", "2x8xH100-80GB"),
        ("3000xH100", "3000 H100-80GB in one node", "375x8xH100-80GB"),
        ("5000x8xH100", "5000 nodes × 8 = 40000 GPUs", "2048x8xH100-80GB"),
        ("  ", "a fleet is empty", "8xH100-80GB"),
    ],
)
def test_a_shape_that_no_machine_has_is_refused_with_the_numbers_and_one_that_is(text: str, message: str, advice: str):
    with pytest.raises(FleetError, match=message) as error:
        parse_fleet(text, KNOWN)
    assert advice in error.value.fix
    parse_fleet(advice, KNOWN)


def test_the_largest_fleets_are_accepted():
    assert parse_fleet("16xA100-40GB", KNOWN).gpus == 16
    assert parse_fleet("2048x8xH100", KNOWN).gpus == MOST_GPUS


def test_a_collective_is_as_fast_as_its_slowest_hop():
    assert parse_fleet("8xA100-80GB", KNOWN).collective_bytes_s == 300e9
    assert parse_fleet("2x8xA100-80GB", KNOWN).collective_bytes_s == 50e9
    assert parse_fleet("4x1xRTX4090", KNOWN).collective_bytes_s == 1.25e9


def test_the_units_of_a_gpu_are_what_its_properties_say():
    a100 = KNOWN.gpus["A100-80GB"]
    assert a100.flops == 312e12
    assert a100.memory_bytes == int(79.15 * GIB)
    assert parse_fleet("2x8xA100-80GB", KNOWN).usd_per_hour == pytest.approx(16 * 3.43)
    assert parse_fleet("8xRTX4090", KNOWN).usd_per_hour is None


@pytest.mark.parametrize("gpu", KNOWN.gpus.values(), ids=lambda gpu: gpu.name)
def test_figures_are_in_the_units_they_say(gpu: Gpu):
    """A figure in the wrong unit, or one printed with sparsity, falls out of what devices of these years can do."""
    assert 14 < gpu.memory_gib < 300
    assert 60 < gpu.tflops < 3000
    assert 300 <= gpu.memory_gb_s <= 8000
    assert 15 < gpu.tflops * 1e3 / gpu.memory_gb_s < 420, "operations a byte"
    assert gpu.host_gb_s <= gpu.link_gb_s or gpu.name.startswith("GH200")
    boxed = [int(name.rpartition("-")[2].removesuffix("GB")) for name in [gpu.name, *gpu.also] if name.endswith("GB")]
    assert boxed
    assert all(0.9 * size < gpu.memory_gib <= 1.001 * size for size in boxed)
