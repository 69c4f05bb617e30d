"""Rows out of files, each with its file and line: JSONL, JSON, CSV, Parquet, `datasets` folders and hub data sets."""

from __future__ import annotations

import csv
import difflib
import hashlib
import io
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import fsspec

from tunesmith.cluster.errors import DataError
from tunesmith.cluster.recipe.data import Source

SUFFIXES = (".jsonl", ".json", ".csv", ".parquet")
_COMPRESSED = (".gz", ".bz2", ".xz", ".zst")
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
_FIX = f"A source is a file ({', '.join(SUFFIXES)}), a glob of them, a folder saved by `datasets` or a hub id."


@dataclass(frozen=True)
class RawRow:
    """A row as it was read; `problem` says why there is none."""

    file: str
    line: int
    """1-based line of JSONL and CSV files, 1-based row number of others."""
    row: dict[str, Any] | None
    problem: str | None = None


def read_rows(source: Source) -> Iterator[RawRow]:
    """Yields every row of a source, in the order of its files' names. Blank lines of JSONL and CSV are no rows.

    Raises:
        DataError: the source does not exist, or a file cannot be read as what its name says.
    """
    files = find_files(source.path)
    if not files or Path(files[0]).is_dir():
        yield from _read_dataset(source, files)
        return
    for file in files:
        yield from _READERS[_suffix(file) or ""](file)


def find_files(path: str) -> list[str]:
    """The files a source's path means, sorted; the folder itself for a saved data set; empty for a hub id.

    Raises:
        DataError: there is nothing there.
    """
    path = str(Path(path).expanduser()) if path.startswith("~") else path
    if "://" in path or any(sign in path for sign in "*?["):
        found = _remote_or_glob(path)
    elif Path(path).is_dir():
        return [_saved_dataset(Path(path))]
    elif Path(path).is_file():
        found = [path]
    elif _suffix(path) is None and _HUB_ID.fullmatch(path) and not Path(path).parent.is_dir():
        return []
    else:
        raise DataError(f"data file {path} does not exist", _near_names(Path(path)))
    for file in found:
        if _suffix(file) is None:
            raise DataError(f"data file {file} has a name that says no known format", _FIX)
    return found


def fingerprints(source: Source) -> dict[str, str]:
    """sha256 of each file of a source, by name; the commit of a hub data set.

    Raises:
        DataError: as `find_files`.
    """
    files = find_files(source.path)
    if not files:
        return {f"hub:{source.path}": _hub_commit(source.path)}
    if Path(files[0]).is_dir():
        files = sorted(str(file) for file in Path(files[0]).rglob("*") if file.is_file())
    return {file: _sha256(file) for file in files}


def _remote_or_glob(path: str) -> list[str]:
    try:
        fs, inner = fsspec.core.url_to_fs(path)
        matches = fs.glob(inner) if any(sign in inner for sign in "*?[") else [inner] if fs.exists(inner) else []
    except (ImportError, ValueError, OSError) as error:
        raise DataError(f"{path} cannot be opened: {error}", _FIX) from error
    found = [str(match) for match in matches if not fs.isdir(match)]
    if not found:
        raise DataError(f"{path} matches no file", _FIX)
    if "://" in path:
        return sorted(fs.unstrip_protocol(match) for match in found)
    here = f"{Path.cwd()}/"
    return sorted(match if Path(path).is_absolute() else match.removeprefix(here) for match in found)


def _saved_dataset(folder: Path) -> str:
    if (folder / "state.json").is_file() or (folder / "dataset_dict.json").is_file():
        return str(folder)
    inside = sorted({suffix for file in folder.iterdir() if (suffix := _suffix(file.name))})
    fix = f"Name the files: {folder}/*{inside[0]}" if inside else _FIX
    raise DataError(f"{folder} is a folder, but no data set saved by `datasets`", fix)


def _near_names(path: Path) -> str:
    if not path.parent.is_dir():
        return f"The folder {path.parent} does not exist either."
    names = [file.name for file in path.parent.iterdir()]
    near = difflib.get_close_matches(path.name, names, n=3, cutoff=0.6)
    near = near or sorted(name for name in names if _suffix(name))[:3]
    return f"In the same folder: {', '.join(near)}." if near else f"The folder {path.parent} holds no data file."


def _suffix(name: str) -> str | None:
    path = Path(name)
    if path.suffix in _COMPRESSED:
        path = path.with_suffix("")
    return path.suffix if path.suffix in SUFFIXES else None


def _open(file: str, compression: str | None = "infer") -> Any:
    fs, inner = fsspec.core.url_to_fs(file)
    return fs.open(inner, "rb", compression=compression)


def _sha256(file: str) -> str:
    digest = hashlib.sha256()
    with _open(file, compression=None) as stream:
        while block := stream.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _read_jsonl(file: str) -> Iterator[RawRow]:
    with _open(file) as stream:
        for line, raw in enumerate(stream, start=1):
            raw = raw.removeprefix(b"\xef\xbb\xbf") if line == 1 else raw
            if raw.strip():
                yield _parse(file, line, raw)


def _parse(file: str, line: int, raw: bytes) -> RawRow:
    try:
        value = json.loads(raw.decode("utf-8"))
    except UnicodeDecodeError as error:
        return RawRow(file, line, None, f"invalid UTF-8 at byte {error.start + 1} of the line")
    except json.JSONDecodeError as error:
        return RawRow(file, line, None, f"invalid JSON at character {error.pos + 1} of the line: {error.msg}")
    except (ValueError, RecursionError) as error:
        return RawRow(file, line, None, f"invalid JSON: {error}")
    return _object(file, line, value)


def _object(file: str, line: int, value: Any) -> RawRow:
    if isinstance(value, dict):
        return RawRow(file, line, value)
    kind = {list: "a list", str: "text", type(None): "null"}.get(type(value), "a number")
    return RawRow(file, line, None, f"not an object but {kind}")


def _read_json(file: str) -> Iterator[RawRow]:
    """A list of objects, or `{"data": [objects]}`; a file of one object a line is read as JSONL."""
    with _open(file) as stream:
        content = stream.read()
    try:
        value = json.loads(content.decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        if not content.removeprefix(b"\xef\xbb\xbf").lstrip().startswith(b"["):
            yield from _read_jsonl(file)
            return
        raise DataError(
            f"{file} is one JSON list that cannot be read: {error}", "Repair it, or save it as JSONL."
        ) from error
    if isinstance(value, dict):
        value = value["data"] if isinstance(value.get("data"), list) else [value]
    if not isinstance(value, list):
        raise DataError(f"{file} holds no list of objects", _FIX)
    for number, item in enumerate(value, start=1):
        yield _object(file, number, item)


def _read_csv(file: str) -> Iterator[RawRow]:
    csv.field_size_limit(1 << 30)
    with _open(file) as stream:
        # Bytes that are no UTF-8 become lone surrogates, so that only their own row is lost.
        lines = io.TextIOWrapper(stream, encoding="utf-8-sig", errors="surrogateescape", newline="")
        reader = csv.reader(lines, strict=True)
        header = next(reader, None) or []
        line = reader.line_num + 1
        while True:
            try:
                fields = next(reader)
            except StopIteration:
                return
            except csv.Error as error:
                yield RawRow(file, line, None, f"invalid CSV: {error}")
            else:
                if fields:
                    yield _fields(file, line, header, fields)
            line = reader.line_num + 1


def _fields(file: str, line: int, header: list[str], fields: list[str]) -> RawRow:
    if len(fields) != len(header):
        return RawRow(file, line, None, f"{len(fields)} fields where the header has {len(header)}")
    if any("\udc80" <= sign <= "\udcff" for field in fields if not field.isascii() for sign in field):
        return RawRow(file, line, None, "invalid UTF-8")
    return RawRow(file, line, dict(zip(header, fields, strict=True)))


def _read_parquet(file: str) -> Iterator[RawRow]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    number = 0
    try:
        with _open(file, compression=None) as stream:
            for batch in pq.ParquetFile(stream).iter_batches(batch_size=1024):
                for row in batch.to_pylist():
                    number += 1
                    yield RawRow(file, number, row)
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError, OSError) as error:
        raise DataError(f"{file} cannot be read as Parquet after row {number}: {error}") from error


def _read_dataset(source: Source, folders: list[str]) -> Iterator[RawRow]:
    """A folder written by `save_to_disk`, or a data set of the hub at the commit that `fingerprints` names."""
    import datasets
    from datasets.exceptions import DatasetsError

    try:
        if folders:
            data = datasets.load_from_disk(folders[0])
        else:
            data = datasets.load_dataset(source.path, split=source.split, revision=_hub_commit(source.path))
    except (OSError, ValueError, DatasetsError) as error:
        raise DataError(f"data set {source.path} cannot be read: {error}") from error
    if isinstance(data, datasets.DatasetDict):
        if source.split not in data:
            raise DataError(f"{source.path} has no split {source.split!r}", f"It has {', '.join(map(str, data))}.")
        data = data[source.split]
    for number, row in enumerate(data, start=1):
        yield RawRow(source.path, number, dict(row))


def _hub_commit(name: str) -> str:
    import huggingface_hub
    from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

    try:
        return str(huggingface_hub.HfApi().dataset_info(name).sha)
    except (HfHubHTTPError, OfflineModeIsEnabled, OSError, ValueError) as error:
        what = f"{name} is no file or folder here, and no hub data set that can be reached"
        raise DataError(f"{what}: {type(error).__name__}", _FIX) from error


_READERS = {".jsonl": _read_jsonl, ".json": _read_json, ".csv": _read_csv, ".parquet": _read_parquet}
