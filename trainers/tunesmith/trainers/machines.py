"""The room that a cluster has for a run's workers, as machines come and go."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence, Set
from dataclasses import replace

from tunesmith.cluster.errors import LostHeadError, ResourceError, WorkerError
from tunesmith.cluster.events import Listener, Note
from tunesmith.cluster.ray_nodes import ray_nodes
from tunesmith.cluster.resources import Need, fitting, require_resources
from tunesmith.cluster.session import RaySession
from tunesmith.trainers.elastic import Growth, largest
from tunesmith.trainers.stopping import StopSignals

POLL_S = 2.0
SOON_POLL_S = 0.1
"""Between looks in the first `RETRY_S` seconds: mostly, Ray takes back what an attempt had within a tenth of a second."""
RELEASE_S = 10.0
"""Seconds within which Ray has given free what the workers of an attempt that is over had."""
RETRY_S = 1.0
"""How long Ray leaves workers alone for which it has found no room: to ask before there is room costs more than to wait for it."""


class Machines:
    """What is there for the workers of one run.

    Args:
        need: of as many workers as may be.
        worlds: numbers of workers that may be, ascending; a single one for a run that is not elastic.
        wait_s: how long to wait for the fewest, and for a head that is lost.
        grow_after_s: how long there must be room for more before it is used.
        signals: end every wait.
        places: workers by the id of the node that somebody has chosen for them, if somebody has.
    """

    def __init__(
        self,
        need: Need,
        worlds: Sequence[int],
        session: RaySession,
        wait_s: float,
        grow_after_s: float,
        signals: StopSignals,
        places: Mapping[str, int],
    ) -> None:
        self.need, self.worlds, self.session, self.signals, self.places = need, worlds, session, signals, places
        self.wait_s, self.grow_after_s = wait_s, grow_after_s

    def require(self) -> None:
        """Checks that the fewest workers fit.

        Raises:
            ResourceError: with the arithmetic.
        """
        require_resources(replace(self.need, workers=self.worlds[0]), self.session.nodes())

    def wait(self, on_event: Listener) -> Need:
        """What the next attempt asks for, once there is room for it: as many workers as there is room for now.

        A fixed number is waited for until the machines are there; whether others use them for longer is for Ray to see.

        Raises:
            WorkerError: there is no room for the fewest after `wait_s` seconds; says what is missing.
            StoppedError, InterruptedRunError: a signal came.
        """
        while True:
            try:
                return self._wait(on_event)
            except LostHeadError:
                self.rejoin(on_event)

    def _wait(self, on_event: Listener) -> Need:
        began, is_told = time.monotonic(), False
        while True:
            waited = time.monotonic() - began
            possible, room = largest(self.worlds, self._room(free=False)), self._room(free=True)
            now = largest(self.worlds, room)
            if now is not None and (now == possible or waited >= RELEASE_S):
                self._say_what_is_left(room, now, on_event)
                return replace(self.need, workers=now)
            if len(self.worlds) == 1 and possible is not None and waited >= min(RETRY_S, self.wait_s):
                return self.need  # others use the machines, and Ray waits for them
            if waited >= self.wait_s:
                raise WorkerError(
                    f"after {self.wait_s:.0f} s the cluster still lacks machines: {self._missing(room)}",
                    "When it has them again, the same command goes on from the last checkpoint.",
                )
            if not is_told and (possible is None or waited >= RELEASE_S):
                on_event(Note(f"waiting up to {self.wait_s:.0f} s for machines: {self._missing(room)}"))
                is_told = True
            self._pause("machines", SOON_POLL_S if waited < RETRY_S else POLL_S)

    def rejoin(self, on_event: Listener) -> None:
        """Joins the cluster anew after a lost attempt, and waits for it: of a head that has died, this process has only what
        answers no more.

        Raises:
            WorkerError: there is no cluster after `wait_s` seconds.
            StoppedError, InterruptedRunError: a signal came.
        """
        self.places = {}  # one of these nodes may be gone, and Ray may not know it yet
        if self.session.local:
            return
        self.session.close()
        began, is_told = time.monotonic(), False
        while (missing := self._missing_cluster()) is not None:
            if time.monotonic() - began >= self.wait_s:
                raise WorkerError(
                    f"after {self.wait_s:.0f} s {missing}",
                    "When the cluster is back, the same command goes on from the last checkpoint.",
                )
            if not is_told:
                on_event(Note(f"waiting up to {self.wait_s:.0f} s for the cluster: {missing}"))
                is_told = True
            self._pause("the cluster", POLL_S)

    def _missing_cluster(self) -> str | None:
        try:
            self.session.nodes()
        except ResourceError as error:
            self.session.close()
            return error.what
        return None

    def _pause(self, what: str, seconds: float) -> None:
        if self.signals.received is not None:
            raise self.signals.error(f"it was waiting for {what}, and no worker was at work")
        time.sleep(seconds)

    def nodes_for(self, need: Need) -> list[str]:
        """Ids of the nodes on which an attempt's workers are to be, one for each; empty where Ray may choose."""
        if not self.places:
            return []
        try:
            staying = {node.id for node in ray_nodes() if not node.is_draining}
        except LostHeadError:  # which the attempt will find out
            return []
        return still_good(self.places, need.workers, staying)

    def more_than(self, world: int) -> Callable[[], int | None]:
        """To be asked now and then while so many workers train: how many to go on with instead, None for no change."""
        growth = Growth(self.worlds, world, self.grow_after_s)
        return lambda: None if growth.is_over else growth.look(world + self._room(free=True), time.monotonic())

    def _room(self, free: bool) -> int:
        nodes = self.session.free_nodes() if free else self.session.staying_nodes()
        return sum(fitting(node, self.need) for node in nodes)

    def _missing(self, room: int) -> str:
        try:
            require_resources(replace(self.need, workers=self.worlds[0]), self.session.staying_nodes())
        except ResourceError as missing:
            return missing.what
        return f"there is room for {room} workers, and the run needs {self.worlds[0]}; others use the rest"

    def _say_what_is_left(self, room: int, taken: int, on_event: Listener) -> None:
        if taken < min(room, self.worlds[-1]):
            on_event(
                Note(
                    f"there is room for {room} workers, and {taken} are used: the micro-batches of a step divide among "
                    f"{', '.join(map(str, self.worlds))} workers only"
                )
            )


def still_good(places: Mapping[str, int], workers: int, staying: Set[str]) -> list[str]:
    """The node of each worker, if there are as many as were placed and none of the nodes is gone or leaves; else nothing."""
    if sum(places.values()) != workers or not places.keys() <= staying:
        return []
    return [node for node, count in places.items() for _ in range(count)]
