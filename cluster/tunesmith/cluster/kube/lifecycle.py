"""What a pod of a training job does before its command and before it is ended.

    python -m tunesmith.cluster.kube.lifecycle run JOB
    python -m tunesmith.cluster.kube.lifecycle save RUN --within 600

`run` is the entrypoint. JOB is a JSON file with the `command`, the `directory` that it begins in, the `run` whose turn it
waits for, and `within_s`: KubeRay starts a retry while the pods of the attempt before may still be saving. The command
stands in a file because KubeRay hands an entrypoint through two shells, which would take a recipe's values apart.

`save` is the preStop hook of every pod. RUN is the run's folder on the shared volume. It asks the workers to save and
waits until they have, because deleting a cluster signals Ray, which passes nothing on to a driver in time.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import sys
import time
from pathlib import Path

from tunesmith.cluster.errors import RunBusyError, TunesmithError
from tunesmith.cluster.runs import RunFolder

POLL_S = 1.0


def wait_for_turn(run: RunFolder, within_s: float) -> None:
    """Returns when the run is free, or does not exist yet.

    Raises:
        RunBusyError: it was not free in time; names the process and host that hold it.
    """
    end = time.monotonic() + within_s
    while run.root.exists():
        try:
            with run.lock():
                return
        except RunBusyError:
            if time.monotonic() > end:
                raise
            time.sleep(min(POLL_S, within_s))


def save(run: RunFolder, within_s: float) -> bool:
    """Asks the attempt at work to save and stop, and waits for it; False when it has not ended in time.

    An attempt that has ended, or a run that has none, is asked nothing.
    """
    attempt = run.current_attempt() if run.root.exists() else 0
    if attempt == 0 or run.outcome(attempt).exists():
        return True
    run.attempt_stop_file(attempt).parent.mkdir(parents=True, exist_ok=True)
    run.request_stop_of(attempt, f"the pod {socket.gethostname()} is to end")
    end = time.monotonic() + within_s
    while not run.outcome(attempt).exists():
        if time.monotonic() > end:
            return False
        time.sleep(min(POLL_S, within_s))
    return True


def run_job(path: Path) -> None:
    """Waits for the run's turn and becomes the job's command.

    Raises:
        RunBusyError: the run was not free in time.
    """
    job = json.loads(path.read_text(encoding="utf-8"))
    wait_for_turn(RunFolder(Path(job["run"])), job["within_s"])
    os.chdir(job["directory"])
    os.execvp(job["command"][0], job["command"])


def main() -> None:
    """Entry point; exit code 1 when the time was not enough."""
    parser = argparse.ArgumentParser(prog="tunesmith.cluster.kube.lifecycle")
    verbs = parser.add_subparsers(dest="verb", required=True)
    verbs.add_parser("run").add_argument("job", type=Path)
    save_ = verbs.add_parser("save")
    save_.add_argument("run", type=Path)
    save_.add_argument("--within", type=float, required=True, metavar="SECONDS")
    given = parser.parse_args()
    try:
        if given.verb == "run":
            run_job(given.job)
            return
        run = RunFolder(given.run.absolute())
        if not save(run, given.within):
            sys.exit(
                f"run {run.name} has not saved within {given.within:g} s; it goes on from step {run.newest_step()}"
            )
    except TunesmithError as error:
        sys.exit(str(error))


if __name__ == "__main__":
    main()
