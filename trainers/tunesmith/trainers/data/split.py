"""Held-out rows, chosen by what a row says: the same on every machine, in any order of the files."""

from __future__ import annotations

import hashlib
import json
from typing import Any

import numpy as np

TRAIN, VALIDATION, TEST = 0, 1, 2


def content_hash(content: Any) -> bytes:
    """sha256 of the canonical JSON (sorted keys, no spaces, UTF-8).

    Raises:
        UnicodeEncodeError: a string holds half of a surrogate pair.
        TypeError: a value has no JSON form.
    """
    text = json.dumps(content, sort_keys=True, ensure_ascii=False, separators=(",", ":"))
    return hashlib.sha256(text.encode()).digest()


def assign(hashes: list[bytes], validation: float, test: float) -> np.ndarray:
    """Which split each row belongs to: int8 [rows] of TRAIN, VALIDATION, TEST.

    Rows are ranked by hash. Validation takes from the low end and test from the high one, so that neither share moves
    the other. A share above 0 gets at least one row if there are two or more, and is exact to the nearest row as far as
    equal rows, which stay together so that no held-out row is trained on, allow. Something is always left to train.
    """
    keys, group_of_row, sizes = np.unique(np.asarray(hashes, dtype="S32"), return_inverse=True, return_counts=True)
    split_of_group = np.full(len(keys), TRAIN, dtype=np.int8)
    groups = list(range(len(keys)))
    split_of_group[_take(groups, sizes, _target(validation, len(hashes)))] = VALIDATION
    groups = [group for group in reversed(groups) if split_of_group[group] == TRAIN]
    split_of_group[_take(groups, sizes, _target(test, len(hashes)))] = TEST
    return split_of_group[group_of_row.reshape(-1)]


def stray(name: str, share: float, held: int, hashes: list[bytes]) -> str | None:
    """What to say of a share that equal rows have moved far from what was asked: past 1.5 times, or under half."""
    asked, duplicates = _target(share, len(hashes)), len(hashes) - len(set(hashes))
    if not duplicates or 0.5 * asked <= held <= 1.5 * asked:
        return None
    shares = f"{name}: {100 * share:.3g} % asked, {100 * held / len(hashes):.3g} % held out"
    return f"{shares}: equal rows stay together ({duplicates:,} duplicates)"


def _target(share: float, rows: int) -> int:
    return max(1, round(share * rows)) if share > 0 and rows >= 2 else 0


def _take(groups: list[int], sizes: np.ndarray, target: int) -> list[int]:
    """The first groups of equal rows that fit into `target` rows; the smallest one if none does."""
    if target == 0 or len(groups) < 2:
        return []
    taken: list[int] = []
    room = target
    for group in groups:
        if sizes[group] <= room and len(taken) < len(groups) - 1:
            taken.append(group)
            room -= int(sizes[group])
            if room == 0:
                break
    return taken or [min(groups, key=lambda group: sizes[group])]
