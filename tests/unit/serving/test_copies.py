"""A machine's copies of versions: the least recently used leaves, never one that any process uses."""

from __future__ import annotations

import asyncio
import fcntl
import os
import shutil
from contextlib import AsyncExitStack
from pathlib import Path

import pytest
import tiny_adapters

from tunesmith.cluster.errors import RequestError
from tunesmith.serving.copies import Copies
from tunesmith.serving.engines.protocol import Version
from tunesmith.serving.registry import Registry


@pytest.fixture
def registry(tmp_path: Path) -> Registry:
    return Registry(str(tmp_path / "registry"))


@pytest.fixture
def versions(registry: Registry, tmp_path: Path) -> list[Version]:
    made = [tiny_adapters.artifact(tmp_path / f"artifact-{seed}", seed) for seed in range(4)]
    return [Version(registry.add("support", folder).digest, "") for folder in made]


def copies(registry: Registry, tmp_path: Path, most: float) -> Copies:
    """Copies with room for `most` of the versions above."""
    stored = next((tmp_path / "registry" / "versions").iterdir())
    return Copies(registry, tmp_path / "cache", most * sum(f.stat().st_size for f in stored.rglob("*") if f.is_file()))


async def use(at: Copies, version: Version) -> None:
    async with at.of(version) as local:
        assert local is not None
        assert (Path(local.folder) / "adapter_model.safetensors").is_file()


def kept(tmp_path: Path) -> set[str]:
    return {path.name for path in (tmp_path / "cache").iterdir()}


def test_the_least_recently_used_copy_leaves_and_comes_back(
    registry: Registry, versions: list[Version], tmp_path: Path
) -> None:
    at = copies(registry, tmp_path, 2.5)

    async def main() -> None:
        for step, index in enumerate((0, 1, 0, 2)):
            await use(at, versions[index])
            os.utime(tmp_path / "cache" / versions[index].digest, (step, step))
        assert kept(tmp_path) == {versions[0].digest, versions[2].digest}
        await use(at, versions[1])
        assert kept(tmp_path) == {versions[1].digest, versions[2].digest}

    asyncio.run(main())


def test_a_copy_in_use_stays_whoever_uses_it(registry: Registry, versions: list[Version], tmp_path: Path) -> None:
    here, elsewhere = (copies(registry, tmp_path, 0.5) for _ in range(2))

    async def main() -> None:
        async with AsyncExitStack() as stack:
            await stack.enter_async_context(here.of(versions[0]))
            await stack.enter_async_context(elsewhere.of(versions[1]))
            await use(here, versions[2])
            assert kept(tmp_path) == {one.digest for one in versions[:3]}
        await use(here, versions[3])
        assert kept(tmp_path) == {versions[3].digest}
        await use(elsewhere, versions[1])
        assert kept(tmp_path) == {versions[1].digest}

    asyncio.run(main())


def test_many_at_once_in_too_little_room_all_have_their_copy(
    registry: Registry, versions: list[Version], tmp_path: Path
) -> None:
    here, elsewhere = (copies(registry, tmp_path, 1.5) for _ in range(2))

    async def many(at: Copies, first: int) -> None:
        for step in range(20):
            await use(at, versions[(first + step) % len(versions)])

    async def main() -> None:
        await asyncio.gather(*(many(at, first) for at in (here, elsewhere) for first in range(4)))

    asyncio.run(main())


def test_a_version_that_is_nowhere_is_refused_each_time(registry: Registry, tmp_path: Path) -> None:
    async def main() -> None:
        at = Copies(registry, tmp_path / "cache", 1)
        for _ in range(2):
            with pytest.raises(RequestError, match="cannot be read") as refused:
                await use(at, Version("0" * 64, ""))
            assert refused.value.status == 503

    asyncio.run(main())


def test_a_copy_that_is_being_removed_is_not_taken_into_use(
    registry: Registry, versions: list[Version], tmp_path: Path
) -> None:
    at, folder = copies(registry, tmp_path, 4), tmp_path / "cache" / versions[0].digest

    async def main() -> None:
        await use(at, versions[0])
        remover = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        fcntl.flock(remover, fcntl.LOCK_EX)
        taking = asyncio.create_task(use(at, versions[0]))
        await asyncio.sleep(0.1)
        assert not taking.done()
        shutil.rmtree(folder)
        os.close(remover)
        await asyncio.wait_for(taking, 30)

    asyncio.run(main())
    assert kept(tmp_path) == {versions[0].digest}
