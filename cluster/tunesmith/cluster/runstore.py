"""What is known of jobs, wherever they run: a small database beside the run folders, which can be made anew from them.

SQLite in the user's state folder by default, or whatever SQLAlchemy URL TUNESMITH_STORE names. Nothing that a run needs lies here alone:
the driver of a job writes the same to `jobs/` in the run's folder (`JobRecord`), and `rebuild` reads it from there.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, ValidationError
from sqlalchemy import JSON, ForeignKey, String, create_engine, event, select
from sqlalchemy.exc import IntegrityError, SQLAlchemyError
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column

from tunesmith.cluster.artifacts import read_manifest
from tunesmith.cluster.errors import CheckpointError, StorageError
from tunesmith.cluster.local import state_folder
from tunesmith.cluster.runs import RunFolder
from tunesmith.cluster.storage import explained, write_atomic

SCHEMA_VERSION = 1
BUSY_S = 60.0
"""How long a writer waits for the others, unless told otherwise."""
HEARD_S = 120.0
"""A driver says every few seconds that it lives; after this long something is wrong."""
ENDED = ("succeeded", "failed", "stopped", "lost")
"""States that do not change any more."""


class _Table(DeclarativeBase):
    type_annotation_map = {dict[str, Any]: JSON}  # noqa: RUF012 - as SQLAlchemy wants it


class _Version(_Table):
    __tablename__ = "schema_version"
    version: Mapped[int] = mapped_column(primary_key=True)


class _Job(_Table):
    __tablename__ = "jobs"
    id: Mapped[str] = mapped_column(String(200), primary_key=True)
    folder: Mapped[str] = mapped_column(String(1000), index=True)
    record: Mapped[dict[str, Any]]


class _Event(_Table):
    __tablename__ = "events"
    number: Mapped[int] = mapped_column(primary_key=True, autoincrement=True)
    job: Mapped[str] = mapped_column(ForeignKey("jobs.id"), index=True)
    at: Mapped[float]
    text: Mapped[str]


class JobRecord(BaseModel):
    """A job as its submitter and its driver know it."""

    model_config = ConfigDict(frozen=True, use_attribute_docstrings=True)

    id: str
    """What Ray calls it: made from the idempotency key and `number`."""
    key: str
    """Two submissions with one key are one job, while it lives."""
    number: int
    """The how-many-th job of this key, from 1: a run that was stopped or has failed goes on in a new job."""
    kind: Literal["train", "sweep"] = "train"
    """Which command it runs."""
    run: str
    """Name of the run."""
    folder: str
    """The run's folder, as the cluster sees it."""
    user: str
    priority: int = 0
    cluster: str = ""
    """Where it was submitted."""
    recipe: str = ""
    """sha256 of the resolved recipe."""
    state: str = "submitted"
    """submitted, queued, running, saving, or one of ENDED."""
    why: str = ""
    """Why it waits, or how it ended."""
    submitted_at: float = 0.0
    """Seconds since 1970, as all times here."""
    started_at: float | None = None
    """When it last got its workers."""
    ended_at: float | None = None
    """Of a lost one, when it was last heard of, if nobody knows better."""
    heard_at: float = 0.0
    """When its driver last said anything."""
    exit_code: int | None = None
    artifact: str = ""
    """Where its model lies, when it has succeeded."""

    @property
    def ended(self) -> bool:
        """Whether it will not change any more."""
        return self.state in ENDED


class RunStore:
    """Jobs and their events. Many processes may use one at a time."""

    def __init__(self, url: str | None = None, busy_s: float = BUSY_S) -> None:
        """
        Args:
            url: of the database; by default TUNESMITH_STORE, else SQLite in the user's state folder.
            busy_s: how long to wait for the others who write to an SQLite file.

        Raises:
            StorageError: it cannot be opened, or a newer Tunesmith has made it.
        """
        self.url = url or os.environ.get("TUNESMITH_STORE") or _default_url()
        with _explained(self.url):
            self._engine = create_engine(self.url)
            if self._engine.dialect.name == "sqlite":
                event.listen(self._engine, "connect", lambda connection, _: _prepare_sqlite(connection, busy_s))
                event.listen(self._engine, "begin", lambda connection: connection.exec_driver_sql("BEGIN IMMEDIATE"))
            self._create()

    def add(self, record: JobRecord, text: str) -> JobRecord:
        """Notes a job with its first event, or returns what is noted of a job of this id already."""
        try:
            with self._session() as session:
                session.add(_Job(id=record.id, folder=record.folder, record=record.model_dump()))
                session.flush()
                session.add(_Event(job=record.id, at=record.submitted_at, text=text))
            return record
        except IntegrityError:
            known = self.job(record.id)
            assert known is not None, f"{record.id} is there and is not"
            return known

    def change(self, id: str, text: str = "", **fields: Any) -> JobRecord:
        """Changes fields of a job, and notes an event if there is something to say. A job that has ended stays so.

        Raises:
            KeyError: there is no such job.
        """
        with self._session() as session:
            row = session.get(_Job, id, with_for_update=True)
            if row is None:
                raise KeyError(id)
            before = JobRecord.model_validate(row.record)
            if before.ended and "state" in fields:
                return before
            after = before.model_copy(update=fields)
            row.record = after.model_dump()
            if text:
                session.add(_Event(job=id, at=time.time(), text=text))
            return after

    def job(self, id: str) -> JobRecord | None:
        """What is known of a job."""
        with self._session() as session:
            row = session.get(_Job, id)
            return None if row is None else JobRecord.model_validate(row.record)

    def jobs(self, folder: str | None = None) -> list[JobRecord]:
        """All jobs, or those of a run's folder, the oldest first."""
        with self._session() as session:
            rows = select(_Job) if folder is None else select(_Job).where(_Job.folder == folder)
            records = [JobRecord.model_validate(row.record) for row in session.scalars(rows)]
        return sorted(records, key=lambda record: (record.submitted_at, record.id))

    def events(self, id: str) -> list[tuple[float, str]]:
        """When what happened to a job, the oldest first."""
        with self._session() as session:
            rows = session.scalars(select(_Event).where(_Event.job == id).order_by(_Event.at, _Event.number))
            return [(row.at, row.text) for row in rows]

    def rebuild(self, output: Path) -> list[JobRecord]:
        """Takes in every job that the runs of an output folder tell of and that is not known here; returns these."""
        found = [record for record in records_of(output) if self.job(record.id) is None]
        for record in found:
            self.add(record, f"found in {record.folder}")
        return found

    def close(self) -> None:
        """Closes the connections."""
        self._engine.dispose()

    @contextmanager
    def _session(self) -> Iterator[Session]:
        with _explained(self.url), Session(self._engine, expire_on_commit=False) as session, session.begin():
            yield session

    def _create(self) -> None:
        with self._engine.begin() as connection:
            _Table.metadata.create_all(connection)
            version = connection.scalar(select(_Version.version))
            if version is None:
                connection.execute(_Version.__table__.insert().values(version=SCHEMA_VERSION))  # type: ignore[attr-defined]
            elif version != SCHEMA_VERSION:
                raise StorageError(
                    f"{self.url}: made by another Tunesmith (schema {version}, this one has {SCHEMA_VERSION})",
                    "Use that Tunesmith, or name another database in TUNESMITH_STORE: it is filled from the run folders.",
                )


def keep(record: JobRecord) -> None:
    """Writes a job's record into its run's folder.

    Raises:
        StorageError: it cannot be written.
    """
    path = record_file(Path(record.folder), record.id)
    with explained(path, 0):
        path.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(path, record.model_dump_json(indent=1))


def record_file(run: Path, id: str) -> Path:
    """Where a run's folder keeps what its job of this id is."""
    return run / "jobs" / f"{id}.json"


def log_file(run: Path, id: str) -> Path:
    """Where a run's folder keeps all that its job of this id has printed."""
    return run / "jobs" / f"{id}.log"


def records_of(output: Path) -> Iterable[JobRecord]:
    """The jobs of all runs below an output folder, as the runs tell; a finished artifact vouches for its run."""
    for path in sorted(output.glob("*/jobs/*.json")):
        try:
            written = path.read_bytes()
        except OSError:  # a colleague's, perhaps: as a folder that is not seen
            continue
        try:
            record = JobRecord.model_validate_json(written)
        except ValidationError as unreadable:
            raise StorageError(f"{path}: not the record of a job: {unreadable}", "Move it away.") from unreadable
        lives = record.ended or time.time() - record.heard_at < HEARD_S
        yield record if lives else record.model_copy(update=_ending(RunFolder(path.parent.parent)))


def how_far(record: JobRecord) -> str:
    """What a job's run has on disk, in words."""
    folder = RunFolder(Path(record.folder))
    if record.kind == "sweep":
        begun, ended = folder.trials()
        return f"of its trials {begun} were begun, and {ended} of these have ended"
    step = folder.newest_step()
    return f"the newest checkpoint is step {step}" if step else "no checkpoint is there yet"


def _ending(folder: RunFolder) -> dict[str, Any]:
    """How a job has ended whose driver did not live to write it, if its run shows that.

    Where it does not, it may have been lost or not be heard of for another reason: `states.state_of` judges that each time it
    is asked, and nobody writes it down.
    """
    try:
        read_manifest(folder.artifact)
    except CheckpointError:
        return {}
    return {"state": "succeeded", "why": "its artifact is whole", "exit_code": 0, "artifact": str(folder.artifact)}


def _default_url() -> str:
    folder = state_folder()
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    return f"sqlite:///{folder / 'jobs.db'}"


def _prepare_sqlite(connection: Any, busy_s: float) -> None:
    """No write-ahead log: it needs memory that all writers share, and home folders often lie on storage of several machines."""
    # transactions begin where we say, not at the first write: BEGIN IMMEDIATE never deadlocks
    connection.isolation_level = None
    connection.execute(f"PRAGMA busy_timeout = {round(busy_s * 1000)}")
    connection.execute("PRAGMA foreign_keys = ON")


@contextmanager
def _explained(url: str) -> Iterator[None]:
    try:
        yield
    except IntegrityError:
        raise
    except SQLAlchemyError as error:
        raise StorageError(
            f"{url}: {getattr(error, 'orig', None) or error}", "Name a database in TUNESMITH_STORE that may be written."
        ) from error
