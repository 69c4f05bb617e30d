"""What a set of answers is like, in numbers that add up: training and serving keep the same ones and compare them.

A sketch is one vector of K float64 sums over answers: how many, histograms of the lengths of prompts and answers, of
hashed token ids of both, the sum of random projections, and the refusals. Two sketches of disjoint answers add up to
the sketch of all. Nothing of it says which answer a number came from, nor in which order tokens stood.

The embedding sketch needs no model: it is a fixed random projection (Achlioptas 2003) of the square roots of an
answer's and its prompt's token shares, so it tells which tokens go together, and nothing of what they mean.

R answers, K numbers of a sketch.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from functools import lru_cache
from itertools import pairwise

import numpy as np

BUCKETS = 1024
"""Of token ids, by hash."""
LENGTHS = 48
"""Bins of lengths: none, then two an octave."""
DIMENSIONS = 64
"""Of the projection."""
OPENING = 24
"""Tokens of an answer that are read to see whether it refuses."""
REFUSALS = (
    "i'm sorry",
    "i am sorry",
    "sorry,",
    "i can't",
    "i cannot",
    "i can not",
    "i won't",
    "i will not",
    "i'm unable",
    "i am unable",
    "i'm not able",
    "i am not able",
    "i apologize",
    "i apologise",
    "unfortunately, i ",
    "as an ai",
    "as a language model",
)
"""How answers begin that refuse, in lower case. English alone: in other languages the rate stays at zero."""

_AT = np.cumsum([0, 1, LENGTHS, LENGTHS, BUCKETS, BUCKETS, DIMENSIONS, 1, 1])
SIZE = int(_AT[-1])
"""K."""
_COUNT, _PROMPT_LENGTHS, _ANSWER_LENGTHS, _PROMPT_TOKENS, _ANSWER_TOKENS, _PROJECTED, _SPREAD, _REFUSED = (
    slice(int(begin), int(end)) for begin, end in pairwise(_AT)
)
PARTS: Mapping[str, slice] = {
    "prompt_lengths": _PROMPT_LENGTHS,
    "answer_lengths": _ANSWER_LENGTHS,
    "prompt_tokens": _PROMPT_TOKENS,
    "answer_tokens": _ANSWER_TOKENS,
    "embedding": _PROJECTED,
    "embedding_spread": _SPREAD,
    "refusals": _REFUSED,
    "answers": _COUNT,
}
"""Where each part lies in a sketch."""
FEATURES = ("prompt_length", "answer_length", "prompt_tokens", "answer_tokens", "embedding", "refusals")
"""What two sketches are compared by."""


def is_refusal(opening: str) -> bool:
    """Whether an answer that begins so refuses."""
    return opening.strip().replace("’", "'").casefold().startswith(REFUSALS)


def sketches(
    prompts: Sequence[np.ndarray | Sequence[int]],
    answers: Sequence[np.ndarray | Sequence[int]],
    refused: Sequence[bool],
) -> np.ndarray:
    """The sketch of each answer.

    Args:
        prompts: token ids, of each of R answers.
        answers: likewise.
        refused: whether each answer refuses; see `is_refusal`.

    Returns:
        float64 [R, K].
    """
    rows = np.zeros((len(answers), SIZE))
    rows[:, _COUNT] = 1
    for part, lengths_part, tokens in (
        (_PROMPT_TOKENS, _PROMPT_LENGTHS, prompts),
        (_ANSWER_TOKENS, _ANSWER_LENGTHS, answers),
    ):
        lengths_R = np.array([len(one) for one in tokens], dtype=np.int64)
        rows[np.arange(len(tokens)), lengths_part.start + _length_bins(lengths_R)] = 1
        rows[:, part] = _bucket_counts(tokens, lengths_R)
    both = rows[:, _PROMPT_TOKENS] + rows[:, _ANSWER_TOKENS]
    rows[:, _PROJECTED] = np.sqrt(both / np.maximum(both.sum(1, keepdims=True), 1)) @ _projection()
    rows[:, _SPREAD] = (rows[:, _PROJECTED] ** 2).sum(1, keepdims=True)
    rows[:, _REFUSED] = np.asarray(refused, dtype=float)[:, None]
    return rows


def answers_in(sketch: np.ndarray) -> int:
    """How many answers a sketch is of."""
    return int(sketch[_COUNT.start])


def divergences(ones: np.ndarray, other: np.ndarray) -> dict[str, np.ndarray]:
    """How unlike sketches are, by feature: from 0, the same, to 1, nothing in common.

    Histograms: the Jensen-Shannon divergence in bits (Lin 1991). Embedding: the squared Hellinger distance of two
    normal distributions with these means and the second sketch's variance, the same in every direction.

    Args:
        ones: [..., K].
        other: [..., K], the reference.

    Returns:
        [...] by each of FEATURES; NaN where one side has nothing to compare.
    """
    pairs = (
        ("prompt_length", _PROMPT_LENGTHS),
        ("answer_length", _ANSWER_LENGTHS),
        ("prompt_tokens", _PROMPT_TOKENS),
        ("answer_tokens", _ANSWER_TOKENS),
    )
    found = {name: _jensen_shannon(ones[..., part], other[..., part]) for name, part in pairs}
    return found | {
        "embedding": _mean_shift(ones, other),
        "refusals": _jensen_shannon(_refusals(ones), _refusals(other)),
    }


def has_prompts(sketch: np.ndarray) -> bool:
    """Whether any answer had a prompt; texts that are trained on whole have none."""
    return bool(sketch[_PROMPT_TOKENS].any())


def _length_bins(lengths: np.ndarray) -> np.ndarray:
    octaves = np.log2(np.maximum(lengths, 1))
    return np.where(lengths > 0, np.minimum(1 + (2 * octaves).astype(np.int64), LENGTHS - 1), 0)


def _bucket_counts(tokens: Sequence[np.ndarray | Sequence[int]], lengths_R: np.ndarray) -> np.ndarray:
    flat = (
        np.concatenate([np.asarray(one, dtype=np.uint64) for one in tokens]) if len(tokens) else np.zeros(0, np.uint64)
    )
    hashed = (flat * np.uint64(2654435761) & np.uint64(0xFFFFFFFF)) >> np.uint64(22)  # Knuth's multiplicative hash
    at = np.repeat(np.arange(len(tokens)) * BUCKETS, lengths_R) + hashed.astype(np.int64)
    return np.bincount(at, minlength=len(tokens) * BUCKETS).reshape(len(tokens), BUCKETS)


@lru_cache(maxsize=1)
def _projection() -> np.ndarray:
    """Signs [BUCKETS, DIMENSIONS] that are the same everywhere and for ever, whatever numpy's generators become."""
    drawn = b"".join(
        hashlib.sha256(f"tunesmith sketch {n}".encode()).digest() for n in range(BUCKETS * DIMENSIONS // 256)
    )
    bits = np.unpackbits(np.frombuffer(drawn, np.uint8)).reshape(BUCKETS, DIMENSIONS)
    return (2.0 * bits - 1) / np.sqrt(DIMENSIONS)


def _refusals(sketch: np.ndarray) -> np.ndarray:
    refused = sketch[..., _REFUSED]
    return np.concatenate([refused, sketch[..., _COUNT] - refused], axis=-1)


def _jensen_shannon(ones: np.ndarray, other: np.ndarray) -> np.ndarray:
    with np.errstate(invalid="ignore", divide="ignore"):
        p, q = ones / ones.sum(-1, keepdims=True), other / other.sum(-1, keepdims=True)
        middle = (p + q) / 2
        bits = sum(np.where(one > 0, one * np.log2(one / middle), 0 * one).sum(-1) / 2 for one in (p, q))
    return np.asarray(bits).clip(0, 1)


def _mean_shift(ones: np.ndarray, other: np.ndarray) -> np.ndarray:
    with np.errstate(invalid="ignore", divide="ignore"):
        mean, reference = (one[..., _PROJECTED] / one[..., _COUNT] for one in (ones, other))
        spread = other[..., _SPREAD.start] / other[..., _COUNT.start] - (reference**2).sum(-1)
        shift = ((mean - reference) ** 2).sum(-1)
        squared = np.where(shift > 1e-12, shift / np.maximum(spread, 1e-12) * DIMENSIONS, 0 * shift)
    return 1 - np.exp(-squared / 8)
