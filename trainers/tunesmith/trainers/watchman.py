"""What the driver watches while workers train: whether they hang, and what becomes of their machines."""

from __future__ import annotations

import contextlib
import math
import socket
import time
from collections.abc import Callable

import psutil

from tunesmith.cluster.errors import LostHeadError
from tunesmith.cluster.events import Listener, Note, Warned
from tunesmith.cluster.ray_nodes import ray_nodes
from tunesmith.cluster.runs import RunFolder
from tunesmith.trainers.head_watch import HeadWatch
from tunesmith.trainers.heartbeat import Beat, interval, read_beat
from tunesmith.trainers.stall import Stall, StallWatch
from tunesmith.trainers.worker import log_file

DRAIN_POLL_S = 2.0


class Watchman:
    """Watches one attempt; `look` is called often and does its rounds when they are due.

    Args:
        head: of the cluster; None for a Ray of our own.
        is_elastic: whether the run goes on without a machine that is taken away.
        more: says how many workers to go on with instead, when it is time to.

    Attributes:
        stall: what hangs, once the attempt was given up for that.
        lost_head: what became of the head, once the attempt was given up for that.
        moves_on: whether the workers were asked to save for the run to go on with others.
    """

    def __init__(
        self,
        folder: RunFolder,
        attempt: int,
        world: int,
        stall_s: float,
        head: HeadWatch | None,
        is_elastic: bool,
        more: Callable[[], int | None],
    ) -> None:
        self.folder, self.attempt, self.world, self.head = folder, attempt, world, head
        self.is_elastic, self.moves_on, self._more = is_elastic, False, more
        self.stall: Stall | None = None
        self.lost_head: str | None = None
        self._watch = StallWatch(world, stall_s)
        self._every = min(interval(stall_s), DRAIN_POLL_S)
        self._due = time.monotonic() + self._every
        self._draining: set[str] = set()
        self._is_storage_told = False

    def look(self, on_event: Listener) -> None:
        """Gives the attempt up when it hangs, and has it save when a machine of it is drained."""
        now = time.monotonic()
        if now < self._due:
            return
        try:
            self._look(now, on_event)
            self._is_storage_told = False
        except OSError as error:  # beats lie on the same storage: those who seem to hang may only be unheard
            self.stall, self._due = None, now + self._every
            if not self._is_storage_told:
                on_event(Warned(f"storage fails: {error}; whether the workers hang cannot be told meanwhile"))
                self._is_storage_told = True

    def _look(self, now: float, on_event: Listener) -> None:
        if self.stall is not None:
            self._due = math.inf
            for rank in self.stall.odd:
                _kill(self.stall.beats[rank])
            return
        self._due = now + self._every
        beats = self._beats()
        self.stall = self._watch.look(beats, now)
        if self.stall is not None:
            self._give_up(self.stall)
            on_event(
                Warned(f"attempt {self.attempt} hangs: {self.stall.what}; all stacks are in {log_file(self.folder)}")
            )
            self._due = now + 3 * self._every  # those who still can write down their stacks and end themselves
        elif self.head is not None:
            self._look_at_the_cluster(self.head, beats, on_event)

    def _beats(self) -> dict[int, Beat]:
        found = ((rank, read_beat(self.folder, rank)) for rank in range(self.world))
        return {rank: beat for rank, beat in found if beat is not None and beat.attempt == self.attempt}

    def _give_up(self, stall: Stall) -> None:
        with log_file(self.folder).open("a") as log:
            log.write(stall.report())
        self.folder.abort_file(self.attempt).touch()

    def _look_at_the_cluster(self, head: HeadWatch, beats: dict[int, Beat], on_event: Listener) -> None:
        self.lost_head = head.look(time.monotonic())
        if self.lost_head is not None:
            self.folder.abort_file(self.attempt).touch()
        elif not head.is_silent:
            with contextlib.suppress(LostHeadError):  # which the next look finds
                self._look_for_drains(beats, on_event)
                if len(beats) == self.world:  # what workers that are not there yet will take still looks free
                    self._look_for_room(on_event)

    def _look_for_drains(self, beats: dict[int, Beat], on_event: Listener) -> None:
        draining = {node.id: node.deadline for node in ray_nodes() if node.is_draining}
        for rank, beat in sorted(beats.items()):
            if beat.node in draining and beat.node not in self._draining:
                deadline = draining[beat.node]
                within = f" within {deadline - time.time():.0f} s" if deadline is not None else ""
                why = f"the machine {beat.host} of rank {rank} is to be taken away{within}"
                self.folder.request_stop_of(self.attempt, why)
                self._draining.add(beat.node)
                self.moves_on = self.is_elastic
                on_event(Warned(f"{why}: the workers save after this step"))

    def _look_for_room(self, on_event: Listener) -> None:
        more = None if self.moves_on else self._more()
        if more is not None:
            why = f"there is room for {more} workers instead of {self.world}"
            self.folder.request_stop_of(self.attempt, why)
            self.moves_on = True
            on_event(Note(f"{why}: they save after this step, and the run goes on with more"))


def _kill(beat: Beat) -> None:
    """Ends a worker of this machine, which may be stopped and cannot end itself; Ray ends those of others."""
    if beat.host != socket.gethostname():
        return
    with contextlib.suppress(psutil.NoSuchProcess, psutil.AccessDenied):  # gone, or another user's: Ray's to end
        process = psutil.Process(beat.pid)
        if process.create_time() == beat.started:
            process.kill()


def who(folder: RunFolder, attempt: int, rank: int) -> str:
    """Which process the worker of this rank was, for a message."""
    beat = read_beat(folder, rank)
    return beat.who if beat is not None and beat.attempt == attempt else "its process"
