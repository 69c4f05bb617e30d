"""Signs of life: each worker says every few seconds where it stands, so that the driver can tell a hang from long work.

What it says lies in `control/rank-<rank>.json` of the run's folder. A process that is stopped, or whose machine is gone,
says nothing more; one that waits for ever says that it has not moved. Either way its last stack is known.
"""

from __future__ import annotations

import contextlib
import faulthandler
import json
import os
import socket
import sys
import threading
import time
import traceback
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import FrameType

import psutil

from tunesmith.cluster.runs import RunFolder

COLLECTIVES = str(Path("torch", "distributed", "distributed_c10d.py"))
"""Where torch's collective operations are; the innermost function of it on a stack is the one that waits."""
WRAPPERS = ("wrapper", "_object_to_tensor", "_tensor_to_object")
DEEPEST = 40
"""Frames of a stack that are told, the innermost ones."""


@dataclass(frozen=True)
class Beat:
    """What a worker says of itself.

    Attributes:
        attempt: the attempt it belongs to.
        pid, host: its process.
        started: when that process began, seconds since 1970; a number may come to name another process.
        node: Ray's id of its machine; empty where Ray did not start it.
        count: beats so far.
        still_s: seconds that its training thread has stood at one place.
        stack: that place, the innermost call last, as `file:line function`.
        collective: what it waits in with the other workers; empty when it does something of its own.
        has_left: whether it has ended by itself.
    """

    attempt: int
    pid: int
    host: str
    started: float = 0.0
    node: str = ""
    count: int = 0
    still_s: float = 0.0
    stack: tuple[str, ...] = ()
    collective: str = ""
    has_left: bool = False

    @property
    def who(self) -> str:
        """Its process in a few words."""
        return f"process {self.pid} on {self.host}"

    @property
    def where(self) -> str:
        """Its place in a few words."""
        if self.collective:
            return f"waits in {self.collective}"
        return f"stands in {self.stack[-1]}" if self.stack else "stands at its beginning"


def interval(stall_s: float) -> float:
    """Seconds between beats, for hangs to be noticed after `stall_s`."""
    return max(0.1, min(5.0, stall_s / 8))


class Heartbeat(threading.Thread):
    """Beats for the thread that makes it, until `leave`.

    Also ends the process when the driver gives the attempt up, for a worker that waits for ever cannot do so itself; what
    every thread of it does goes to the run's log first.
    """

    def __init__(self, run: RunFolder, attempt: int, rank: int, stall_s: float) -> None:
        super().__init__(name="heartbeat", daemon=True)
        self._path, self._abort = beat_file(run, rank), run.abort_file(attempt)
        self._rank, self._watched, self._interval = rank, threading.get_ident(), interval(stall_s)
        started, node = psutil.Process().create_time(), os.environ.get("RAY_NODE_ID", "")
        self._last = Beat(attempt, os.getpid(), socket.gethostname(), started, node)
        self._since = time.monotonic()
        self._has_moved = False
        self._left = threading.Event()
        self._path.parent.mkdir(exist_ok=True)
        self._write(self._last)

    def moved(self) -> None:
        """Notes that work goes on, wherever the thread is found next: a loop may wait for its device in one line only."""
        self._has_moved = True

    def run(self) -> None:
        while not self._left.wait(self._interval):
            self._beat()
            with contextlib.suppress(OSError):  # storage that fails asks nothing, and must not silence this thread
                if self._abort.exists():
                    self._end()

    def leave(self) -> None:
        """The last beat: the worker has ended by itself."""
        self._left.set()
        self.join()  # a beat that is being written would take the place of the last one
        self._write(replace(self._last, has_left=True))

    def _beat(self) -> None:
        frames = sys._current_frames()
        place = _place(frames.get(self._watched))
        now = time.monotonic()
        if self._has_moved or place != self._last.stack:
            self._since, self._has_moved = now, False
        stacks = [place, *(_place(frame) for thread, frame in frames.items() if thread != self._watched)]
        collective = next(filter(None, map(collective_of, stacks)), "")
        count, still_s = self._last.count + 1, now - self._since
        self._last = replace(self._last, count=count, still_s=still_s, stack=place, collective=collective)
        self._write(self._last)

    def _write(self, beat: Beat) -> None:
        part = self._path.with_suffix(".part")
        with contextlib.suppress(OSError):  # a disk that fails is told by those who save to it; a beat may be missed
            part.write_text(json.dumps(asdict(beat)))
            part.replace(self._path)

    def _end(self) -> None:
        print(
            f"rank {self._rank} (process {os.getpid()}) is ended because the attempt is given up; its threads:",
            flush=True,
        )
        faulthandler.dump_traceback(file=sys.stdout.fileno(), all_threads=True)
        time.sleep(2 * self._interval)  # Ray ends all others with the first that is gone: they write theirs meanwhile
        os._exit(1)


def _place(frame: FrameType | None) -> tuple[str, ...]:
    """The innermost calls of a stack, as `file:line function`."""
    calls = traceback.extract_stack(frame, DEEPEST) if frame is not None else []
    return tuple(f"{_short(call.filename)}:{call.lineno} {call.name}" for call in calls)


def _short(path: str) -> str:
    """A source file from its package on."""
    return path.rpartition("site-packages/")[2]


def collective_of(stack: Sequence[str]) -> str:
    """Name of the collective operation that a stack waits in; empty for none."""
    for call in reversed(stack):
        file, _, name = call.rpartition(" ")
        if file.rpartition(":")[0].endswith(COLLECTIVES) and name not in WRAPPERS:
            return name
    return ""


def beat_file(run: RunFolder, rank: int) -> Path:
    """Where the worker of this rank says how it is."""
    return run.stop_file.with_name(f"rank-{rank}.json")


def read_beat(run: RunFolder, rank: int) -> Beat | None:
    """The newest beat of a rank; None when there is none that can be read."""
    try:
        said = json.loads(beat_file(run, rank).read_text())
        return Beat(**said | {"stack": tuple(said["stack"])})
    except (OSError, ValueError, TypeError, KeyError):
        return None
