"""Jobs from outside: everything goes through Ray's jobs API, with the cluster's token, from wherever its port can be reached."""

from __future__ import annotations

import logging
import os
import re
import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import datetime, timedelta
from typing import Any

from ray.exceptions import AuthenticationError
from ray.job_submission import JobDetails, JobStatus, JobSubmissionClient

from tunesmith.cluster.errors import ChangedError, ResourceError, UsageError
from tunesmith.cluster.jobs.spec import METADATA_KEY, JobSpec, job_id, left_out, prefix
from tunesmith.cluster.jobs.states import Seen, state_of
from tunesmith.cluster.local import token_for
from tunesmith.cluster.patience import STOP_GRACE_S
from tunesmith.cluster.runstore import JobRecord, RunStore

ENTRYPOINT = "exec python -m tunesmith.cluster.jobs.driver"
DASHBOARD = re.compile(r"https?://(?:\[[\da-fA-F:]+\]|[^/:@\s\[\]]+)(?::\d{1,5})?(?:/\S*)?")
PATIENCE_S = 180.0
"""How long a head may be away, because it is being restarted, before a submission gives up."""
RETRY_S = 1.0
REFUSED = re.compile(r"status code 4\d\d")
"""In what Ray's client says of an answer that asking again does not change."""
GRACE = "RAY_JOB_STOP_WAIT_TIME_S"
"""Of a job's variables; Ray's own."""
ADDRESSES = ("RAY_API_SERVER_ADDRESS", "RAY_ADDRESS")
ENVIRONMENT = threading.Lock()
"""Held while variables are taken out of it."""
FREE_AFTER = ("failed", "stopped", "lost")
"""Ends after which a key stands for the next job of its run."""


class HeadNotJoinedError(ConnectionError):
    """A head answers that has just been started."""


class Cluster:
    """A Ray cluster's jobs."""

    def __init__(
        self, address: str, patience_s: float = PATIENCE_S, tell: Callable[[str], None] = lambda _: None
    ) -> None:
        """
        Args:
            address: of the dashboard, as `dashboard_address` takes it.
            patience_s: how long to try while nothing answers.
            tell: is told that it does not.

        Raises:
            UsageError: it cannot be an address of a dashboard.
            ResourceError: nothing answers there, or the token is not taken.
        """
        self.address = dashboard_address(address)
        self._patience_s, self._tell = patience_s, tell
        logging.getLogger("ray").setLevel(logging.ERROR)  # it says when a log has ended
        token = token_for(self.address)
        headers = {"Authorization": f"Bearer {token}"} if token else None
        with _environment_names_no_other():
            self._client = self._patiently(lambda: JobSubmissionClient(self.address, headers=headers))

    def submit(
        self, spec: JobSpec, store: RunStore, runtime_env: dict[str, Any], grace_s: int = STOP_GRACE_S
    ) -> JobRecord:
        """Submits a job, or returns the one that its idempotency key already stands for.

        A key stands for a job that has not ended, or that has succeeded. After any other end it is free for the next one,
        which goes on with the same run. Ray refuses a second job of one name, so of many that submit at once one wins, and
        trying again after an answer was lost does no harm.

        Raises:
            ChangedError: the key stands for a job with another recipe.
            UsageError: the cluster refuses what is submitted, as when the package of the code is too large.
            ResourceError: the cluster does not answer.
        """
        deadline = time.monotonic() + self._patience_s
        while True:
            known, number = self._latest(spec.record, store)
            if known is not None and known.state not in FREE_AFTER:
                if known.recipe != spec.record.recipe:
                    where = "has succeeded" if known.state == "succeeded" else "waits or is at work"
                    raise ChangedError(
                        f"job {known.id} of the same key {where} with another recipe",
                        "Stop it first, give the run another name, or submit with another --key.",
                    )
                return known
            record = spec.record.model_copy(
                update={
                    "id": job_id(spec.record.run, spec.record.key, number),
                    "number": number,
                    "cluster": self.address,
                }
            )
            whole = spec.model_copy(update={"record": record})
            try:
                self._client.submit_job(
                    entrypoint=ENTRYPOINT,
                    submission_id=record.id,
                    metadata={METADATA_KEY: whole.model_dump_json()},
                    runtime_env=_with_grace(runtime_env, grace_s),
                )
            except (OSError, RuntimeError, ValueError) as error:
                was_faster = "already exists" in str(error)  # another submission of the key
                if not was_faster and (isinstance(error, ValueError) or REFUSED.search(str(error))):
                    raise UsageError(f"the cluster at {self.address} does not take the job: {_told(error)}") from error
                if time.monotonic() > deadline:
                    raise self._unreachable(error) from error
                time.sleep(RETRY_S)  # or the head is away: what it knows then decides
                continue
            return store.add(record, f"submitted to {self.address} by {record.user}")

    def left_out(self, id: str, spec: JobSpec, runtime_env: dict[str, Any], grace_s: int) -> list[str]:
        """The options of a submission that the job has not which was there before; see `spec.left_out`."""
        details = self._patiently(lambda: self._client.get_job_info(id))
        submitted, its = _spec(details), details.runtime_env or {}
        assert submitted is not None, f"{id} is a job of ours and tells of none"
        grace = str(grace_s)
        is_other_grace = grace_s != STOP_GRACE_S and its.get("env_vars", {}).get(GRACE) != grace
        return left_out(spec, runtime_env, submitted, its) + ([f"--grace {grace}"] if is_other_grace else [])

    def look(self) -> tuple[dict[str, Seen], dict[str, JobRecord]]:
        """What Ray says of every job of ours, and what was submitted, by id."""
        found = [(one, spec) for one in self._patiently(self._client.list_jobs) if (spec := _spec(one))]
        alive = self._patiently(self._live_nodes)
        records = {spec.record.id: spec.record for _, spec in found}
        return {spec.record.id: _seen(one, alive) for one, spec in found}, records

    def stop(self, id: str) -> None:
        """Asks a job to save and stop; Ray ends it when its grace is over."""
        self._patiently(lambda: self._client.stop_job(id))

    def log(self, id: str) -> str:
        """All that a job has printed, from the node of its driver."""
        return self._patiently(lambda: self._client.get_job_logs(id))

    def follow(self, id: str) -> Iterator[str]:
        """What a job prints, until it ends. While its node does not answer it is asked again, and nothing is said twice.

        The whole log is fetched each time: it holds what the driver says, a few kilobytes an hour. What workers print does not
        come here.
        """
        said = 0
        while True:
            ended = self._patiently(lambda: self._client.get_job_status(id)).is_terminal()
            whole = self.log(id)
            yield whole[said:]
            said = len(whole)
            if ended:
                return
            time.sleep(RETRY_S)

    def _latest(self, record: JobRecord, store: RunStore) -> tuple[JobRecord | None, int]:
        """The newest job of the key on this cluster, in its true state, and the number of the next one.

        One look at the cluster decides: between two, others submit. The store is read first. What it knows was on the cluster
        before; if it is not there afterwards, the cluster has lost it. No number is given twice, on whichever cluster.
        """
        start = prefix(record.run, record.key)
        noted = [one for one in store.jobs() if one.id.startswith(start)]
        seen, records = self.look()
        known = {id: one for id, one in records.items() if id.startswith(start)}
        known |= {one.id: one for one in noted if one.cluster == self.address}
        number = 1 + max((one.number for one in [*noted, *known.values()]), default=0)
        if not known:
            return None, number
        last = max(known.values(), key=lambda one: one.number)
        state, why = state_of(last, seen.get(last.id), time.time())
        return last.model_copy(update={"state": state, "why": why}), number

    def _live_nodes(self) -> set[str]:
        """Ids of the nodes that live.

        A restarted head still believes for half a minute in the one that it was before, and knows that one alone until it has
        joined itself. What is not there any more has said nothing of its machine since the restart.
        """
        answer = self._client._do_request("GET", "/nodes?view=summary")
        answer.raise_for_status()
        summary = answer.json()["data"]["summary"]
        nodes = [node["raylet"] for node in summary]
        speaking = {node["raylet"]["nodeId"] for node in summary if node.get("hostname")}
        heads = sorted((int(node["startTimeMs"]), node["nodeId"]) for node in nodes if node.get("isHeadNode"))
        if not heads or heads[-1][1] not in speaking:
            raise HeadNotJoinedError("its head has not yet joined it")
        gone = {id for _, id in heads[:-1]}
        return {node["nodeId"] for node in nodes if node.get("state") == "ALIVE"} - gone

    def _patiently(self, call: Callable[[], Any]) -> Any:
        deadline, told = time.monotonic() + self._patience_s, False
        while True:
            try:
                return call()
            except (OSError, RuntimeError, AuthenticationError) as error:
                if "does not exist" in str(error):
                    raise UsageError(
                        f"the cluster at {self.address} knows no such job", "`tunesmith jobs` lists them."
                    ) from error
                if time.monotonic() > deadline or _is_final(error):
                    raise self._unreachable(error) from error
                if not told:
                    until = datetime.now() + timedelta(seconds=self._patience_s)
                    self._tell(f"{self.address} does not answer ({_told(error)}); trying until {until:%H:%M:%S}")
                    told = True
                time.sleep(RETRY_S)

    def _unreachable(self, error: BaseException) -> ResourceError:
        if isinstance(error, AuthenticationError):
            return ResourceError(
                f"the cluster at {self.address} does not take this token: {_told(error)}",
                "Set RAY_AUTH_MODE=token, and RAY_AUTH_TOKEN or RAY_AUTH_TOKEN_PATH to the cluster's token.",
            )
        if isinstance(error, HeadNotJoinedError):
            return ResourceError(
                f"the cluster at {self.address} answers, but {error}",
                "A head that has just started takes some seconds.",
            )
        return ResourceError(
            f"no cluster answers at {self.address}: {_told(error)}",
            "Check the address (of the dashboard, as in http://127.0.0.1:8265), and whether its head is up.",
        )


@contextmanager
def _environment_names_no_other() -> Iterator[None]:
    """Ray's client takes an address from the environment before the one that it is given."""
    with ENVIRONMENT:
        named = {name: os.environ.pop(name) for name in ADDRESSES if name in os.environ}
        try:
            yield
        finally:
            os.environ.update(named)


def dashboard_address(given: str) -> str:
    """The address of a dashboard in the one form in which it is compared: http://HOST:PORT.

    Raises:
        UsageError: it is something else, such as Ray's own address.
    """
    whole = given if "://" in given else f"http://{given}"
    if given == "auto" or not DASHBOARD.fullmatch(whole):
        raise UsageError(
            f"--address {given}: jobs are handed to a cluster's dashboard",
            "Give its address, as in http://HOST:8265, or start a cluster here with `tunesmith up`.",
        )
    return whole.rstrip("/")


def _is_final(error: BaseException) -> bool:
    """Whether asking again is of no use: the token is wrong, nothing has that name, or it speaks no TLS."""
    return isinstance(error, AuthenticationError) or isinstance(_root(error), socket.gaierror | ssl.SSLError)


def _root(error: BaseException) -> BaseException:
    """What an error began with: Ray and its HTTP library wrap the one that says something."""
    while (before := error.__cause__ or error.__context__) is not None:
        error = before
    return error


def _told(error: BaseException) -> str:
    first = _root(error)
    text = first.strerror if isinstance(first, OSError) else None
    return text or str(error).strip().partition("\n")[0] or type(error).__name__


def _with_grace(runtime_env: dict[str, Any], grace_s: int) -> dict[str, Any]:
    variables = {
        **runtime_env.get("env_vars", {}),
        "RAY_JOB_STOP_SIGNAL": "SIGTERM",
        GRACE: str(grace_s),
    }
    return {**runtime_env, "env_vars": variables}


def _spec(details: JobDetails) -> JobSpec | None:
    written = (details.metadata or {}).get(METADATA_KEY)
    return JobSpec.model_validate_json(written) if written else None


def _seen(details: JobDetails, alive: set[str]) -> Seen:
    ended = details.status.is_terminal()
    node_gone = details.status == JobStatus.RUNNING and details.driver_node_id not in alive
    never_ended = details.status == JobStatus.FAILED and details.driver_node_id and details.driver_exit_code is None
    driver_lost = bool(node_gone or never_ended)
    ended_at = details.end_time / 1000 if ended and details.end_time else None
    return Seen(str(details.status), details.message or "", details.driver_exit_code, ended, driver_lost, ended_at)
