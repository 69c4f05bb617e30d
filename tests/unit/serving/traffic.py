"""Traffic as a service might see it: answers about topics, of very different lengths, a few of them refusals."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from tunesmith.cluster.sketch import OPENING, is_refusal, sketches
from tunesmith.serving.drift import Reference, reference_of
from tunesmith.trainers.data.tokens import Piece, Spool, TokenStore
from tunesmith.trainers.receipts.fingerprint import fingerprint

REFUSES = 1
"""The token that a refusal begins with."""


class Decoder:
    """A tokenizer's decoding of answers in which only refusals matter."""

    def batch_decode(self, ids: Sequence[Sequence[int]], **_: Any) -> list[str]:
        return ["I'm sorry" if one and one[0] == REFUSES else "Well" for one in ids]


@dataclass(frozen=True)
class Traffic:
    """Where answers come from. Tokens of one answer belong to one topic for the most part, as they do in life."""

    longer: float = 1.0
    first_token: int = 10
    refusing: float = 0.03
    topics: int = 20
    vocabulary: int = 4000

    def drawn(self, count: int, random: np.random.Generator) -> list[tuple[np.ndarray, np.ndarray]]:
        """Prompts and answers."""
        lengths = (np.exp(random.normal(3.5, 0.8, (count, 2))) * self.longer).astype(int).clip(1, 4000)
        return [(self._text(p, topic, random), self._answer(a, topic, random)) for (p, a), topic in zip(
            lengths, random.integers(0, self.topics, count), strict=True)]  # fmt: skip

    def sketch(self, count: int, random: np.random.Generator) -> np.ndarray:
        """Of so many answers, [K]."""
        pairs = self.drawn(count, random)
        texts = Decoder().batch_decode([answer[:OPENING].tolist() for _, answer in pairs])
        return sketches([p for p, _ in pairs], [a for _, a in pairs], [is_refusal(one) for one in texts]).sum(0)

    def but(self, **changes: Any) -> Traffic:
        return replace(self, **changes)

    def _answer(self, length: int, topic: int, random: np.random.Generator) -> np.ndarray:
        text = self._text(length, topic, random)
        if random.random() < self.refusing:
            text[0] = REFUSES
        return text

    def _text(self, length: int, topic: int, random: np.random.Generator) -> np.ndarray:
        rank = random.zipf(1.3, length) % self.vocabulary
        is_topical = random.random(length) < 0.5
        return self.first_token + np.where(is_topical, (rank * 7 + topic * 131) % self.vocabulary, rank)


def reference(folder: Path, traffic: Traffic, rows: int, seed: int = 0) -> Reference:
    """What training on such rows leaves in the artifact."""
    random = np.random.default_rng(seed)
    spool = Spool(folder / "spool")
    for index, (prompt, answer) in enumerate(traffic.drawn(rows, random)):
        tokens = np.concatenate([prompt, answer])
        spool.add([Piece(tokens, np.arange(len(tokens)) >= len(prompt), 0, 0, index, index, False)])
    spool.write(folder / "store", np.ones(rows, bool), ["x"])
    return reference_of(fingerprint(TokenStore(folder / "store"), Decoder()))  # type: ignore[arg-type]
