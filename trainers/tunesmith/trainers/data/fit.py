"""What becomes of an example that is longer than a packed row."""

from __future__ import annotations

from typing import Literal, NamedTuple

import numpy as np

from tunesmith.trainers.data.encoding import Encoded
from tunesmith.trainers.data.tokens import count_labels

Rule = Literal["truncate", "drop", "split"]


class Fitted(NamedTuple):
    """The examples that a row became, and how."""

    examples: list[Encoded]
    fate: Literal["whole", "truncated", "dropped", "split"]
    reason: str = ""
    """Why it was dropped."""


def fit(encoded: Encoded, max_length: int, rule: Rule) -> Fitted:
    """Brings an example to at most `max_length` tokens.

    `split` makes pieces that overlap by one token, which is context in the second and trained in the first only: so
    every label of the row is trained exactly once. Pieces without a label are left out. A row without any is dropped.
    """
    length = len(encoded.tokens)
    if length <= max_length:
        return Fitted([encoded], "whole")
    if rule == "drop":
        return Fitted([], "dropped", f"{length:,} tokens, longer than {max_length:,} (long_rows: drop)")
    if rule == "truncate":
        kept = Encoded(encoded.tokens[:max_length], encoded.trained[:max_length])
        if count_labels(kept.trained):
            return Fitted([kept], "truncated")
        return Fitted([], "dropped", f"none of its first {max_length:,} of {length:,} tokens is trained")
    pieces = [piece for piece in _pieces(encoded, max_length) if count_labels(piece.trained)]
    if pieces:
        return Fitted(pieces, "split")
    return Fitted([], "dropped", f"no piece of {max_length:,} of its {length:,} tokens has a token to train")


def _pieces(encoded: Encoded, max_length: int) -> list[Encoded]:
    stride = max(1, max_length - 1)
    pieces = []
    for begin in range(0, len(encoded.tokens) - 1, stride):
        trained = np.array(encoded.trained[begin : begin + max_length])
        if begin:
            trained[0] = False
        pieces.append(Encoded(encoded.tokens[begin : begin + max_length], trained))
    return pieces
