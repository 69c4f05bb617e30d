"""The adapter registry: immutable versions by content, and a catalog of names that changes by compare-and-swap.

Below its root: `versions/DIGEST/` with a version's files and a manifest that is written last, and `state/` with the
catalog's generations. A version is visible once its manifest is there, and served once a name has it.
"""

from __future__ import annotations

import logging
import re
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from pydantic import ValidationError

from tunesmith.cluster.artifacts import Manifest, read_manifest, verify
from tunesmith.cluster.errors import CheckpointError, RegistryError, StorageError
from tunesmith.cluster.storage import (
    MANIFEST,
    FileRecord,
    begin_folder,
    commit_once,
    discard,
    explained,
    held,
    manifest_digest,
    remove_leftovers,
    seal,
)
from tunesmith.serving.catalog import Catalog, Version, as_state, check_name
from tunesmith.serving.checks import Rules, admissible, judged
from tunesmith.serving.statelog import State, StateLog
from tunesmith.serving.tensors import copy_bounded
from tunesmith.serving.versions import open_versions

_DIGEST = re.compile(r"[0-9a-f]{64}")
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Added:
    """What came of adding an adapter.

    Attributes:
        aliases: those that lead to the version alone now.
        generation: of the registry.
        new: False when the name had this version already.
    """

    name: str
    digest: str
    aliases: tuple[str, ...]
    generation: int
    new: bool


class Registry:
    """Adapters below a folder or an object-store URI. Any number of processes may hold one of the same root."""

    def __init__(self, root: str) -> None:
        self.root = root
        self._log = StateLog(root, "state")
        self._versions = open_versions(root)

    def read(self) -> tuple[int, Catalog]:
        """The generation and the catalog as they are now.

        Raises:
            StorageError: they cannot be read.
        """
        generation, state = self._log.read()
        return generation, _catalog(state)

    def add(
        self, name: str, artifact: Path, owner: str | None = None, alias: str | None = None, rules: Rules | None = None
    ) -> Added:
        """Checks an artifact and makes it a version of a name. A name's first version becomes `prod`.

        Args:
            owner: tenant that alone sees the name; None for all, or as before.
            alias: moved to the version too.

        Raises:
            AdapterError: it may not enter; nothing was written.
            RegistryError: the name belongs to somebody else.
            StorageError: writing failed.
        """
        check_name("adapter", name)
        if alias is not None:
            check_name("alias", alias)
        if owner is not None:
            check_name("owner", owner)
        added = self._add(name, artifact, owner, alias, rules or Rules())
        if not self._versions.has(added.digest):  # the last name with the same content was removed in between
            added = self._add(name, artifact, owner, alias, rules or Rules())
        return added

    def move(self, name: str, alias: str, version: str, expected: int | None = None) -> int:
        """Makes an alias lead to one version; returns the registry's generation.

        Args:
            version: its digest, or the beginning of it.
            expected: the generation that was looked at; None moves it whatever has changed since.

        Raises:
            MovedError: `expected` is not the newest generation.
            RegistryError: there is no such adapter or version.
        """
        return self._update(lambda now: now.moved(name, alias, version), expected)[0]

    def split(
        self,
        name: str,
        alias: str,
        weights: Mapping[str, float],
        shadow: str | None = None,
        expected: int | None = None,
    ) -> int:
        """Makes an alias lead to several versions by weight; see `move` and `Catalog.split`."""
        return self._update(lambda now: now.split(name, alias, weights, shadow), expected)[0]

    def rollback(self, name: str, alias: str, expected: int | None = None) -> int:
        """Makes an alias lead where it led before; see `move`."""
        return self._update(lambda now: now.rolled_back(name, alias), expected)[0]

    def remove(self, name: str, what: str, expected: int | None = None) -> int:
        """Takes out an alias, or a version that no alias leads to; files that no name has any more are deleted.

        Raises:
            MovedError: `expected` is not the newest generation.
            RegistryError: there is neither, or an alias leads to the version.
        """
        gone: set[str] = set()

        def change(now: Catalog) -> Catalog:
            left = now.without(name, what)
            gone.clear()
            gone.update(version.digest for version in now.adapter(name).versions if not left.uses(version.digest))
            return left

        generation, _ = self._update(change, expected)
        for digest in gone:
            self._versions.discard(digest, lambda digest=digest: self.read()[1].uses(digest))
        return generation

    def fetch(self, digest: str, cache: Path) -> Path:
        """A checked copy of a version in a local folder, made unless it is there. Safe for concurrent processes.

        Args:
            digest: whole.
            cache: folder of such copies.

        Raises:
            RegistryError: there is no such version.
            StorageError: it cannot be copied, or is damaged in the registry.
        """
        if not _DIGEST.fullmatch(digest):
            raise RegistryError(f"{digest[:80]!r} is no digest of a version: expected 64 hexadecimal digits")
        final = cache / digest
        if final.is_dir():
            try:
                _verified(final, digest)
                return final
            except CheckpointError as error:
                _log.warning("%s; it is copied again", error)
                _discarded(final)
        remove_leftovers(cache, younger_stay_s=60)
        temporary = begin_folder(final)
        try:
            with held(temporary):
                manifest = self._copied_version(digest, temporary)
                commit_once(temporary, final, manifest.files, {"kind": manifest.kind, **manifest.about})
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
        return final

    def _copied_version(self, digest: str, folder: Path) -> Manifest:
        try:
            self._versions.get(digest, MANIFEST, folder / MANIFEST)
            for name in read_manifest(folder).files:
                (folder / name).parent.mkdir(exist_ok=True)
                self._versions.get(digest, name, folder / name)
            return _verified(folder, digest)
        except FileNotFoundError as error:
            raise RegistryError(
                f"{self.root} holds no whole version {digest[:12]}…: {error}", "Add its artifact again."
            ) from error
        except CheckpointError as error:
            raise StorageError(
                f"version {digest[:12]}… in {self.root} is damaged: {error.what}", "Add its artifact again."
            ) from error

    def _add(self, name: str, artifact: Path, owner: str | None, alias: str | None, rules: Rules) -> Added:
        allowed = admissible(artifact, rules)
        staged = self._versions.stage()
        try:
            with held(staged):
                files = _copied(artifact, allowed, staged)
                facts = judged(staged, files, rules)
                digest = version_digest(files)
                version = Version(
                    digest=digest,
                    added=datetime.now(UTC).isoformat(timespec="seconds"),
                    base_digest=facts.base_digest,
                    peft_type=facts.peft_type,
                    rank=facts.rank,
                    size=sum(record.size for record in files.values()),
                )
                before = self.read()[1]
                before.with_version(name, version, owner, alias)  # what the names forbid is said before files are kept
                self._versions.publish(staged, digest, files, {"kind": "adapter", "made": facts.made})
        finally:
            shutil.rmtree(staged, ignore_errors=True)
        generation, catalog = self._update(lambda now: now.with_version(name, version, owner, alias))
        aliases = catalog.adapter(name).aliases
        leading = tuple(one for one, target in aliases.items() if [route.digest for route in target.routes] == [digest])
        known = name in before.adapters and any(one.digest == digest for one in before.adapters[name].versions)
        return Added(name, digest, leading, generation, new=not known)

    def _update(self, change: Callable[[Catalog], Catalog], expected: int | None = None) -> tuple[int, Catalog]:
        generation, state = self._log.update(lambda now: as_state(change(_catalog(now))), expected)
        return generation, _catalog(state)


def version_digest(files: Mapping[str, FileRecord]) -> str:
    """The name of a version: hex sha256 over the names, sizes and hashes of its files."""
    return manifest_digest({"files": {name: record._asdict() for name, record in files.items()}})


def _copied(artifact: Path, allowed: Mapping[str, int], folder: Path) -> dict[str, FileRecord]:
    """Copies an artifact's files; the records of all but its manifest."""
    files = {}
    for name, limit in allowed.items():
        with explained(folder / name, limit):
            (folder / name).parent.mkdir(exist_ok=True)
            copy_bounded(artifact / name, folder / name, limit, name)
            if name != MANIFEST:
                files[name] = seal(folder / name)
    return files


def _discarded(final: Path) -> None:
    try:
        discard(final)
    except StorageError:  # another process was faster
        if final.exists():
            raise


def _verified(folder: Path, digest: str) -> Manifest:
    manifest = verify(folder)
    if version_digest(manifest.files) != digest:
        raise CheckpointError(f"{folder / MANIFEST}: the manifest of another version")
    return manifest


def _catalog(state: State) -> Catalog:
    try:
        return Catalog.model_validate(state)
    except ValidationError as error:
        raise StorageError(f"the registry's state is not one that this version of Tunesmith wrote: {error}") from error
