"""The folder of one run: where everything lies, who may write, which attempt is the current one."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import re
import shutil
import socket
import tempfile
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

from tunesmith.cluster.errors import FencedError, OutputError, RunBusyError, StorageError
from tunesmith.cluster.metrics import MetricsLog, read_metrics
from tunesmith.cluster.storage import explained, write_atomic


class RunFolder:
    """`<output.dir>/<name>/`. Making the object touches nothing; `create` makes the folder."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self._made: list[Path] = []

    @property
    def name(self) -> str:
        """The run's name."""
        return self.root.name

    @property
    def recipe(self) -> Path:
        """The resolved recipe, YAML."""
        return self.root / "recipe.yaml"

    @property
    def identity(self) -> Path:
        """What the run began with (`tunesmith.cluster.identity.Identity`)."""
        return self.root / "run.json"

    @property
    def lock_file(self) -> Path:
        """Locked by the command that is at work on the run."""
        return self.root / ".lock"

    @property
    def attempt_file(self) -> Path:
        """The number of the current attempt."""
        return self.root / "attempt.json"

    @property
    def stop_file(self) -> Path:
        """Present while the run is asked to save and stop."""
        return self.root / "control" / "stop"

    @property
    def data_report(self) -> Path:
        """What was found in the data."""
        return self.root / "data.json"

    @property
    def quarantine(self) -> Path:
        """Rows that could not be used, with their reasons."""
        return self.root / "quarantine.jsonl"

    @property
    def metrics(self) -> Path:
        """One line a step (`tunesmith.cluster.metrics`)."""
        return self.root / "metrics.jsonl"

    @property
    def tensorboard(self) -> Path:
        """TensorBoard's event files."""
        return self.root / "tensorboard"

    @property
    def loss_picture(self) -> Path:
        """The loss curve."""
        return self.root / "loss.png"

    @property
    def checkpoints(self) -> Path:
        """`step-00000020/` and so on."""
        return self.root / "checkpoints"

    @property
    def best(self) -> Path:
        """Names the best checkpoint and its metric."""
        return self.root / "best.json"

    @property
    def receipts(self) -> Path:
        """Receipts, until they are copied into the artifact."""
        return self.root / "receipts"

    @property
    def artifact(self) -> Path:
        """The finished model."""
        return self.root / "artifact"

    def outcome(self, attempt: int) -> Path:
        """How an attempt ended, written by its workers."""
        return self.root / f"outcome-{attempt}.json"

    def warnings(self, attempt: int) -> Path:
        """What the workers of an attempt warn of, one JSON line each; the command that started them repeats it."""
        return self.root / "control" / f"warnings-{attempt}.jsonl"

    @property
    def measured(self) -> Path:
        """Memory that the workers held in the run's first steps."""
        return self.root / "control" / "measured.json"

    def create(self) -> None:
        """Makes the folder if it is not there.

        Raises:
            OutputError: it cannot be made or written.
        """
        try:
            for folder in reversed([self.root, *self.root.parents]):
                if not folder.exists():
                    folder.mkdir(exist_ok=True)
                    self._made.append(folder)
            self.checkpoints.mkdir(exist_ok=True)
            with open(self.lock_file, "ab"):
                pass
        except OSError as error:
            raise OutputError(
                f"{self.root}: cannot be written: {error.strerror or error}",
                "Set output.dir to a folder you may write.",
            ) from error

    def discard_if_unused(self) -> bool:
        """Removes the folder, and parents of it, if this object made them and nothing was trained; says whether."""
        trained = read_metrics(self.metrics) or (self.checkpoints.exists() and any(self.checkpoints.glob("step-*")))
        if self.root not in self._made or trained:
            return False
        # moved away first: workers that are being ended still beat, but only by the folder's name
        discarded = tempfile.mkdtemp(prefix=f".{self.name}-", dir=self.root.parent)
        self.root.rename(discarded)
        # twice, for a beat that was on its way; what cannot be removed stays, hidden: the user is owed the reason to discard
        for _ in range(2):
            shutil.rmtree(discarded, ignore_errors=True)
        for parent in reversed(self._made[: self._made.index(self.root)]):
            with contextlib.suppress(OSError):  # another run lives there by now
                parent.rmdir()
        return True

    @contextlib.contextmanager
    def lock(self) -> Iterator[None]:
        """Holds the run against every other command; the kernel lets go when the process dies.

        Raises:
            RunBusyError: names the process, host and start time of the holder.
        """
        descriptor = self._locked()
        try:
            holder = {
                "pid": os.getpid(),
                "host": socket.gethostname(),
                "started": datetime.now(UTC).isoformat(timespec="seconds"),
            }
            with explained(self.lock_file, 200):
                os.ftruncate(descriptor, 0)
                os.pwrite(descriptor, json.dumps(holder).encode(), 0)
            yield
        finally:
            os.close(descriptor)

    def begin_attempt(self) -> int:
        """Starts the next attempt, which fences all earlier ones; returns its number, from 1."""
        attempt = self.current_attempt() + 1
        write_atomic(self.attempt_file, json.dumps({"attempt": attempt}))
        return attempt

    def current_attempt(self) -> int:
        """Number of the attempt that may write; 0 before the first."""
        try:
            return int(json.loads(self.attempt_file.read_bytes())["attempt"])
        except FileNotFoundError:
            return 0
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise StorageError(f"{self.attempt_file}: cannot be read: {error}") from error

    def check_fence(self, attempt: int) -> None:
        """Raises FencedError unless `attempt` is the current one."""
        current = self.current_attempt()
        if current != attempt:
            raise FencedError(f"run {self.name}: attempt {attempt} may not write, attempt {current} has taken over")

    def abort_file(self, attempt: int) -> Path:
        """Present when an attempt hangs, and its workers are to end themselves."""
        return self.root / "control" / f"abort-{attempt}"

    def attempt_stop_file(self, attempt: int) -> Path:
        """Present while one attempt is asked to save and stop; says why."""
        return self.root / "control" / f"stop-{attempt}"

    def request_stop(self) -> None:
        """Asks the workers to save the same step and stop."""
        self.stop_file.parent.mkdir(parents=True, exist_ok=True)
        self.stop_file.touch()

    def request_stop_of(self, attempt: int, why: str) -> None:
        """Asks the workers of an attempt to save the same step and stop; the first reason that is given stays."""
        file_of_it = self.attempt_stop_file(attempt)
        file_of_it.parent.mkdir(exist_ok=True)
        with contextlib.suppress(FileExistsError), file_of_it.open("x") as file:
            file.write(why)

    def stop_requested(self, attempt: int) -> bool:
        """Whether the workers of an attempt are asked to save and stop; storage that fails asks nothing."""
        with contextlib.suppress(OSError):
            return self.stop_file.exists() or self.attempt_stop_file(attempt).exists()
        return False

    def why_stopped(self, attempt: int) -> str:
        """` because …`, for a message; empty when somebody asked for it."""
        with contextlib.suppress(OSError):
            return f" because {self.attempt_stop_file(attempt).read_text()}"
        return ""

    def clear_stop(self) -> None:
        """Takes the request back."""
        self.stop_file.unlink(missing_ok=True)

    def warn(self, attempt: int, text: str) -> None:
        """Tells whoever watches the run that something went wrong and that it goes on all the same."""
        path = self.warnings(attempt)
        path.parent.mkdir(exist_ok=True)
        MetricsLog(path).append({"text": text})

    def newest_step(self) -> int:
        """Step of the newest committed checkpoint by name, whole or not; 0 when there is none."""
        names = (re.fullmatch(r"step-(\d+)", path.name) for path in self.checkpoints.glob("step-*"))
        return max((int(name[1]) for name in names if name), default=0)

    def trials(self) -> tuple[int, int]:
        """Of a sweep: trials that were begun, and how many of them have ended."""
        begun, ended = (list(self.root.glob(f"trials/*/{name}")) for name in ("values.json", "ended.json"))
        return len(begun), len(ended)

    def has_checkpoint(self) -> bool:
        """Whether any committed checkpoint is there, whole or not."""
        return self.newest_step() > 0

    def _locked(self) -> int:
        while True:
            try:
                descriptor = os.open(self.lock_file, os.O_RDWR | os.O_CREAT, 0o644)
            except OSError as error:
                raise OutputError(f"{self.lock_file}: {error.strerror or error}") from error
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise self._busy(descriptor) from None
            with contextlib.suppress(FileNotFoundError):
                if os.stat(self.lock_file).st_ino == os.fstat(descriptor).st_ino:
                    return descriptor
            os.close(descriptor)  # the folder was discarded between opening and locking: that lock holds nothing
            self.create()

    def _busy(self, descriptor: int) -> RunBusyError:
        text = os.pread(descriptor, 4096, 0)
        os.close(descriptor)
        try:
            holder = json.loads(text)
            who = f"process {holder['pid']} on {holder['host']} since {holder['started']}"
        except (ValueError, KeyError, TypeError):
            who = "another process"
        return RunBusyError(
            f"run {self.name} is being worked on by {who} ({self.root})",
            "Wait for it, stop it, or choose another name.",
        )
