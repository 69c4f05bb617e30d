"""What `tunesmith k8s validate` reads: files, lists, folders, and kustomizations, each by itself."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml
from manifests import job

from tunesmith.cluster.errors import UsageError
from tunesmith.cluster.kube import check, output

HAS_KUSTOMIZE = any(shutil.which(words[0]) for words in check.KUSTOMIZE)
LIST = {"apiVersion": "v1", "kind": "List"}


def rules(*paths: Path) -> list[str]:
    sources, _ = check.sources(paths)
    return [finding.rule for source in sources for finding in check.check_documents(source)]


def written(path: Path, *documents: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(yaml.safe_dump_all(documents))
    return path


def test_the_items_of_a_list_are_documents(tmp_path: Path) -> None:
    wrong = {**job(), "kind": "RayJobs"}
    listed = written(tmp_path / "list.yaml", {**LIST, "metadata": {}, "items": [job(), wrong]})
    assert rules(listed) == ["schema.kind"]
    assert [document["kind"] for _, document in check.read([listed])] == ["RayJob", "RayJobs"]
    with pytest.raises(UsageError, match="document 1 is no mapping but 'pod'"):
        check.read([written(tmp_path / "odd.yaml", {**LIST, "items": ["pod"]})])


@pytest.mark.skipif(not HAS_KUSTOMIZE, reason="neither kubectl nor kustomize is here")
@pytest.mark.parametrize("name", check.KUSTOMIZATIONS)
def test_kustomizations_below_a_folder_are_built_each_by_itself(tmp_path: Path, name: str) -> None:
    for folder in ("a", "b"):
        output.write([job()], tmp_path / folder)
        (tmp_path / folder / "kustomization.yaml").rename(tmp_path / folder / name)
        written(tmp_path / folder / "patch.yaml", [{"op": "remove", "path": "/spec"}])
    assert rules(tmp_path) == rules(tmp_path / "a", tmp_path / "b") == rules(tmp_path / "a" / name) == []
    assert len(check.sources([tmp_path, tmp_path / "a"])[0]) == 2, "none is read twice"


def test_one_thing_in_two_files_is_there_twice(tmp_path: Path) -> None:
    first, second = written(tmp_path / "a.yaml", job()), written(tmp_path / "in" / "b.yaml", job())
    assert rules(first, second) == rules(tmp_path) == ["core.twice"]


def test_a_folder_may_hold_other_files_and_they_are_named(tmp_path: Path) -> None:
    written(tmp_path / "job.yaml", job())
    recipe, patch = written(tmp_path / "recipe.yaml", {"name": "bot"}), written(tmp_path / "z.yml", [{"op": "add"}])
    sources, others = check.sources([tmp_path])
    assert [len(source) for source in sources] == [1]
    assert others == [str(recipe), str(patch)]
    assert rules(recipe) == ["schema.kind"], "a file that is named is meant to be a manifest"


def test_a_manifest_without_a_kind_is_none_that_is_left_out(tmp_path: Path) -> None:
    document = {key: value for key, value in job().items() if key != "kind"}
    assert rules(written(tmp_path / "job.yaml", document).parent) == ["schema.kind"]


@pytest.mark.parametrize("text", ["a: {b: 1, c: 2, b: 3}", "- a: 1\n  a: 1", '{"a": 1, "a": 2}', "? a\n: 1\n'a': 2"])
def test_a_key_twice_in_one_mapping_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match=r"^it\.yaml: not valid YAML: \w is written twice in one mapping.* line \d"):
        check.load(text, "it.yaml")


def test_keys_of_other_mappings_and_merged_ones_may_be_the_same() -> None:
    text = "base: &base {a: 1, b: 2}\nmore: &more {<<: *base, b: 3}\nmost: {<<: [*more, *base], c: 4}\n---\nbase: 1\n"
    merged, other = check.load(text, "it.yaml")
    assert merged["most"] == {"a": 1, "b": 3, "c": 4}
    assert other == {"base": 1}
