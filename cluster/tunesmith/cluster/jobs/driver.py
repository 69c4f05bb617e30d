"""What a submitted job runs on the cluster: `python -m tunesmith.cluster.jobs.driver`.

It waits for its turn at the desk, runs the very command that a user would (`tunesmith train` or `tunesmith sweep`), and watches it: all that
it prints goes to Ray's log of the job and to the run's folder, secrets hidden. When the desk asks for the workers, the command is told to save,
and the job waits for its next turn. Loads neither torch nor the data, so that a waiting job is cheap.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import signal
import time
import traceback
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import ray
import yaml
from ray._private.runtime_env.constants import RAY_JOB_CONFIG_JSON_ENV_VAR
from ray.exceptions import RayActorError, RayError, RayTaskError

from tunesmith.cluster.errors import LostHeadError, RunBusyError, TunesmithError, UsageError
from tunesmith.cluster.jobs import secrets
from tunesmith.cluster.jobs.book import NOTE_S, OWED_S, Book
from tunesmith.cluster.jobs.command import Command
from tunesmith.cluster.jobs.desk import Answer, find_desk
from tunesmith.cluster.jobs.spec import METADATA_KEY, JobSpec
from tunesmith.cluster.jobs.states import FAILED, SAVED, ending
from tunesmith.cluster.jobs.versions import differences, here
from tunesmith.cluster.patience import STOP_GRACE_S, patiently
from tunesmith.cluster.progress import StepState
from tunesmith.cluster.queue.state import Job
from tunesmith.cluster.recipe.load import load_recipe
from tunesmith.cluster.resources import Need, needs
from tunesmith.cluster.runs import RunFolder
from tunesmith.cluster.runstore import how_far, record_file
from tunesmith.cluster.session import RaySession
from tunesmith.cluster.storage import write_atomic
from tunesmith.cluster.tail import MetricsTail

ASK_S = 1.0
BIRTH_S = 0.2
"""A command so young has no handler of signals yet."""


def main() -> int:
    """Runs the job that Ray's environment describes to its end; returns its exit code."""
    described = json.loads(os.environ[RAY_JOB_CONFIG_JSON_ENV_VAR])
    spec = JobSpec.model_validate_json(described["metadata"][METADATA_KEY])
    book = Book(spec.record)
    try:
        _enter_folder(spec)
        book.begin()
        code = Driver(spec, book).run()
    except Exception as error:  # noqa: BLE001 - the one place where a job's errors end
        foreseen = isinstance(error, TunesmithError)
        code = error.exit_code if foreseen else FAILED
        book.say(f"error: {error}" if foreseen else "".join(traceback.format_exception(error)))
        why = str(error).partition("\n")[0].rstrip(":") or type(error).__name__
        book.note(f"failed: {why}", state="failed", why=why, exit_code=code, ended_at=time.time())
    finally:
        book.close()
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


class Driver:
    """One job from its start on the cluster to its end."""

    def __init__(self, spec: JobSpec, book: Book) -> None:
        self.spec, self.book = spec, book
        self.folder = RunFolder(Path(spec.record.folder))
        self.recipe_file = record_file(self.folder.root, spec.record.id).with_suffix(".yaml")
        self.options: list[str] = []
        """Of the command, besides its recipe."""
        self.stopped_at = math.inf
        """When it was told to stop, on the monotonic clock."""
        self._desk_is_away = False
        signal.signal(signal.SIGTERM, self._stop)

    @property
    def stopping(self) -> bool:
        return not math.isinf(self.stopped_at)

    def run(self) -> int:
        """Waits, works and waits again, until the run has ended; returns its exit code."""
        self._check()
        with RaySession() as session:
            session.nodes()
            self._write_recipe()
            self._wait_for_run()
            need = None if self.stopping else self._needs(session)
            if need is None:
                return self._ended(SAVED)
            record = self.spec.record
            self.job = Job(
                record.id, record.user, need, 0.0, record.priority, "", self.spec.preemptible, self.spec.expected_s
            )
            self.desk = find_desk()
            try:
                while True:
                    placed = self._wait(session)
                    if placed is None:
                        return self._ended(SAVED)
                    code, preempted, error = self._work(placed)
                    self._tell(self.desk.leave, self.job.id)
                    if not (preempted and code == SAVED and not self.stopping):
                        return self._ended(code, error)
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
        recipe = yaml.safe_dump(self.spec.recipe, sort_keys=False, allow_unicode=True)
        patiently(lambda: write_atomic(self.recipe_file, recipe), OWED_S, self.book.say)

    def _wait_for_run(self) -> None:
        """Waits while another command is at work on the run: that of a driver that was lost may still be saving.

        Raises:
            RunBusyError: it was at work for as long as a stopped job may take to save.
        """
        until, told = time.monotonic() + STOP_GRACE_S, False
        while not self.stopping:
            try:
                with self.folder.lock():
                    return
            except RunBusyError as busy:
                if time.monotonic() > until:
                    raise
                if not told:
                    self.book.note(f"waits: {busy.what}", state="queued", why=busy.what)
                    told = True
            self.book.beat()
            time.sleep(ASK_S)

    def _needs(self, session: RaySession) -> Need | None:
        """All that the job takes at once; None when it is stopped meanwhile.

        A sweep says itself how much that is, and is then held to as many trials at once, though the cluster may have grown
        when its turn comes.

        Raises:
            UsageError, TunesmithError: the sweep cannot begin.
        """
        if self.spec.record.kind == "train":
            return needs(load_recipe(self.recipe_file).cluster, session.nodes())
        self.book.note(state="queued", why="its sweep is checked before it waits for its turn")
        command = self._command("--dry-run")
        while command.is_running:
            self._pause(command)
        code = command.wait()
        if self.stopping:
            return None
        if code:
            kind = UsageError if code == UsageError.exit_code else TunesmithError
            raise kind(command.error or f"`tunesmith sweep --dry-run` ended with exit code {code}; its log says why")
        planned = command.answer()
        if planned["concurrent"] is not None:
            self.options = ["--set", f"tune.concurrent={planned['concurrent']}"]
        return Need(**planned["need"])

    def _command(self, *options: str) -> Command:
        arguments = [self.spec.record.kind, str(self.recipe_file), "--json", *self.options, *options]
        return Command(arguments, self.book.hidden, self.book.say)

    def _wait(self, session: RaySession) -> Mapping[str, int] | None:
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
                self._look_again(session)
            time.sleep(ASK_S)
        return None

    def _look_again(self, session: RaySession) -> None:
        """What a worker of a run takes may follow from the nodes, which come and go while it waits."""
        if self.spec.record.kind == "train":
            with contextlib.suppress(LostHeadError):  # `_ask` says so
                self.job = replace(self.job, need=needs(load_recipe(self.recipe_file).cluster, session.nodes()))

    def _work(self, placed: Mapping[str, int]) -> tuple[int, bool, str]:
        """Runs the command to its end; its exit code, whether it was told to make room, and its last error."""
        where = [f"--place={node}={workers}" for node, workers in placed.items()]
        command = self._command(*(where if self.spec.record.kind == "train" else ()))
        steps, state = MetricsTail(self.folder.metrics), StepState()
        preempted = False
        while command.is_running:
            with contextlib.suppress(OSError):  # the storage fails for a while: the end is guessed from older steps
                for line in steps.lines():
                    state.take(line)
            answer = self._ask(placed, state.eta())
            if answer.act == "save" and not preempted and not self.stopping:
                preempted = True
                self.book.note(f"is told to save: it {answer.why}", state="saving", why=answer.why)
                command.save()
            if self.stopping and self.book.record.state != "saving":
                self.book.note("is told to save and stop", state="saving", why="stopped by its user")
            if self.book.record.state == "running" and command.waits != self.book.record.why:
                self.book.note(why=command.waits)
            for fault in command.faults():
                self.book.add_event(fault)
            self._pause(command)
        code = command.wait()
        if code == 0:
            self.book.note(artifact=command.answer()["artifact"])
        if code == -signal.SIGTERM and (preempted or self.stopping):
            code = SAVED  # it had no handler yet, and nothing that it could have saved
        return code, preempted, command.error

    def _pause(self, command: Command) -> None:
        """Until the desk is asked again."""
        self.book.beat()
        time.sleep(ASK_S)
        if self.stopped_at - command.began < BIRTH_S:
            # Ray signals the processes that it has counted a moment before. Had it counted this one, it would have ended.
            command.save()

    def _ended(self, code: int, error: str = "") -> int:
        """Writes down how the job ended; its exit code."""
        state, why = ending(self.book.record, code, error)
        self.book.note(f"{state}: {why}", state=state, why=why, exit_code=code, ended_at=time.time())
        return code if code >= 0 else FAILED

    def _ask(self, holds: Mapping[str, int] | None = None, remaining_s: float | None = None) -> Answer:
        waited_s = time.time() - self.spec.record.submitted_at
        answer = self._tell(self.desk.ask, self.job, waited_s, holds, remaining_s)
        return answer or Answer("wait" if holds is None else "go on", "the queue does not answer")

    def _tell(self, method: Any, *arguments: Any) -> Any:
        """Asks the desk; None when it does not answer or fails, because it or the head is being restarted: workers go on meanwhile."""
        try:
            answer = ray.get(method.remote(*arguments), timeout=10)
        except (RayError, LostHeadError) as away:
            if not self._desk_is_away:
                self.book.say(f"warning: the queue does not answer, and is asked again ({_cause(away)})")
            self._desk_is_away = True
            return None
        self._desk_is_away = False
        return answer

    def _stop(self, *_: object) -> None:
        """SIGTERM. `ray job stop` sends it to the command too, which saves: it is not sent on, as a second would end it at once."""
        self.stopped_at = min(self.stopped_at, time.monotonic())


def _cause(away: BaseException) -> str:
    """What kept the desk from answering, in a few words: what Ray says of it has many lines."""
    if isinstance(away, RayActorError):
        return "it is being started anew"
    if isinstance(away, RayTaskError) and not isinstance(away, LostHeadError):
        return str(away).strip().rpartition("\n")[2]
    return "the cluster's head is away"


if __name__ == "__main__":
    raise SystemExit(main())
