"""Whether an attempt hangs, and which rank is the odd one: pure decisions from what workers say of themselves."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field

from tunesmith.trainers.heartbeat import Beat


@dataclass(frozen=True)
class Stall:
    """An attempt that will not go on by itself.

    Attributes:
        odd: what is wrong with each rank that keeps the others waiting; all ranks, when nobody can tell.
        what: the whole of it in a sentence.
        beats: the last that was heard of each rank.
    """

    odd: dict[int, str]
    what: str
    beats: dict[int, Beat]

    def report(self) -> str:
        """Where every rank stood, for the log."""
        lines = [f"=== the attempt hangs: {self.what}"]
        for rank, beat in sorted(self.beats.items()):
            lines.append(f"rank {rank} ({beat.who}) {beat.where}; last seen at:")
            lines += [f"    {call}" for call in beat.stack]
        return "\n".join(lines) + "\n"


@dataclass
class StallWatch:
    """Watches the beats of one attempt.

    Args:
        world: workers.
        stall_s: seconds without a beat, or without any worker's moving, that make a hang.
    """

    world: int
    stall_s: float
    _heard: dict[int, tuple[int, float]] = field(default_factory=dict)

    def look(self, beats: Mapping[int, Beat], now: float) -> Stall | None:
        """Takes in the newest beats at `now`, in seconds of the driver's own clock; clocks of machines differ.

        A rank that has never beaten is still starting, which is Ray's to watch; one that has left is done.
        """
        at_work = {rank: beat for rank, beat in beats.items() if not beat.has_left}
        for rank, beat in at_work.items():
            if self._heard.get(rank, (-1, now))[0] != beat.count:
                self._heard[rank] = (beat.count, now)
        silent = {rank: now - self._heard[rank][1] for rank in at_work}
        gone = [rank for rank, seconds in silent.items() if seconds >= self.stall_s]
        all_still = len(beats) == self.world and all(beat.still_s >= self.stall_s for beat in at_work.values())
        if not at_work or not (gone or all_still):
            return None
        odd = {rank: f"has given no sign of life for {silent[rank]:.0f} s" for rank in gone}
        if not odd:
            odd = {rank: f"{beat.where} for {beat.still_s:.0f} s" for rank, beat in _apart(at_work).items()}
        return Stall(odd, _sentence(odd, at_work), dict(beats))


def _apart(beats: Mapping[int, Beat]) -> dict[int, Beat]:
    """The ranks that stand elsewhere than most; those in no collective operation, where as many stand here as there."""
    places = Counter(_place(beat) for beat in beats.values())
    most = max(places.values())
    common = [place for place, count in places.items() if count == most]
    if len(places) == 1:
        return dict(beats)
    if len(common) > 1:
        alone = {rank: beat for rank, beat in beats.items() if not beat.collective}
        return alone or dict(beats)
    return {rank: beat for rank, beat in beats.items() if _place(beat) != common[0]}


def _place(beat: Beat) -> str:
    return beat.collective or (beat.stack[-1] if beat.stack else "")


def _sentence(odd: Mapping[int, str], beats: Mapping[int, Beat]) -> str:
    named = ", ".join(f"rank {rank} ({beats[rank].who}) {why}" for rank, why in sorted(odd.items()))
    others = Counter(beat.where for rank, beat in sorted(beats.items()) if rank not in odd)
    if not others:
        return named
    waiting = ", ".join(_those(beats, odd, where) for where in others)
    return f"{named}; {waiting}"


def _those(beats: Mapping[int, Beat], odd: Mapping[int, str], where: str) -> str:
    """The ranks that stand at one place, the first few by number."""
    found = [rank for rank, beat in sorted(beats.items()) if rank not in odd and beat.where == where]
    shown = ", ".join(map(str, found[:8])) + (f" and {len(found) - 8} more" if len(found) > 8 else "")
    if len(found) == 1:
        return f"rank {shown} {where}"
    verb, _, place = where.partition(" ")
    return f"ranks {shown} {verb.removesuffix('s')} {place}"
