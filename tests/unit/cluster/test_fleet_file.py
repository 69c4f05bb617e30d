from __future__ import annotations

from pathlib import Path

import pytest

from tunesmith.cluster.errors import FleetError
from tunesmith.cluster.fleet import parse_fleet
from tunesmith.cluster.fleet_file import VARIABLE, load_fleets

NEW = "{memory_gib: 93.0, tflops: 800, memory_gb_s: 4000, link_gb_s: 64, host_gb_s: 64}"


@pytest.fixture(autouse=True)
def _no_file_of_the_user(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(VARIABLE, raising=False)


def written(folder: Path, text: str) -> Path:
    path = folder / "mine.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def test_a_file_adds_gpus_and_names_fleets(tmp_path: Path):
    path = written(
        tmp_path,
        f"gpus:\n  X9: {NEW}\nfleets:\n  lab: {{gpu: x9, nodes: 2, gpus_per_node: 4, network_gb_s: 1.25, "
        "host_memory_gib: 512, usd_per_gpu_hour: 0.5}\n",
    )
    book = load_fleets(path)
    lab = parse_fleet("LAB", book)
    assert (lab.gpus, lab.gpu.name, lab.host_memory_gib_per_gpu, lab.usd_per_hour) == (8, "X9", 128, 4.0)
    assert lab.collective_bytes_s == 1.25e9
    assert parse_fleet("8xX9", book).gpu.memory_gib == 93
    assert parse_fleet("8xH100", book).gpu.tflops == 989.4


def test_an_entry_of_a_known_gpu_changes_only_what_it_writes(tmp_path: Path):
    book = load_fleets(written(tmp_path, "gpus:\n  h100-80gb: {usd_per_hour: 2, most_per_node: 16}\n"))
    fleet = parse_fleet("16xH100", book)
    assert (fleet.gpu.name, fleet.usd_per_hour, fleet.gpu.tflops) == ("H100-80GB", 32, 989.4)


def test_the_environment_names_a_file_for_those_who_give_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv(VARIABLE, str(written(tmp_path, "fleets:\n  lab: {gpu: T4}\n")))
    assert parse_fleet("lab").gpu.name == "T4"
    other = tmp_path / "other.yaml"
    other.write_text("fleets:\n  hall: {gpu: L4}\n", encoding="utf-8")
    assert list(load_fleets(other).fleets) == ["hall"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("gpu:\n  X9: {}\n", "mine.yaml:1: gpu: no such key; did you mean gpus?"),
        ("gpus:\n  T4:\n    memory_gb: 15\n", "mine.yaml:3: gpus.T4.memory_gb: no such key; did you mean memory_gib?"),
        ("gpus:\n  X9: {tflops: 5}\n", "mine.yaml:2: gpus.X9.memory_gib: missing; a GPU needs it"),
        ("gpus:\n  T4: {tflops: fast}\n", "mine.yaml:2: gpus.T4.tflops: input should be a valid number, not 'fast'"),
        ("gpus:\n  T4: {tflops: -1}\n", "gpus.T4.tflops: input should be greater than 0, not -1"),
        ("gpus:\n  T4: {tflops: yes}\n", "gpus.T4.tflops: input should be a valid number, not True"),
        ("gpus:\n  T4: {tflops: .inf}\n", "gpus.T4.tflops: input should be a finite number, not inf"),
        ("gpus:\n  T4: {name: T5}\n", "gpus.T4.name: no such key"),
        ("gpus:\n  T4: 15\n", "mine.yaml:2: gpus.T4: a section of keys (memory_gib, tflops, "),
        ("gpus: [T4]\n", "mine.yaml:1: gpus: a section of names, not ['T4']"),
        ("fleets:\n  lab: {nodes: 2}\n", "mine.yaml:2: fleets.lab.gpu: missing; a fleet needs it"),
        ("fleets:\n  lab: {gpu: T4, node: 2}\n", "fleets.lab.node: no such key; did you mean nodes?"),
        ("fleets:\n  lab: {gpu: A100}\n", "fleets.lab: A100 is made in 2 sizes of memory"),
        ("fleets:\n  lab: {gpu: H100, gpus_per_node: 9}\n", "fleets.lab: lab: 9 H100-80GB in one node"),
        ("gpus:\n  T4: {tflops: 1}\n  T4: {tflops: 2}\n", "mine.yaml:3: gpus.T4 is written twice, first on line 2"),
        ("gpus: {", "not valid YAML"),
        ("", "a fleets file is a mapping of keys such as gpus and fleets"),
    ],
)
def test_a_mistake_is_answered_with_its_line_and_the_nearest_key(tmp_path: Path, text: str, message: str):
    with pytest.raises(FleetError) as error:
        load_fleets(written(tmp_path, text))
    assert message in str(error.value)
    assert error.value.exit_code == 2


def test_all_mistakes_are_told_at_once(tmp_path: Path):
    with pytest.raises(FleetError, match="3 mistakes in"):
        load_fleets(written(tmp_path, "gpus:\n  T4: {tflops: x, speed: 1}\nfleet: {}\n"))


def test_a_file_that_is_not_there_is_an_error_with_the_nearest_name(tmp_path: Path):
    written(tmp_path, "gpus: {}\n")
    with pytest.raises(FleetError, match=r"Did you mean .*mine\.yaml"):
        load_fleets(tmp_path / "mime.yaml")
