"""Whether the head of the cluster is still there, seen by the driver of an attempt."""

from __future__ import annotations

from tunesmith.cluster.session import RaySession

PATIENCE_S = 30.0
"""Without an answer the driver leaves the cluster. Ray itself ends the process that it runs in after 60 s of this."""


class HeadWatch:
    """Watches the head that the session has joined."""

    def __init__(self, session: RaySession) -> None:
        self._session = session
        self._silent_since: float | None = None

    def look(self, now: float) -> str | None:
        """Why the driver must join a cluster anew, if it must. `now` is of a clock that never goes back, in seconds."""
        if not self._session.head_answers():
            if self._silent_since is None:
                self._silent_since = now
            silent_s = now - self._silent_since
            return f"{self._name} has not answered for {silent_s:.0f} s" if silent_s >= PATIENCE_S else None
        if self._silent_since is not None and not self._session.is_same_cluster():
            return f"{self._name} was started again and has forgotten its cluster"
        self._silent_since = None
        return None

    @property
    def is_silent(self) -> bool:
        """Whether it did not answer when it was last looked for: who asks Ray anything waits."""
        return self._silent_since is not None

    @property
    def _name(self) -> str:
        return f"the head of the cluster at {self._session.head}"
