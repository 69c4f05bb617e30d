"""What makes a run the same run: its recipe, the bytes of its data and its base model."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from tunesmith.cluster.errors import ChangedError, StorageError
from tunesmith.cluster.storage import write_atomic

FREE = (
    "output.",
    "train.max_failures",
    "train.save_steps",
    "train.save_total_limit",
    "train.save_patience_s",
    "train.async_save",
    "cluster.address",
    "cluster.timeout_s",
    "cluster.stall_s",
    "cluster.wait_s",
    "cluster.grow_after_s",
    "cluster.workers.min",
    "cluster.cpus_per_worker",
    "cluster.memory_gib_per_worker",
    "eval.parity_rows",
)
"""Keys that change nothing about what is trained, so they may change between stop and resume."""

SHARDS = ("cluster.workers", "cluster.zero", "cluster.offload")
"""Keys that decide how a checkpoint is cut into shards, so they cannot change while one is to be resumed; but for the number of
workers of a run that is elastic now."""


class Identity(BaseModel):
    """Compared on resume, field by field."""

    model_config = ConfigDict(frozen=True, use_attribute_docstrings=True)

    recipe: dict[str, Any]
    """The resolved recipe, nested by section."""
    data: dict[str, str] = Field(default_factory=dict)
    """sha256 of every data file, by its path."""
    base: str = ""
    """Digest of the base model."""

    def save(self, path: Path) -> None:
        """Writes it as JSON, atomically."""
        write_atomic(path, self.model_dump_json(indent=1))

    @classmethod
    def load(cls, path: Path) -> Identity:
        """Reads what `save` wrote.

        Raises:
            StorageError: the file cannot be read or is not an identity.
        """
        try:
            return cls.model_validate_json(path.read_bytes())
        except OSError as error:
            raise StorageError(f"{path}: {error.strerror or error}") from error
        except ValidationError as error:
            raise StorageError(f"{path}: not the identity of a run: {error}") from error


def changes(saved: Identity, now: Identity) -> list[tuple[str, str, str]]:
    """`(name, old, new)` of everything that differs and matters: recipe keys, data files, the base model."""
    old, new = dict(_leaves(saved.recipe)), dict(_leaves(now.recipe))
    names = [*old, *(key for key in new if key not in old)]
    found = [
        (key, _show(old, key), _show(new, key))
        for key in names
        if not key.startswith(FREE) and old.get(key, _ABSENT) != new.get(key, _ABSENT)
    ]
    for path in sorted({*saved.data, *now.data}):
        was, now_is = saved.data.get(path), now.data.get(path)
        if was != now_is:
            found.append((f"data file {path}", _short(was), _short(now_is)))
    if saved.base != now.base:
        found.append(
            (f"base model {now.recipe.get('model', {}).get('base', '')}", _short(saved.base), _short(now.base))
        )
    return found


def refuse_changes(
    saved: Identity, now: Identity, allow_change: bool | None = None, checkpoint_exists: bool = True
) -> None:
    """Lets a run resume only as what it was.

    `allow_change` insists on going on with the changes, except those to how a checkpoint is sharded while
    `checkpoint_exists`; None where nobody may insist.

    Raises:
        ChangedError: names every changed key and file with its old and new value.
    """
    found = changes(saved, now)
    name = now.recipe.get("name", "")
    if allow_change:
        sharded = [change for change in found if change[0] in SHARDS and not _is_elastic(change[0], now)]
        if sharded and checkpoint_exists:
            raise ChangedError(
                f"run {name}: its checkpoints are sharded for another layout, which --allow-change cannot change:\n"
                + _listed(sharded),
                "Put these values back, or start anew under another name.",
            )
    elif found:
        raise ChangedError(
            f"run {name}: what it began with has changed:\n" + _listed(found),
            "Put these back, or start anew under another name."
            if allow_change is None
            else "Put these back, start anew under another name, or insist with --allow-change.",
        )


def _is_elastic(key: str, now: Identity) -> bool:
    return key == "cluster.workers" and isinstance(now.recipe["cluster"]["workers"], dict)


_ABSENT = object()


def _leaves(value: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else None
    if items is None or not value:
        yield prefix, value
        return
    for key, item in items:
        yield from _leaves(item, f"{prefix}.{key}" if prefix else str(key))


def _listed(found: list[tuple[str, str, str]]) -> str:
    return "\n".join(f"  {name}: {old} → {new}" for name, old, new in found)


def _show(leaves: dict[str, Any], key: str) -> str:
    return str(leaves[key]) if key in leaves else "(not there)"


def _short(digest: str | None) -> str:
    return f"sha256 {digest[:12]}…" if digest else "(not there)"
