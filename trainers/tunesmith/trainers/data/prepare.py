"""The data of a recipe, tokenised once: found in a cache by its fingerprint, or built there.

Nothing heavy is imported here: a cached data set opens without torch, transformers and datasets.
"""

from __future__ import annotations

import fcntl
import hashlib
import importlib.metadata
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from tunesmith.cluster.artifacts import read_manifest
from tunesmith.cluster.errors import CheckpointError, DataError
from tunesmith.cluster.recipe.data import Source
from tunesmith.cluster.recipe.schema import Recipe
from tunesmith.cluster.storage import commit_folder, remove_leftovers
from tunesmith.trainers.data.report import DataReport
from tunesmith.trainers.data.sources import fingerprints
from tunesmith.trainers.data.tokens import TokenStore

if TYPE_CHECKING:
    from tunesmith.cluster.base import BaseRef
    from tunesmith.trainers.data.build import Rules

_TOKENIZER_FILES = (
    "*token*",
    "chat_template*",
    "additional_chat_templates/*",
    "vocab*",
    "merges*",
    "spiece*",
    "tekken*",
    "*.tiktoken",
    "config.json",
)


@dataclass(frozen=True)
class Prepared:
    """A tokenised data set."""

    train: TokenStore
    validation: TokenStore
    test: TokenStore
    report: DataReport
    fingerprint: str
    """sha256 of all that the tokens depend on: data, tokenizer, settings, this code."""
    files: dict[str, str]
    """sha256 of every data file; the commit of a hub data set."""
    quarantine: Path
    """The rows that were not used, as JSON lines of source, file, line, reason and row."""

    @property
    def max_length(self) -> int:
        """Tokens of a packed row, and of the longest example."""
        return self.report.max_length


def prepare(recipe: Recipe, base: BaseRef, cache: Path) -> Prepared:
    """Opens the recipe's data set, building it first if `cache` does not have it.

    Marks the keys of the recipe that the data set depends on as read; a cached one marks the same.

    Raises:
        DataError: the data cannot be trained on; the message names files and lines.
        ModelError: the tokenizer cannot be loaded.
        DiskFullError: the cache does not fit.
    """
    files: dict[str, str] = {}
    quiet = recipe.model_copy(deep=True)
    for source in [*quiet.data.train, *(quiet.data.validation or [])]:
        files.update(fingerprints(source))
    key = _fingerprint(quiet, base, files)
    if not _is_whole(cache / key):
        cache.mkdir(parents=True, exist_ok=True)
        with _locked(cache / f"{key}.lock"):
            if not _is_whole(cache / key):
                remove_leftovers(cache)
                _build(quiet, base, cache / key, files)
    recipe.mark_read(_meta(cache / key)["read"])
    prepared = open_prepared(cache, key)
    prepared.report.max_length_note = effective_max_length(quiet, base)[1]
    return prepared


def open_prepared(cache: Path, fingerprint: str) -> Prepared:
    """Opens a data set that `prepare` has built, as workers do.

    Raises:
        DataError: it is not there, or not whole.
    """
    folder = cache / fingerprint
    if not _is_whole(folder):
        what = f"the tokenised data set {folder} is missing or damaged"
        raise DataError(
            what, "Delete that folder and run again; on several nodes, put output.dir on a shared file system."
        )
    meta = _meta(folder)
    train, validation, test = (TokenStore(folder / name) for name in ("train", "validation", "test"))
    report = DataReport.model_validate(meta["report"])
    return Prepared(train, validation, test, report, fingerprint, meta["files"], folder / "quarantine.jsonl")


def effective_max_length(recipe: Recipe, base: BaseRef) -> tuple[int, str | None]:
    """Tokens of a packed row, and a note when the model's context cut the default.

    Raises:
        DataError: the recipe itself asks for more than the context.
    """
    wanted, context = recipe.data.max_length, base.context_length
    if context is None or wanted <= context:
        return wanted, None
    if "max_length" in recipe.data.model_fields_set:
        what = f"data.max_length: {wanted:,} is more than the {context:,} tokens that {base.reference} can take"
        raise DataError(what, f"Set it to {context} or less.")
    return context, f"data.max_length is {context:,}, the context of {base.reference} (its default is {wanted:,})"


def _build(quiet: Recipe, base: BaseRef, folder: Path, files: dict[str, str]) -> None:
    from tunesmith.trainers.data.build import Builder
    from tunesmith.trainers.models import load_tokenizer

    quiet.forget_reads()
    rules = _rules(quiet, base)
    extra: dict[str, Any] = {"kind": "data"}
    with commit_folder(folder, extra) as temporary:
        builder = Builder(temporary, quiet, load_tokenizer(base), rules)
        for role, sources in (("train", quiet.data.train), ("validation", quiet.data.validation or [])):
            for index, source in enumerate(cast(list[Source], sources)):
                builder.take(source, role, index)
        report = builder.finish()
        meta = {"read": quiet.read_keys(), "files": files, "report": report.model_dump(mode="json")}
        (temporary / "meta.json").write_text(json.dumps(meta), encoding="utf-8")


def _rules(recipe: Recipe, base: BaseRef) -> Rules:
    from tunesmith.trainers.data.build import Rules

    pretraining = recipe.objective.kind == "cpt"
    return Rules(
        recipe.data.loss_on or ("all" if pretraining else "assistant"),
        recipe.data.long_rows or ("split" if pretraining else "truncate"),
        effective_max_length(recipe, base)[0],
    )


def _fingerprint(quiet: Recipe, base: BaseRef, files: dict[str, str]) -> str:
    data = quiet.data.model_dump(mode="json", exclude={"packing"})
    for source in [*data["train"], *(data["validation"] or [])]:
        del source["weight"]
    parts = {
        "data": data | {"max_length": effective_max_length(quiet, base)[0]},
        "objective": quiet.objective.kind,
        "files": files,
        "tokenizer": _hashes(_tokenizer_files(Path(base.path))),
        "code": _hashes(sorted(Path(__file__).parent.glob("*.py"))),
        "versions": {name: importlib.metadata.version(name) for name in ("tokenizers", "transformers")},
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def _tokenizer_files(folder: Path) -> list[Path]:
    """The files of a model folder that decide how text becomes tokens."""
    found = {file for pattern in _TOKENIZER_FILES for file in folder.glob(pattern) if file.is_file()}
    return sorted(found)


def _hashes(files: list[Path]) -> dict[str, str]:
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


def _meta(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "meta.json").read_text(encoding="utf-8"))


def _is_whole(folder: Path) -> bool:
    """Whether the folder was committed and its files have the sizes they were committed with."""
    try:
        files = read_manifest(folder).files
    except CheckpointError:
        return False
    paths = {name: folder / name for name in files}
    return all(path.is_file() and path.stat().st_size == files[name].size for name, path in paths.items())


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """One builder at a time; the others wait and then find the data set there."""
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
