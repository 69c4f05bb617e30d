"""What an engine has done since it was last asked, for the metrics and the drift monitor.

Answers are sketched where their tokens are, so no token id travels and no text is kept.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from tunesmith.cluster.sketch import OPENING, SIZE, is_refusal, sketches
from tunesmith.serving.engines.protocol import Version


@dataclass(frozen=True)
class News:
    """Since the last time.

    Attributes:
        loads: digests of the versions loaded, once for each time.
        evictions: of those let go.
        sketches: of the answers of each version by its digest, [K]; see `tunesmith.cluster.sketch`.
    """

    loads: tuple[str, ...] = ()
    evictions: tuple[str, ...] = ()
    sketches: dict[str, np.ndarray] = field(default_factory=dict)


@dataclass
class Diary:
    """One engine's. Written and taken in one thread."""

    _loads: list[str] = field(default_factory=list)
    _evictions: list[str] = field(default_factory=list)
    _sketches: dict[str, np.ndarray] = field(default_factory=dict)

    def loaded(self, digest: str) -> None:
        """A version has been loaded."""
        self._loads.append(digest)

    def evicted(self, digest: str) -> None:
        """A version has been let go."""
        self._evictions.append(digest)

    def answered(self, version: Version | None, prompt: Sequence[int], answer: Sequence[int], tokenizer: Any) -> None:
        """An answer has come to its end; those of the base alone, and of no tokens, are not kept.

        Args:
            prompt: token ids.
            answer: likewise, with the token that ended it.
            tokenizer: decodes the answer's first tokens, to see whether it refuses.
        """
        if version is None or not len(answer):
            return
        opening = tokenizer.decode(list(answer[:OPENING]), skip_special_tokens=True)
        (sketch,) = sketches([prompt], [answer], [is_refusal(opening)])
        self._sketches[version.digest] = self._sketches.get(version.digest, np.zeros(SIZE)) + sketch

    def take(self) -> News | None:
        """What there is, which is then forgotten; None when there is nothing."""
        if not (self._loads or self._evictions or self._sketches):
            return None
        news = News(tuple(self._loads), tuple(self._evictions), self._sketches)
        self._loads, self._evictions, self._sketches = [], [], {}
        return news
