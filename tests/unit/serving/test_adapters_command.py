"""`tunesmith adapters` as a shell sees it: data on standard output, mistakes with the nearest name and exit code 2."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import tiny_adapters

from tunesmith.cluster.errors import UsageError
from tunesmith.serving import adapters_command
from tunesmith.serving.registry import Registry


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    registry = Registry(str(tmp_path / "registry"))
    for seed, alias in enumerate(("prod", "canary")):
        registry.add("support", tiny_adapters.artifact(tmp_path / f"artifact-{seed}", seed), alias=alias)
    return tmp_path


def adapters(folder: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "tunesmith.cluster.main", "adapters", *arguments],
        capture_output=True,
        text=True,
        cwd=folder,
        env={**os.environ, **environment},
        timeout=60,
    )


def digests(folder: Path) -> list[str]:
    return [version.digest for version in Registry(str(folder / "registry")).read()[1].adapter("support").versions]


def as_json(done: subprocess.CompletedProcess[str]) -> dict:
    assert done.returncode == 0, done.stderr
    (line,) = done.stdout.splitlines()
    return json.loads(line)


def test_a_life_in_json(folder: Path) -> None:
    one, two = digests(folder)
    tiny_adapters.artifact(folder / "artifact-2", 2)
    added = as_json(adapters(folder, "add", "support", "artifact-2", "--json"))
    assert (added["new"], added["aliases"], added["generation"]) == (True, [], 3)
    split = as_json(
        adapters(folder, "split", "support", "prod", f"{one[:6]}=90", f"{two[:6]}=10", "--shadow", one[:6], "--json")
    )
    assert split["routes"] == [{"digest": one, "weight": 90}, {"digest": two, "weight": 10}]
    assert split["shadow"] == one
    moved = as_json(adapters(folder, "alias", "support", "prod", added["digest"], "--if-generation", "4", "--json"))
    assert moved["routes"] == [{"digest": added["digest"], "weight": 1}]
    assert as_json(adapters(folder, "rollback", "support", "prod", "--json"))["routes"] == split["routes"]
    assert as_json(adapters(folder, "remove", "support", added["digest"][:6], "--json"))["generation"] == 7
    shown = as_json(adapters(folder, "list", "--json"))
    assert shown["generation"] == 7
    assert sorted(shown["adapters"]["support"]["aliases"]) == ["canary", "prod"]


MISTAKES = {
    "suport": (("rollback", "suport", "prod"), "there is no adapter 'suport'\nDid you mean support?"),
    "alias": (("rollback", "support", "canari"), "there is no alias of support 'canari'\nDid you mean canary?"),
    "version": (("alias", "support", "prod", "feedbeef"), "there is no version of support 'feedbeef'\nThere are: "),
    "generation": (
        ("alias", "support", "prod", "feed", "--if-generation", "1"),
        "generation 1 was expected, and 2 is there",
    ),
    "weight": (("split", "support", "prod", "feedbeef"), "'feedbeef': expected VERSION=WEIGHT"),
    "artifact": (("add", "support", "nowhere"), "nowhere: No such file or directory"),
    "base": (("add", "support", "artifact-0", "--base", "./nowhere"), "there is no folder './nowhere'"),
    "store": (("list", "--registry", "ftp://host"), "ftp cannot create a file only when there is none"),
}


@pytest.mark.parametrize("kind", MISTAKES)
def test_a_mistake_exits_2_in_words_and_changes_nothing(folder: Path, kind: str) -> None:
    arguments, words = MISTAKES[kind]
    done = adapters(folder, *arguments)
    assert done.returncode == 2
    assert words in done.stderr
    assert "Traceback" not in done.stderr
    assert done.stdout == ""
    assert Registry(str(folder / "registry")).read()[0] == 2


def test_the_registry_is_named_by_the_environment_too(folder: Path) -> None:
    (folder / "elsewhere").mkdir()
    shown = adapters(folder / "elsewhere", "list", "--json", TUNESMITH_REGISTRY=str(folder / "registry"))
    assert list(as_json(shown)["adapters"]) == ["support"]


def test_the_table_shows_shares_shadows_and_idle_versions(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = str(folder / "registry")
    one, two = digests(folder)
    adapters_command.split(root, "support", "prod", [f"{one}=9", f"{two}=1"], two, None, False)
    shown = capsys.readouterr()
    assert "support@prod is moved (generation 3)" in shown.err
    rows = shown.out.splitlines()
    assert any(row.split() == [one[:12], "LORA", "4", "ba5eba5e", *row.split()[4:8], "prod", "90", "%"] for row in rows)
    assert all(words in shown.out for words in ("prod 10 %", "prod (shadow)", "canary"))
    adapters_command.remove(root, "support", "canary", None, False)
    adapters_command.alias(root, "support", "prod", one, None, False)
    assert any(two[:12] in row and row.rstrip().endswith("–") for row in capsys.readouterr().out.splitlines())


def test_the_last_version_takes_its_name_along(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = str(folder / "registry")
    for what in ("prod", "canary", *digests(folder)):
        adapters_command.remove(root, "support", what, None, False)
    assert "and the name with it" in capsys.readouterr().err
    adapters_command.show(root, None, False)
    shown = capsys.readouterr()
    assert "holds no adapter yet" in shown.err
    assert shown.out == ""


def test_one_version_is_not_given_two_weights(folder: Path) -> None:
    one, _ = digests(folder)
    with pytest.raises(UsageError, match="stands twice"):
        adapters_command.split(str(folder / "registry"), "support", "prod", [f"{one}=9", f"{one}=1"], None, None, False)
