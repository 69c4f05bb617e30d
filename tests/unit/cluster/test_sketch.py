"""Sketches add up, are the same on every machine, and are as unlike as what they are of."""

from __future__ import annotations

import numpy as np
import pytest

from tunesmith.cluster.sketch import DIMENSIONS, FEATURES, PARTS, SIZE, answers_in, divergences, is_refusal, sketches


def random_answers(seed: int, count: int = 64, vocabulary: range = range(500)) -> np.ndarray:
    random = np.random.default_rng(seed)
    ids = [random.choice(vocabulary, size) for size in random.integers(1, 60, 2 * count)]
    return sketches(ids[:count], ids[count:], [False] * count)


def test_a_sketch_counts_lengths_tokens_and_refusals() -> None:
    rows = sketches([[7, 7, 9], []], [[5], [5, 5, 5, 5]], [False, True])
    assert rows.shape == (2, SIZE)
    whole = rows.sum(0)
    assert answers_in(whole) == 2
    assert np.flatnonzero(whole[PARTS["prompt_lengths"]]).tolist() == [0, 4]  # none, and 2·log2(3) = 3.17
    assert np.flatnonzero(whole[PARTS["answer_lengths"]]).tolist() == [1, 5]
    assert sorted(whole[PARTS["prompt_tokens"]])[-3:] == [0, 1, 2]
    assert whole[PARTS["answer_tokens"]].max() == 5
    assert whole[PARTS["refusals"]] == 1


def test_sketches_of_disjoint_answers_add_up_whatever_the_batches() -> None:
    together = sketches([[1], [2, 3], [4]], [[5], [6], [7, 8]], [True, False, False])
    apart = [sketches([p], [a], [r]) for p, a, r in (([1], [5], True), ([2, 3], [6], False), ([4], [7, 8], False))]
    np.testing.assert_allclose(together.sum(0), np.concatenate(apart).sum(0))


def test_the_projection_is_the_same_on_every_machine_and_keeps_lengths() -> None:
    (row,) = sketches([[1, 2]], [[3]], [False])
    assert (row[PARTS["embedding"]] * np.sqrt(3 * DIMENSIONS)).round(6)[:8].tolist() == FIRST
    assert row[PARTS["embedding_spread"]] == pytest.approx(1, abs=0.4)  # of a unit vector, projected


FIRST = [-3.0, 1.0, -1.0, -1.0, 1.0, 1.0, 1.0, -3.0]
"""Worked out with hashlib and whole numbers alone."""


def test_the_same_is_0_apart_and_nothing_in_common_is_1_apart() -> None:
    ours = random_answers(0).sum(0)
    assert {name: float(value) for name, value in divergences(ours, ours).items()} == dict.fromkeys(FEATURES, 0.0)
    one = sketches([[1] * 4], [[2] * 4], [False])[0]
    other = sketches([[3] * 40], [[4] * 40], [True])[0]
    assert all(value == pytest.approx(1) for value in divergences(one, other).values())


def test_a_divergence_is_that_of_lin_1991() -> None:
    one = sketches([[1]] * 4, [[2]] * 4, [True, False, False, False]).sum(0)
    other = sketches([[1]] * 4, [[2]] * 4, [True, True, True, False]).sum(0)
    entropy = lambda p: -p * np.log2(p) - (1 - p) * np.log2(1 - p)  # noqa: E731
    assert divergences(one, other)["refusals"] == pytest.approx(entropy(0.5) - (entropy(0.25) + entropy(0.75)) / 2)


def test_many_sketches_are_compared_at_once() -> None:
    rows = np.stack([random_answers(seed).sum(0) for seed in range(3)])
    apart = divergences(rows, rows[0])
    for at, row in enumerate(rows):
        for name, value in divergences(row, rows[0]).items():
            assert apart[name][at] == pytest.approx(float(value))


def test_what_is_not_there_cannot_be_compared() -> None:
    no_prompts = sketches([[]] * 3, [[2]] * 3, [False] * 3).sum(0)
    found = divergences(random_answers(0).sum(0), no_prompts)
    assert np.isnan(found["prompt_tokens"])
    assert not np.isnan(found["answer_tokens"])


@pytest.mark.parametrize("text", ["I'm sorry, but", " I’m unable to", "As an AI language model", "I cannot help"])
def test_openings_that_refuse(text: str) -> None:
    assert is_refusal(text)


@pytest.mark.parametrize("text", ["", "Sorry to hear that! Try", "I can help", "The answer is: I cannot"])
def test_openings_that_do_not(text: str) -> None:
    assert not is_refusal(text)
