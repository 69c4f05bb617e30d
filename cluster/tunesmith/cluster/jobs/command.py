"""The command that a job runs, `tunesmith train` or `tunesmith sweep`, as a process whose output is passed on."""

from __future__ import annotations

import ctypes
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from typing import IO, Any

ERROR, WAITING, WARNING = "error: ", "waiting up to ", "warning: "
"""How lines begin that say why a command has failed (`console.show_error`), what an elastic run waits for, or what is amiss."""
FAULT = f"{WARNING}attempt "
"""How those begin that say what became of an attempt: that it lost workers, that it hangs, or with how many it goes on."""


class Command:
    """`tunesmith …`, started. Every line that it prints is said."""

    def __init__(self, arguments: list[str], secrets: Mapping[str, str], say: Callable[[str], None]) -> None:
        self.began = time.monotonic()
        self._told = False
        pipe = subprocess.PIPE
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tunesmith.cluster.main", *arguments],
            stdout=pipe,
            stderr=pipe,
            text=True,
            errors="replace",
            env=os.environ | secrets,
            preexec_fn=_end_with_me,
        )
        assert self._process.stdout is not None
        assert self._process.stderr is not None
        self._out, self._said = _Reader(self._process.stdout, say), _Reader(self._process.stderr, say)

    @property
    def is_running(self) -> bool:
        return self._process.poll() is None

    def save(self) -> None:
        """Tells it to save and stop; once, as a second signal would end it at once."""
        if not self._told:
            self._told = True
            self._process.send_signal(signal.SIGTERM)

    @property
    def error(self) -> str:
        """What it ended of, as its last `error:` line says; empty when it has said none."""
        return self._said.error

    @property
    def waits(self) -> str:
        """What it waits for, if that is the last that it has said."""
        return self._said.last if self._said.last.startswith(WAITING) else ""

    def faults(self) -> list[str]:
        """What it has said of its attempts since this was asked last."""
        said = self._said.faults
        return [said.popleft() for _ in range(len(said))]

    def wait(self) -> int:
        """Its exit code, when it has ended and all that it printed was said."""
        self._process.wait()
        self._out.join()
        self._said.join()
        return self._process.returncode

    def answer(self) -> dict[str, Any]:
        """The line of JSON with which a command that was given --json and has succeeded ends."""
        return json.loads(self._out.last)


class _Reader(threading.Thread):
    """Says every line of a stream, until its end. `say` must not raise: a pipe that nobody empties blocks the command."""

    def __init__(self, stream: IO[str], say: Callable[[str], None]) -> None:
        super().__init__(daemon=True)
        self._stream, self._say = stream, say
        self.last = self.error = ""
        self.faults: deque[str] = deque()
        self.start()

    def run(self) -> None:
        for line in self._stream:
            self.last = line.rstrip("\n")
            if self.last.startswith(ERROR):
                self.error = self.last.removeprefix(ERROR)
            elif self.last.startswith(FAULT):
                self.faults.append(self.last.removeprefix(WARNING))
            self._say(self.last)


def _end_with_me() -> None:
    """In the command, before it begins: if the driver dies, the kernel tells it to save and stop."""
    pr_set_pdeathsig = 1
    ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGTERM)
