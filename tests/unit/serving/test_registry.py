"""Versions that are whole or not there, names that move atomically, and what is left after a kill."""

from __future__ import annotations

import json
import multiprocessing
import os
import subprocess
import sys
import uuid
from pathlib import Path

import pytest
import tiny_adapters

from tunesmith.cluster.artifacts import verify
from tunesmith.cluster.errors import AdapterError, MovedError, RegistryError, StorageError
from tunesmith.serving.catalog import Resolved
from tunesmith.serving.checks import Rules
from tunesmith.serving.registry import Registry


@pytest.fixture(params=["folder", "memory"])
def registry(request: pytest.FixtureRequest, tmp_path: Path) -> Registry:
    return Registry(str(tmp_path / "registry") if request.param == "folder" else f"memory://{uuid.uuid4().hex}")


@pytest.fixture
def local(tmp_path: Path) -> Registry:
    return Registry(str(tmp_path / "registry"))


def _add(registry: Registry, folder: Path, seed: int, name: str = "support") -> str:
    made = folder / f"artifact-{seed}"
    return registry.add(name, made if made.exists() else tiny_adapters.artifact(made, seed)).digest


def _asked(registry: Registry, model: str, user: str | None = None) -> Resolved:
    generation, catalog = registry.read()
    return catalog.resolve(generation, model, user, "a request")


def _files(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


def test_the_first_version_of_a_name_is_what_the_name_means(registry: Registry, tmp_path: Path) -> None:
    added = registry.add("support", tiny_adapters.artifact(tmp_path / "a"))
    assert (added.aliases, added.generation, added.new) == (("prod",), 1, True)
    for model in ("support", "support@prod", f"support@{added.digest[:12]}", f"support@{added.digest}"):
        resolved = _asked(registry, model)
        assert (resolved.digest, resolved.generation, resolved.base_digest) == (
            added.digest,
            1,
            tiny_adapters.BASE_DIGEST,
        )


def test_a_version_is_named_by_its_content_wherever_it_comes_from(registry: Registry, tmp_path: Path) -> None:
    one = registry.add("one", tiny_adapters.artifact(tmp_path / "a"))
    other = registry.add("two", tiny_adapters.artifact(tmp_path / "b", run="another run"))
    third = registry.add("two", tiny_adapters.artifact(tmp_path / "c", seed=1))
    assert one.digest == other.digest != third.digest
    assert (third.aliases, _asked(registry, "two").digest) == ((), one.digest), "later versions wait to be asked for"


def test_adding_the_same_again_changes_nothing(registry: Registry, tmp_path: Path) -> None:
    first = registry.add("support", tiny_adapters.artifact(tmp_path / "a"))
    again = registry.add("support", tmp_path / "a")
    assert (again.digest, again.generation, again.new) == (first.digest, first.generation, False)


def test_what_is_fetched_is_what_was_added_without_what_people_read(registry: Registry, tmp_path: Path) -> None:
    source = tiny_adapters.artifact(tmp_path / "a")
    digest = registry.add("support", source).digest
    copy = registry.fetch(digest, tmp_path / "cache")
    assert copy == tmp_path / "cache" / digest
    assert _files(copy) == [
        "MANIFEST.json",
        "adapter_config.json",
        "adapter_model.safetensors",
        "chat_template.jinja",
        "receipts/parity.json",
        "tokenizer_config.json",
    ]
    for name in verify(copy).files:
        assert (copy / name).read_bytes() == (source / name).read_bytes()
    assert verify(copy).about["made"]["run"] == "bot"


def test_a_damaged_copy_is_made_again(registry: Registry, tmp_path: Path) -> None:
    digest = _add(registry, tmp_path, 0)
    copy = registry.fetch(digest, tmp_path / "cache")
    (copy / "adapter_config.json").write_text("{}")
    assert json.loads((registry.fetch(digest, tmp_path / "cache") / "adapter_config.json").read_text())["r"] == 4


def test_a_damaged_version_is_never_fetched_and_adding_it_again_heals_it(local: Registry, tmp_path: Path) -> None:
    digest = _add(local, tmp_path, 0)
    stored = Path(local.root) / "versions" / digest / "adapter_config.json"
    stored.write_text("{}")
    with pytest.raises(StorageError, match=r"adapter_config\.json: 2 bytes"):
        local.fetch(digest, tmp_path / "cache")
    assert not list((tmp_path / "cache").iterdir())
    _add(local, tmp_path, 0)
    local.fetch(digest, tmp_path / "cache")


def test_a_version_swapped_for_another_is_never_fetched(local: Registry, tmp_path: Path) -> None:
    one, two = _add(local, tmp_path, 0), _add(local, tmp_path, 1)
    versions = Path(local.root) / "versions"
    (versions / two).rename(versions / "away")
    (versions / one).rename(versions / two)
    with pytest.raises(StorageError, match="the manifest of another version"):
        local.fetch(two, tmp_path / "cache")


@pytest.mark.parametrize("digest", ["", "../../etc", "a" * 63, "A" * 64, "a" * 64 + "\n"])
def test_only_a_digest_is_fetched(local: Registry, tmp_path: Path, digest: str) -> None:
    with pytest.raises(RegistryError, match="no digest of a version"):
        local.fetch(digest, tmp_path / "cache")


def test_an_upload_without_its_manifest_is_invisible(registry: Registry, tmp_path: Path) -> None:
    digest = "ab" * 32
    registry._log._store.create(f"versions/{digest}/adapter_config.json", b"{}")
    with pytest.raises(RegistryError, match="holds no whole version"):
        registry.fetch(digest, tmp_path / "cache")
    assert registry.read()[1].adapters == {}


def test_moves_splits_and_rollbacks_are_read_by_a_registry_opened_later(registry: Registry, tmp_path: Path) -> None:
    one, two = _add(registry, tmp_path, 0), _add(registry, tmp_path, 1)
    registry.move("support", "prod", two[:8])
    registry.split("support", "canary", {one: 90, two: 10}, shadow=two)
    again = Registry(registry.root)
    assert again.read() == registry.read()
    assert _asked(again, "support").digest == two
    chosen = [_asked(again, "support@canary", f"user {n}") for n in range(300)]
    assert {resolved.shadow for resolved in chosen} == {two}
    assert 10 <= sum(resolved.digest == two for resolved in chosen) <= 60
    again.rollback("support", "prod")
    assert _asked(registry, "support").digest == one
    with pytest.raises(RegistryError, match="has led nowhere else"):
        registry.rollback("support", "prod")


def test_a_move_from_what_is_no_longer_there_is_refused(registry: Registry, tmp_path: Path) -> None:
    one, two = _add(registry, tmp_path, 0), _add(registry, tmp_path, 1)
    seen = registry.read()[0]
    registry.move("support", "prod", two, expected=seen)
    with pytest.raises(MovedError, match=f"generation {seen} was expected, and {seen + 1} is there"):
        registry.move("support", "prod", one, expected=seen)
    assert _asked(registry, "support").digest == two


def test_a_version_in_use_stays_and_one_that_nobody_has_goes_with_its_files(registry: Registry, tmp_path: Path) -> None:
    one, two = _add(registry, tmp_path, 0), _add(registry, tmp_path, 1)
    _add(registry, tmp_path, 1, "other")
    with pytest.raises(RegistryError, match=f"version {one[:12]} is where prod leads"):
        registry.remove("support", one)
    registry.remove("support", two[:6])
    registry.fetch(two, tmp_path / "cache")
    registry.remove("other", "prod")
    registry.remove("other", two)
    assert list(registry.read()[1].adapters) == ["support"]
    with pytest.raises(RegistryError, match="holds no whole version"):
        registry.fetch(two, tmp_path / "elsewhere")
    registry.fetch(one, tmp_path / "elsewhere")


def test_what_is_removed_while_it_is_added_is_there_in_the_end(
    registry: Registry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    digest = _add(registry, tmp_path, 0)
    registry.remove("support", "prod")
    slow, update = Registry(registry.root), Registry._update
    removed = []

    def late(self: Registry, *arguments: object) -> object:
        if not removed:
            removed.append(registry)
            monkeypatch.setattr(Registry, "_update", update)
            registry.remove("support", digest)
        return update(self, *arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(Registry, "_update", late)
    slow.add("other", tmp_path / "artifact-0")
    assert removed
    registry.fetch(digest, tmp_path / "cache")


def test_files_that_came_into_use_while_they_were_hidden_come_back(local: Registry, tmp_path: Path) -> None:
    digest = _add(local, tmp_path, 0)
    local._versions.discard(digest, lambda: True)
    local.fetch(digest, tmp_path / "cache")
    local._versions.discard(digest, lambda: False)
    assert not list((Path(local.root) / "versions").iterdir())


def test_a_name_of_another_tenant_is_not_taken_over(registry: Registry, tmp_path: Path) -> None:
    registry.add("support", tiny_adapters.artifact(tmp_path / "a"), owner="acme")
    with pytest.raises(RegistryError, match="support belongs to acme, not to globex"):
        registry.add("support", tiny_adapters.artifact(tmp_path / "b", seed=1), owner="globex")
    assert registry.add("support", tmp_path / "b").new
    assert registry.read()[1].adapter("support").owner == "acme"


def test_the_same_files_for_another_base_are_refused(registry: Registry, tmp_path: Path) -> None:
    folder = tiny_adapters.plain(tmp_path / "a")
    registry.add("support", folder, rules=Rules(base_digest="a" * 64))
    with pytest.raises(RegistryError, match="was added for base aaaaaaaaaaaa…, and now for bbbbbbbbbbbb…"):
        registry.add("support", folder, rules=Rules(base_digest="b" * 64))


def test_what_is_refused_leaves_nothing_behind(local: Registry, tmp_path: Path) -> None:
    folder = tiny_adapters.plain(tmp_path / "a")
    with pytest.raises(AdapterError, match=r"no MANIFEST\.json says which base"):
        local.add("support", folder)
    assert _files(Path(local.root)) == []


STOPS = {
    "while the files are copied": "tunesmith.serving.registry.seal",
    "before the folder is renamed": "tunesmith.serving.versions.commit_once",
    "before the name is given": "tunesmith.serving.registry.StateLog.update",
}


@pytest.mark.parametrize("stop", STOPS)
def test_killed_in_the_middle_of_an_add_nothing_is_visible_and_the_next_one_works(
    local: Registry, tmp_path: Path, stop: str
) -> None:
    one = _add(local, tmp_path, 0)
    tiny_adapters.artifact(tmp_path / "artifact-1", 1)
    module, _, name = STOPS[stop].rpartition(".")
    code = (
        "import os, pkgutil, sys\nfrom pathlib import Path\nfrom tunesmith.serving.registry import Registry\n"
        f"setattr(pkgutil.resolve_name({module!r}), {name!r}, lambda *_: os.kill(os.getpid(), 9))\n"
        "Registry(sys.argv[1]).add('support', Path(sys.argv[2]), alias='prod')"
    )
    run = [sys.executable, "-c", code, local.root, str(tmp_path / "artifact-1")]
    assert subprocess.run(run, check=False).returncode == -9
    assert [version.digest for version in local.read()[1].adapter("support").versions] == [one]
    assert _asked(local, "support").digest == one
    for left in (Path(local.root) / "versions").glob("*.tmp-*"):
        os.utime(left, (0, 0))
    two = _add(local, tmp_path, 1)
    local.fetch(two, tmp_path / "cache")
    assert sorted(os.listdir(Path(local.root) / "versions")) == sorted([one, two])


def _move_often(root: str, digests: list[str], times: int) -> None:
    registry, done = Registry(root), 0
    while done < times:
        generation, catalog = registry.read()
        now = catalog.alias("support", "prod").routes[0].digest
        try:
            registry.move("support", "prod", digests[(digests.index(now) + 1) % len(digests)], expected=generation)
            done += 1
        except MovedError:
            continue


def test_of_eight_processes_that_move_an_alias_each_move_follows_the_one_it_saw(
    local: Registry, tmp_path: Path
) -> None:
    digests = [_add(local, tmp_path, seed) for seed in range(3)]
    began = local.read()[0]
    context = multiprocessing.get_context("fork")
    racers = [context.Process(target=_move_often, args=(local.root, digests, 6)) for _ in range(8)]
    for racer in racers:
        racer.start()
    for racer in racers:
        racer.join(60)
    assert [racer.exitcode for racer in racers] == [0] * 8
    assert local.read()[0] == began + 48
    assert _asked(local, "support").digest == digests[48 % 3]
    led = [target.routes[0].digest for target in local.read()[1].alias("support", "prod").previous]
    assert [digests.index(digest) for digest in led] == [(48 - 20 + n) % 3 for n in range(20)]


def _fetch(root: str, digest: str, cache: Path) -> None:
    verify(Registry(root).fetch(digest, cache))


def test_eight_processes_fetch_and_add_at_once(local: Registry, tmp_path: Path) -> None:
    digest = _add(local, tmp_path, 0)
    tiny_adapters.artifact(tmp_path / "artifact-1", 1)
    context = multiprocessing.get_context("fork")
    racers = [context.Process(target=_fetch, args=(local.root, digest, tmp_path / "cache")) for _ in range(4)]
    racers += [context.Process(target=_add, args=(local, tmp_path, 1)) for _ in range(4)]
    for racer in racers:
        racer.start()
    for racer in racers:
        racer.join(60)
    assert [racer.exitcode for racer in racers] == [0] * 8
    assert os.listdir(tmp_path / "cache") == [digest]
    assert len(os.listdir(Path(local.root) / "versions")) == 2


def test_a_damaged_newest_state_falls_back_to_the_one_before(local: Registry, tmp_path: Path) -> None:
    one, two = _add(local, tmp_path, 0), _add(local, tmp_path, 1)
    generation = local.move("support", "prod", two)
    (Path(local.root) / "state" / f"{generation:012d}.json").write_text("{")
    assert _asked(local, "support").digest == one
    local.move("support", "prod", two)
    assert _asked(local, "support").digest == two
