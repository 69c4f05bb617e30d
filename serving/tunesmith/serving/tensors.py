"""A safetensors file read with suspicion: its header within bounds, every byte accounted for, every value finite."""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import NamedTuple

import numpy as np

from tunesmith.cluster.errors import AdapterError
from tunesmith.serving.documents import is_count, parse_json

DTYPES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U8": 1, "BOOL": 1}
"""Number formats that adapters come in, and their bytes."""

LONGEST_HEADER = 16 * 2**20
_LONGEST_NAME = 512
_CHUNK = 2**22


class Tensor(NamedTuple):
    """One tensor of a file."""

    dtype: str
    shape: tuple[int, ...]
    begin: int
    """First byte in the file."""
    size: int
    """Bytes."""


def read_header(path: Path, shown: str) -> dict[str, Tensor]:
    """Every tensor of a safetensors file, once its header is known to describe the whole file and nothing else.

    Args:
        shown: what errors call the file.

    Raises:
        AdapterError: the header lies: about its own length, a shape, a place in the file; or tensors overlap.
    """
    size = path.stat().st_size
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 10 or not 2 <= length <= size - 8:
            raise AdapterError(f"{shown}: its header claims {length:,} bytes; the file has {size:,}")
        if length > LONGEST_HEADER:
            raise AdapterError(f"{shown}: a header of {length:,} bytes; at most {LONGEST_HEADER:,} are read")
        text = file.read(length)
    header = parse_json(text, f"{shown}: its header", strict=True)
    if not isinstance(header, dict) or not text.startswith(b"{"):
        raise AdapterError(f"{shown}: its header begins with {text[:8]!r}; expected an object of tensors")
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise AdapterError(f"{shown}: __metadata__ holds something other than texts")
    start = 8 + length
    tensors = {name: _tensor(name, entry, start, shown) for name, entry in header.items()}
    _check_places(tensors, start, size, shown)
    return tensors


def check_finite(path: Path, tensors: dict[str, Tensor], shown: str) -> None:
    """Reads every floating-point value, in chunks.

    Raises:
        AdapterError: names the first tensor that holds NaN or infinite values, and how many.
    """
    with open(path, "rb") as file:
        for name, tensor in tensors.items():
            if tensor.dtype not in _FINITE:
                continue
            file.seek(tensor.begin)
            bad, left = 0, tensor.size
            while left:
                data = file.read(min(_CHUNK, left))
                if not data:
                    raise AdapterError(f"{shown}: {name} ends {left:,} bytes early")
                left -= len(data)
                bad += _not_finite(data, tensor.dtype)
            if bad:
                count = tensor.size // DTYPES[tensor.dtype]
                raise AdapterError(
                    f"{shown}: {name}: {bad:,} of {count:,} values are NaN or infinite", "Its training had diverged."
                )


_FINITE = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": "<u2"}
_BF16_EXPONENT = 0x7F80


def _not_finite(data: bytes, dtype: str) -> int:
    values = np.frombuffer(data, _FINITE[dtype])
    if dtype == "BF16":  # numpy has no such type; an exponent of ones is NaN or infinity
        return int(np.count_nonzero((values & _BF16_EXPONENT) == _BF16_EXPONENT))
    return values.size - int(np.count_nonzero(np.isfinite(values)))


def _tensor(name: str, entry: object, start: int, shown: str) -> Tensor:
    if len(name) > _LONGEST_NAME or not name.isprintable():
        raise AdapterError(f"{shown}: a tensor's name of {len(name)} characters: {name[:40]!r}")
    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        raise AdapterError(f"{shown}: {name}: expected dtype, shape and data_offsets, found {str(entry)[:80]}")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise AdapterError(f"{shown}: {name}: dtype {str(dtype)[:40]!r}; adapters are made of {', '.join(DTYPES)}")
    if not isinstance(shape, list) or len(shape) > 8 or not all(map(is_count, shape)):
        raise AdapterError(f"{shown}: {name}: shape {str(shape)[:80]} is no list of up to 8 lengths")
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(map(is_count, offsets)):
        raise AdapterError(f"{shown}: {name}: data_offsets {str(offsets)[:80]} are no two places")
    needed, given = math.prod(shape) * DTYPES[dtype], offsets[1] - offsets[0]
    if needed != given:
        raise AdapterError(
            f"{shown}: {name}: {dtype} {shape} takes {needed:,} bytes, but its data_offsets span {given:,}"
        )
    return Tensor(dtype, tuple(shape), start + offsets[0], needed)


def _check_places(tensors: dict[str, Tensor], start: int, size: int, shown: str) -> None:
    """Tensors follow one another without a gap or an overlap, up to the end of the file."""
    at, before = start, "the header"
    for name, tensor in sorted(tensors.items(), key=lambda item: (item[1].begin, item[1].size)):
        if tensor.begin < at:
            raise AdapterError(
                f"{shown}: {name} begins at byte {tensor.begin:,}, inside {before}, which ends at {at:,}"
            )
        if tensor.begin > at:
            raise AdapterError(f"{shown}: {tensor.begin - at:,} bytes between {before} and {name} belong to no tensor")
        at, before = tensor.begin + tensor.size, name
    if at > size:
        raise AdapterError(f"{shown}: {before} ends at byte {at:,}; the file has {size:,}")
    if at < size:
        raise AdapterError(f"{shown}: {size - at:,} bytes after {before} belong to no tensor")


def copy_bounded(source: Path, target: Path, limit: int, shown: str) -> None:
    """Copies a plain file of at most `limit` bytes without following a link.

    Raises:
        AdapterError: it is a link, no plain file, or larger.
    """
    descriptor = os.open(source, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    with open(descriptor, "rb") as file, open(target, "wb") as copy:
        copied = 0
        while data := file.read(_CHUNK):
            copied += len(data)
            if copied > limit:
                raise AdapterError(f"{shown}: more than {limit:,} bytes")
            copy.write(data)
