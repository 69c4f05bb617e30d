"""The fingerprint: what the training data is like, so that serving can tell when its traffic is not.

Every trained answer counts once, with the tokens before it as its prompt, as a request for it would have them. Long data
sets are looked at in evenly spaced rows. Noise is measured, not assumed: samples of answers are drawn again and again and
compared with the whole, which keeps the tokens of an answer together, as they come in traffic.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from itertools import islice
from typing import TYPE_CHECKING, Any

import numpy as np

from tunesmith.cluster.artifacts import FingerprintReceipt, Noise
from tunesmith.cluster.sketch import FEATURES, OPENING, PARTS, SIZE, divergences, is_refusal, sketches
from tunesmith.trainers.data.tokens import TokenStore

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

MOST_ROWS = 10_000
"""That are looked at."""
FEWEST = 32
"""Answers; fewer can neither be compared with nor hide one among them."""
TOP = 64
"""Most frequent tokens that are named."""
SAMPLED = 1000
"""Answers from which samples are drawn to measure noise."""
SAMPLES, SIZES = 200, (32, 64, 128, 256, 512)

_CHUNK = 256  # answers whose sketches are held at once

Pair = tuple[np.ndarray, np.ndarray]


def fingerprint(store: TokenStore, tokenizer: PreTrainedTokenizerBase, seed: int = 0) -> FingerprintReceipt:
    """The receipt of a training set.

    Args:
        tokenizer: decodes the first tokens of answers, to see which refuse.
        seed: of the samples that noise is measured with.
    """
    rows = np.unique(np.linspace(0, len(store) - 1, min(len(store), MOST_ROWS)).astype(np.int64)) if len(store) else []
    random = np.random.default_rng(seed)
    total, count = np.zeros(SIZE), 0
    kept = np.zeros((SAMPLED, SIZE), np.float32)
    tokens: Counter[int] = Counter()
    in_answers: Counter[int] = Counter()
    answers = _answers(store, rows)
    while pairs := list(islice(answers, _CHUNK)):
        sketched = _sketched(pairs, tokenizer)
        total += sketched.sum(0)
        for places, chosen in _reservoir(count, len(pairs), random):
            kept[places] = sketched[chosen]
        count += len(pairs)
        _count_tokens(pairs, tokens, in_answers)
    if count < FEWEST:
        return FingerprintReceipt(
            problem=f"{count} trained answers are too few to compare traffic with; it takes {FEWEST}.",
            answers=count,
            all_answers=count,
        )
    noise, window_noise = _noise(kept[: min(count, SAMPLED)], random)
    return FingerprintReceipt(
        answers=count,
        all_answers=round(count * len(store) / len(rows)),
        top_tokens=_top(tokens, in_answers),
        noise=noise,
        window_noise=window_noise,
        **_parts(total),
    )


def _answers(store: TokenStore, rows: np.ndarray | list[int]) -> Iterator[Pair]:
    """Prompt and answer, as token ids, of every run of trained tokens."""
    for row in rows:
        tokens, trained = map(np.asarray, store.example(int(row)))  # views of mapped files are slow to cut
        edges = np.flatnonzero(np.diff(np.concatenate(([False], trained, [False])).astype(np.int8)))
        for begin, end in zip(edges[::2], edges[1::2], strict=True):
            yield tokens[:begin], tokens[begin:end]


def _sketched(pairs: list[Pair], tokenizer: PreTrainedTokenizerBase) -> np.ndarray:
    openings = [answer[:OPENING].tolist() for _, answer in pairs]
    texts = tokenizer.batch_decode(openings, skip_special_tokens=True)
    return sketches(
        [prompt for prompt, _ in pairs], [answer for _, answer in pairs], [is_refusal(one) for one in texts]
    )


def _reservoir(before: int, new: int, random: np.random.Generator) -> Iterator[tuple[int, int]]:
    """Places of a uniform sample (Vitter's algorithm R) that new answers take, as (place, which of the new)."""
    drawn = random.integers(0, np.arange(before, before + new) + 1)
    for index in range(new):
        place = before + index if before + index < SAMPLED else int(drawn[index])
        if place < SAMPLED:
            yield place, index


def _count_tokens(pairs: list[Pair], tokens: Counter[int], in_answers: Counter[int]) -> None:
    flat = np.concatenate([answer for _, answer in pairs]).astype(np.int64)
    owners = np.repeat(np.arange(len(pairs)), [len(answer) for _, answer in pairs])
    marked = np.sort(owners << 32 | flat)
    distinct = marked[np.flatnonzero(np.diff(marked, prepend=-1))] & 0xFFFFFFFF
    for counter, ids in ((tokens, flat), (in_answers, distinct)):
        counts = np.bincount(ids)
        found = np.flatnonzero(counts)
        counter.update(dict(zip(found.tolist(), counts[found].tolist(), strict=True)))


def _top(tokens: Counter[int], in_answers: Counter[int]) -> dict[int, float]:
    whole = tokens.total()
    common = [(token, count) for token, count in tokens.most_common(TOP) if in_answers[token] >= FEWEST]
    return {token: round(count / whole, 6) for token, count in common}


def _noise(kept: np.ndarray, random: np.random.Generator) -> tuple[dict[str, list[Noise]], dict[str, list[Noise]]]:
    """Divergences of samples from the whole and, in pairs, from each other."""
    from_whole: dict[str, list[Noise]] = {name: [] for name in FEATURES}
    from_each_other: dict[str, list[Noise]] = {name: [] for name in FEATURES}
    whole = kept.sum(0, dtype=np.float64)
    for size in SIZES:
        times = random.multinomial(size, np.full(len(kept), 1 / len(kept)), SAMPLES).astype(np.float32)
        drawn = (times @ kept).astype(np.float64)
        halves = divergences(drawn[: SAMPLES // 2], drawn[SAMPLES // 2 :])
        for name, values in divergences(drawn, whole).items():
            for measured, noise in ((values, from_whole), (halves[name], from_each_other)):
                if not np.isnan(measured).any():
                    mean, deviation = float(measured.mean()), float(measured.std())
                    noise[name].append(Noise(answers=size, mean=round(mean, 9), deviation=round(deviation, 9)))
    return from_whole, from_each_other


def _parts(total: np.ndarray) -> dict[str, Any]:
    parts: dict[str, Any] = {}
    for name, part in PARTS.items():
        if name == "answers":
            continue
        values = [round(float(value), 3) for value in total[part]]
        parts[name] = values[0] if name == "embedding_spread" else round(values[0]) if name == "refusals" else values
    return parts
