"""What is written about the code is true of it: the reference, the examples, the links, the commands."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from imports import REPOSITORY

from tunesmith.cluster import fleet_reference
from tunesmith.cluster.fleet import FleetShape, GpuFigures, parse_fleet
from tunesmith.cluster.fleet_file import load_fleets
from tunesmith.cluster.kube import reference as kube_reference
from tunesmith.cluster.recipe import reference
from tunesmith.cluster.recipe.load import load_recipe
from tunesmith.serving import reference as serving_reference
from tunesmith.serving.config import load_config

PAGES = sorted(
    [*REPOSITORY.glob("*.md"), *(REPOSITORY / "docs").rglob("*.md"), *(REPOSITORY / "examples").rglob("*.md")]
)
RECIPES = sorted(path for path in (REPOSITORY / "examples").rglob("*.yaml") if "manifests" not in path.parts)
ON_THE_CLUSTER = "data/"
"""Where data lies that an example for a cluster reads: on the cluster's shared volume."""


def from_root(path: Path) -> str:
    return str(path.relative_to(REPOSITORY))


def test_the_recipe_reference_is_what_the_schema_says() -> None:
    written = (REPOSITORY / "docs" / "recipe.md").read_text(encoding="utf-8")
    assert written == reference.markdown(), "python -m tunesmith.cluster.recipe.reference > docs/recipe.md"


def test_the_tables_of_fleets_are_what_the_data_and_the_schema_say() -> None:
    page = (REPOSITORY / "docs" / "fleets.md").read_text(encoding="utf-8")
    tables = (fleet_reference.gpu_table(), *map(fleet_reference.key_table, (GpuFigures, FleetShape)))
    for table in tables:
        assert f"\n{table}\n" in page, "python -m tunesmith.cluster.fleet_reference"


def test_the_tables_of_serving_are_what_the_schema_says() -> None:
    page = (REPOSITORY / "docs" / "serve.md").read_text(encoding="utf-8")
    assert page.endswith(f"\n{serving_reference.markdown()}\n"), "python -m tunesmith.serving.reference"


def test_the_table_of_kubernetes_rules_is_what_is_checked() -> None:
    page = (REPOSITORY / "docs" / "kubernetes.md").read_text(encoding="utf-8")
    assert page.endswith(f"\n{kube_reference.rule_table()}\n"), "python -m tunesmith.cluster.kube.reference"


def test_the_serving_configuration_shown_is_valid(tmp_path: Path) -> None:
    page = (REPOSITORY / "docs" / "serve.md").read_text(encoding="utf-8")
    shown = tmp_path / "serve.yaml"
    shown.write_text(re.findall(r"```yaml\n(.*?)```", page, re.DOTALL)[0], encoding="utf-8")
    assert load_config(shown).agents["panel"].quorum == 3


def test_the_fleets_file_shown_is_valid(tmp_path: Path) -> None:
    page = (REPOSITORY / "docs" / "fleets.md").read_text(encoding="utf-8")
    shown = tmp_path / "fleets.yaml"
    shown.write_text(re.findall(r"```yaml\n(.*?)```", page, re.DOTALL)[0], encoding="utf-8")
    assert parse_fleet("lab", load_fleets(shown)).gpus == 8


@pytest.mark.parametrize("path", RECIPES, ids=from_root)
def test_every_example_is_a_valid_recipe_whose_data_is_there(path: Path) -> None:
    recipe = load_recipe(path)
    for source in recipe.data.train:
        assert source.path.startswith(ON_THE_CLUSTER) or (REPOSITORY / source.path).is_file()


@pytest.mark.parametrize("page", PAGES, ids=from_root)
def test_every_relative_link_leads_somewhere(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    broken = []
    for target in re.findall(r"\]\(([^)\s]+)\)|src=\"([^\"]+)\"", text):
        link, _, anchor = "".join(target).partition("#")
        if "://" in link or link.startswith("mailto:"):
            continue
        path = (page.parent / link).resolve() if link else page
        has_anchor = not anchor or path.suffix != ".md" or anchor in anchors(path)
        if not path.exists() or not has_anchor:
            broken.append("".join(target))
    assert broken == []


@pytest.mark.parametrize("page", PAGES, ids=from_root)
def test_every_whole_recipe_shown_is_valid(page: Path, tmp_path: Path) -> None:
    for number, block in enumerate(re.findall(r"```yaml\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL)):
        if not block.startswith("name:"):
            continue  # a part of a recipe
        shown = tmp_path / f"{number}.yaml"
        shown.write_text(block, encoding="utf-8")
        load_recipe(shown)


@pytest.mark.parametrize("page", PAGES, ids=from_root)
def test_every_make_target_shown_exists(page: Path) -> None:
    targets = set(re.findall(r"^([a-z-]+):", (REPOSITORY / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    shown = set(re.findall(r"(?:^|`)make ([a-z-]+)", page.read_text(encoding="utf-8"), re.MULTILINE))
    assert shown <= targets


def anchors(page: Path) -> set[str]:
    """The anchors that code hosts make from a page's headings."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_what_has_to_pass_is_the_test_command_of_the_readme_and_the_checks() -> None:
    ran = (REPOSITORY / ".ci" / "run").read_text(encoding="utf-8").splitlines()
    shown = re.findall(r"^make [a-z-]+", (REPOSITORY / "README.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert "make test" in shown
    assert {"make check", "make test"} <= set(ran)


def test_every_page_is_in_the_index() -> None:
    index = (REPOSITORY / "docs" / "index.md").read_text(encoding="utf-8")
    pages = [page.name for page in (REPOSITORY / "docs").glob("*.md") if page.name != "index.md"]
    assert [name for name in pages if f"]({name})" not in index] == []
