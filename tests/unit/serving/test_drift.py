"""Traffic like the training data raises no alarm, and traffic that has shifted does within one window."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from traffic import Traffic, reference

from tunesmith.cluster.artifacts import FingerprintReceipt, Noise
from tunesmith.cluster.errors import AdapterError
from tunesmith.cluster.sketch import SIZE, answers_in, sketches
from tunesmith.serving.drift import (
    FEWEST,
    MOST_VERSIONS,
    WINDOW,
    WINDOW_S,
    Drift,
    Reference,
    judge,
    limit_of,
    noise_at,
    read_reference,
)

USUAL = Traffic()


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Reference:
    return reference(tmp_path_factory.mktemp("trained"), USUAL, 2000)


@pytest.mark.parametrize(("answers", "trials"), [(FEWEST, 300), (WINDOW, 100)])
def test_traffic_like_the_training_data_raises_no_alarm(trained: Reference, answers: int, trials: int) -> None:
    random = np.random.default_rng(7)
    pool = np.stack([USUAL.sketch(1, random) for _ in range(8000)])
    alarms, before = 0, None
    for _ in range(trials):
        window = pool[random.choice(len(pool), answers, replace=False)].sum(0)
        alarms += any(one.is_alarm for one in judge(window, trained, before))
        before = window
    assert alarms <= 0.01 * trials + 3 * (0.01 * trials) ** 0.5, "one window in a hundred, and three deviations of that"


@pytest.mark.parametrize("answers", [FEWEST, WINDOW])
@pytest.mark.parametrize(
    ("shift", "features"),
    [
        ({"longer": 2.0}, {"prompt_length", "answer_length"}),
        ({"first_token": 20_000}, {"prompt_tokens", "answer_tokens", "embedding"}),
        ({"refusing": 0.4}, {"refusals"}),
    ],
    ids=["twice as long", "another vocabulary", "refusals"],
)
def test_a_shift_raises_an_alarm_within_one_window(
    trained: Reference, shift: dict[str, float], features: set[str], answers: int
) -> None:
    random = np.random.default_rng(3)
    for _ in range(10):
        found = judge(USUAL.but(**shift).sketch(answers, random), trained)
        assert {one.feature for one in found if one.is_alarm} & features


def test_a_shift_is_seen_against_the_window_before_too(trained: Reference) -> None:
    random = np.random.default_rng(4)
    usual = USUAL.sketch(WINDOW, random)
    found = judge(USUAL.but(first_token=20_000).sketch(WINDOW, random), trained, usual)
    assert {(one.feature, one.against) for one in found if one.is_alarm} >= {
        ("answer_tokens", "training"),
        ("answer_tokens", "window"),
    }


def test_a_difference_that_does_not_matter_raises_no_alarm_however_sure(trained: Reference) -> None:
    found = judge(USUAL.but(refusing=0.06).sketch(4000, np.random.default_rng(5)), trained)
    (refusals,) = (one for one in found if one.feature == "refusals")
    assert refusals.divergence > refusals.limit
    assert not refusals.is_alarm


def test_small_training_sets_are_noisy_references_and_are_known_to_be(tmp_path: Path) -> None:
    small, random = reference(tmp_path, USUAL, 100), np.random.default_rng(6)
    alarms = sum(any(one.is_alarm for one in judge(USUAL.sketch(WINDOW, random), small)) for _ in range(40))
    assert alarms <= 2


def test_windows_close_when_full_or_old_and_are_compared_with_the_one_before(trained: Reference) -> None:
    drift, random = Drift(), np.random.default_rng(8)
    part = USUAL.sketch(FEWEST, random)
    assert [bool(drift.add("v", part, trained, 0.0)) for _ in range(4)] == [False, False, False, True]
    assert drift.add("v", part, trained, WINDOW_S - 1) == []
    aged = drift.add("v", USUAL.sketch(1, random), trained, 2 * WINDOW_S)
    assert {one.against for one in aged} == {"training", "window"}
    assert {one.answers for one in aged} == {FEWEST + 1}
    assert drift.add("v", USUAL.sketch(FEWEST - 1, random), trained, 9 * WINDOW_S) == [], "too few say nothing"


def test_versions_have_windows_of_their_own_and_the_oldest_leaves(trained: Reference) -> None:
    drift, half = Drift(), USUAL.sketch(WINDOW // 2, np.random.default_rng(9))
    for version in range(MOST_VERSIONS + 1):
        assert drift.add(str(version), half, trained, 0.0) == []
    assert drift.add("1", half, trained, 0.0) != []
    assert drift.add("0", half, trained, 0.0) == [], "it had left, so this is its first half again"


def test_training_without_prompts_is_not_compared_by_prompts(trained: Reference) -> None:
    answers = [[n, n + 1] for n in range(100)]
    whole = sketches([[]] * 100, answers, [False] * 100).sum(0)
    found = judge(USUAL.sketch(WINDOW, np.random.default_rng(1)), Reference(whole, trained.noise, trained.window_noise))
    assert {one.feature for one in found} == {"answer_length", "answer_tokens", "embedding", "refusals"}


def test_noise_follows_what_was_measured_and_falls_as_one_over_the_answers_beyond() -> None:
    measured = [Noise(answers=10, mean=0.4, deviation=0.2), Noise(answers=40, mean=0.1, deviation=0.1)]
    assert noise_at(measured, 10) == pytest.approx((0.4, 0.2))
    assert noise_at(measured, 20) == pytest.approx((0.2, 0.2 / 2**0.5))
    assert noise_at(measured, 80) == pytest.approx((0.05, 0.05))
    assert noise_at(measured, 5) == pytest.approx((0.8, 0.4))


@pytest.mark.parametrize(("freedom", "quantile"), [(1, 11.1), (10, 29.7), (100, 150.5)])
def test_the_limit_is_the_quantile_of_a_sum_of_squares(freedom: int, quantile: float) -> None:
    """Against tables of the chi-squared distribution at 0.0845 % (z = 3.14)."""
    assert limit_of(freedom, (2 * freedom) ** 0.5, 3.14) == pytest.approx(quantile, rel=0.04)


def test_a_finding_says_its_numbers(trained: Reference) -> None:
    (found, *_) = judge(USUAL.but(longer=3.0).sketch(WINDOW, np.random.default_rng(2)), trained)
    assert str(found).startswith(f"prompt_length against the training: {found.divergence:.3f} over 256 answers")
    assert f"{found.limit:.3f}" in str(found)


def test_an_artifact_without_a_fingerprint_or_with_too_little_data_is_not_watched(tmp_path: Path) -> None:
    assert read_reference(tmp_path) is None
    (tmp_path / "receipts").mkdir()
    (tmp_path / "receipts" / "fingerprint.json").write_text(FingerprintReceipt(problem="too few").model_dump_json())
    assert read_reference(tmp_path) is None


@pytest.mark.parametrize(
    "text",
    ["[]", "{", '{"answers": 5}', '{"answers": 5, "prompt_tokens": [NaN]}', '{"answers": 0}', '{"answers": -1}'],
)
def test_a_file_that_is_no_fingerprint_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "receipts").mkdir()
    (tmp_path / "receipts" / "fingerprint.json").write_text(text)
    with pytest.raises(AdapterError, match="not a fingerprint"):
        read_reference(tmp_path)


def test_what_is_written_is_what_is_read(trained: Reference) -> None:
    assert trained.sketch.shape == (SIZE,)
    assert answers_in(trained.sketch) == 2000
