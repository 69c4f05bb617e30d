"""What a submitted job runs on the cluster: `python -m tunesmith.cluster.jobs.driver`.

It waits for its turn at the desk, runs the very command that a user would (`tunesmith train` or `tunesmith sweep`), and watches it: all that
it prints goes to Ray's log of the job and to the run's folder, secrets hidden. When the desk asks for the workers, the command is told to save,
and the job waits for its next turn. Loads neither torch nor the data, so that a waiting job is cheap.
"""

from __future__ import annotations

import json
import math
import os
import signal
import threading
import time
import traceback
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, Any

import ray
import yaml
from ray._private.runtime_env.constants import RAY_JOB_CONFIG_JSON_ENV_VAR
from ray.exceptions import GetTimeoutError, RayActorError

from tunesmith.cluster.console import exit_code_of
from tunesmith.cluster.errors import LostHeadError, StorageError, TunesmithError, UsageError
from tunesmith.cluster.jobs import secrets
from tunesmith.cluster.jobs.command import Command
from tunesmith.cluster.jobs.desk import Answer, find_desk
from tunesmith.cluster.jobs.spec import METADATA_KEY, JobSpec
from tunesmith.cluster.jobs.versions import differences, here
from tunesmith.cluster.progress import StepState
from tunesmith.cluster.queue.state import Job
from tunesmith.cluster.recipe.load import load_recipe
from tunesmith.cluster.resources import Need, Node, needs, require_resources
from tunesmith.cluster.runs import RunFolder
from tunesmith.cluster.runstore import JobRecord, RunStore, how_far, keep, log_file, record_file
from tunesmith.cluster.session import RaySession
from tunesmith.cluster.tail import MetricsTail

ASK_S = 1.0
NOTE_S = 10.0
"""How often a job says that it lives, and why it waits."""
SAVED, FAILED, STOPPED_AT_ONCE = 75, 1, 143


def main() -> int:
    """Runs the job that Ray's environment describes to its end; returns its exit code."""
    described = json.loads(os.environ[RAY_JOB_CONFIG_JSON_ENV_VAR])
    spec = JobSpec.model_validate_json(described["metadata"][METADATA_KEY])
    try:
        _enter_folder(spec)
        book = Book(spec.record)
    except Exception as error:  # noqa: BLE001 - there is nowhere else to write it
        return exit_code_of(error)
    try:
        code = Driver(spec, book).run()
    except Exception as error:  # noqa: BLE001 - the one place where a job's errors end
        foreseen = isinstance(error, TunesmithError)
        code = error.exit_code if foreseen else FAILED
        book.say(f"error: {error}" if foreseen else "".join(traceback.format_exception(error)))
        why = str(error).partition("\n")[0].rstrip(":")
        book.note(f"failed: {why}", state="failed", why=why, exit_code=code, ended_at=time.time())
    return code


def _enter_folder(spec: JobSpec) -> None:
    """Goes where the job was submitted from, so that relative paths mean what they meant there.

    Raises:
        UsageError: this machine does not see that folder, and the run would be written below it.
    """
    if Path(spec.cwd).is_dir():
        os.chdir(spec.cwd)
    elif Path(spec.record.folder).is_relative_to(spec.cwd):
        raise UsageError(
            f"{spec.record.folder}: the cluster does not see {spec.cwd}, where the job was submitted from",
            "Set output.dir to a folder that the cluster's nodes share.",
        )


class Book:
    """Where the job is written down: its log, its record in the run's folder, and the store of this machine."""

    def __init__(self, record: JobRecord) -> None:
        self.record = record
        log = log_file(Path(record.folder), record.id)
        log.parent.mkdir(parents=True, exist_ok=True)
        self._log: IO[str] = log.open("a", buffering=1)  # until the process ends
        self._lock = threading.Lock()
        self.hidden: dict[str, str] = {}
        """Secrets that must not be printed."""
        self._store: RunStore | None = None
        try:
            self._store = RunStore()
            self._store.add(record, "its driver has started")
        except StorageError as unwritable:  # the run's folder tells the same
            self.say(f"warning: the run store is not used: {unwritable.what}")

    def say(self, text: str) -> None:
        """Prints a line, and keeps it with the run."""
        line = secrets.hide(text, self.hidden)
        with self._lock:
            print(line, flush=True)
            self._log.write(line + "\n")

    def note(self, text: str = "", **fields: Any) -> None:
        """Changes the job's record; says what happened, if anything did."""
        self.record = self.record.model_copy(update={**fields, "heard_at": time.time()})
        keep(self.record)
        if self._store is not None:
            self._store.change(self.record.id, text, **fields, heard_at=self.record.heard_at)
        if text:
            self.say(f"job {self.record.id}: {text}")

    def beat(self) -> None:
        """Notes now and then that the job lives."""
        if time.time() - self.record.heard_at > NOTE_S:
            self.note()


class Driver:
    """One job from its start on the cluster to its end."""

    def __init__(self, spec: JobSpec, book: Book) -> None:
        self.spec, self.book = spec, book
        self.folder = RunFolder(Path(spec.record.folder))
        self.recipe_file = record_file(self.folder.root, spec.record.id).with_suffix(".yaml")
        self.options: list[str] = []
        """Of the command, besides its recipe."""
        self.stopping = False
        signal.signal(signal.SIGTERM, self._stop)

    def run(self) -> int:
        """Waits, works and waits again, until the run has ended; returns its exit code."""
        self._check()
        with RaySession() as session:
            nodes = session.nodes()
            self._write_recipe()
            need = self._needs(nodes)
            if need is None:
                return self._ended(SAVED)
            require_resources(need, nodes)
            record = self.spec.record
            self.job = Job(
                record.id, record.user, need, 0.0, record.priority, "", self.spec.preemptible, self.spec.expected_s
            )
            self.desk = find_desk()
            try:
                while True:
                    placed = self._wait()
                    if placed is None:
                        return self._ended(SAVED)
                    code, preempted = self._work(placed)
                    self._tell(self.desk.leave, self.job.id)
                    if not (preempted and code == SAVED and not self.stopping):
                        return self._ended(code)
                    self.book.note(f"has saved, and waits again: {how_far(record)}", state="queued")
            finally:
                self._tell(self.desk.leave, self.job.id)

    def _check(self) -> None:
        """Whether this machine can run what was submitted.

        Raises:
            UsageError: it has other versions, or a secret is not there.
        """
        found = differences(self.spec.versions, here())
        if found and self.spec.check_versions:
            raise UsageError(
                "the cluster has other versions than the machine that the job was submitted from:\n  "
                + "\n  ".join(found),
                "Submit with --ship-code if Tunesmith's own code differs; install the same libraries in both places if they do; "
                "or insist with --any-version.",
            )
        for difference in found:
            self.book.say(f"warning: {difference}")
        self.book.hidden = secrets.resolve(self.spec.secrets)

    def _write_recipe(self) -> None:
        self.recipe_file.write_text(yaml.safe_dump(self.spec.recipe, sort_keys=False, allow_unicode=True))

    def _needs(self, nodes: Sequence[Node]) -> Need | None:
        """All that the job takes at once; None when it is stopped meanwhile.

        A sweep says itself how much that is, and is then held to as many trials at once, though the cluster may have grown
        when its turn comes.

        Raises:
            UsageError, TunesmithError: the sweep cannot begin.
        """
        if self.spec.record.kind == "train":
            return needs(load_recipe(self.recipe_file).cluster, nodes)
        self.book.note(state="queued", why="its sweep is checked before it waits for its turn")
        command = self._command("--dry-run")
        while command.is_running:
            self.book.beat()
            time.sleep(ASK_S)
        code = command.wait()
        if self.stopping:
            return None
        if code:
            kind = UsageError if code == UsageError.exit_code else TunesmithError
            raise kind(f"`tunesmith sweep --dry-run` ended with exit code {code}; the lines above say why")
        planned = command.answer()
        if planned["concurrent"] is not None:
            self.options = ["--set", f"tune.concurrent={planned['concurrent']}"]
        return Need(**planned["need"])

    def _command(self, *options: str) -> Command:
        arguments = [self.spec.record.kind, str(self.recipe_file), "--json", *self.options, *options]
        return Command(arguments, self.book.hidden, self.book.say)

    def _wait(self) -> Mapping[str, int] | None:
        """Waits for the job's turn; workers by node, or None when it is stopped meanwhile."""
        said, noted_at = "", -math.inf
        while not self.stopping:
            answer = self._ask()
            if answer.act == "start":
                self.book.note(f"has its workers: {self.job.need}", state="running", why="", started_at=time.time())
                return answer.placed
            if time.monotonic() - noted_at > NOTE_S:
                news = f"waits: {answer.why}" if answer.why != said else ""
                self.book.note(news, state="queued", why=answer.why)
                said, noted_at = answer.why, time.monotonic()
            time.sleep(ASK_S)
        return None

    def _work(self, placed: Mapping[str, int]) -> tuple[int, bool]:
        """Runs the command to its end; its exit code, and whether it was told to make room."""
        where = [f"--place={node}={workers}" for node, workers in placed.items()]
        command = self._command(*(where if self.spec.record.kind == "train" else ()))
        steps, state = MetricsTail(self.folder.metrics), StepState()
        preempted = False
        while command.is_running:
            for line in steps.lines():
                state.take(line)
            answer = self._ask(placed, state.eta())
            if answer.act == "save" and not preempted and not self.stopping:
                preempted = True
                self.book.note(f"is told to save: it {answer.why}", state="saving", why=answer.why)
                command.save()
            if self.stopping and self.book.record.state != "saving":
                self.book.note("is told to save and stop", state="saving", why="stopped by its user")
            self.book.beat()
            time.sleep(ASK_S)
        code = command.wait()
        if code == 0:
            self.book.note(artifact=command.answer()["artifact"])
        return code, preempted

    def _ended(self, code: int) -> int:
        """Writes down how the job ended."""
        if code == 0:
            state, why = "succeeded", f"its artifact is {self.book.record.artifact}"
        elif code in (SAVED, STOPPED_AT_ONCE):
            state, why = "stopped", how_far(self.book.record)
        else:
            state, why = "failed", f"`tunesmith {self.book.record.kind}` ended with exit code {code}; its log says why"
        self.book.note(f"{state}: {why}", state=state, why=why, exit_code=code, ended_at=time.time())
        return code if code >= 0 else FAILED

    def _ask(self, holds: Mapping[str, int] | None = None, remaining_s: float | None = None) -> Answer:
        waited_s = time.time() - self.spec.record.submitted_at
        answer = self._tell(self.desk.ask, self.job, waited_s, holds, remaining_s)
        return answer or Answer("wait" if holds is None else "go on", "the queue does not answer")

    def _tell(self, method: Any, *arguments: Any) -> Any:
        """Asks the desk; None when it does not answer, because it or the head is being restarted: workers go on meanwhile."""
        try:
            return ray.get(method.remote(*arguments), timeout=10)
        except (RayActorError, GetTimeoutError, LostHeadError) as away:
            self.book.say(f"warning: the queue does not answer: {str(away).partition(chr(10))[0]}")
            return None

    def _stop(self, *_: object) -> None:
        """SIGTERM. `ray job stop` sends it to the command too, which saves: it is not sent on, as the second would end it at once."""
        self.stopping = True


if __name__ == "__main__":
    raise SystemExit(main())
