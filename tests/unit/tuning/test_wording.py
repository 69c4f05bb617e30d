"""Numbers are written as a person would write them."""

from __future__ import annotations

from typing import Any

import pytest

from tunesmith.tuning.wording import compact, duration, listed, measure, percent, setting, spread


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (1.234e-4, "1.23e-4"),
        (1e-3, "1e-3"),
        (0.05, "0.05"),
        (0.1, "0.1"),
        (16, "16"),
        (4096, "4,096"),
        (100.0, "100"),
        (1234.5, "1,234"),
        (2e7, "2e7"),
        (0.0, "0"),
        (-3e-5, "-3e-5"),
        (True, "true"),
        (None, "none"),
        ("cosine", "cosine"),
        (["q_proj", "v_proj"], "q_proj + v_proj"),
        ([], "none"),
        ({"a": 1}, '{"a": 1}'),
    ],
)
def test_settings(value: Any, text: str):
    assert setting(value) == text


@pytest.mark.parametrize(
    ("value", "text"),
    [(5.2143, "5.214"), (0.812, "0.8120"), (1000.0, "1000"), (12345.6, "12,346"), (3.2e-5, "3.2e-5"), (None, "–")],
)
def test_metrics_show_four_digits(value: float | None, text: str):
    assert measure(value) == text


def test_spreads_show_two_digits_or_nothing():
    assert spread(0.0213) == " ± 0.021"
    assert spread(0.00021) == " ± 2.1e-4"
    assert spread(None) == ""


@pytest.mark.parametrize(
    ("count", "text"),
    [(0, "0"), (999, "999"), (1000, "1k"), (12_345, "12.3k"), (999_900, "1M"), (1_250_000, "1.25M"), (3e9, "3B")],
)
def test_counts(count: float, text: str):
    assert compact(count) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0s"),
        (3.21, "3.2s"),
        (59.7, "1m"),
        (200, "3m 20s"),
        (3599.8, "1h"),
        (3900, "1h 05m"),
        (187_200, "2d 4h"),
    ],
)
def test_times(seconds: float, text: str):
    assert duration(seconds) == text


def test_shares_and_lists():
    assert [percent(share) for share in (0.392, 0.0389, 0.001, 1.2)] == ["39%", "3.9%", "0.1%", "120%"]
    assert [listed(parts) for parts in ([], ["a"], ["a", "b"], ["a", "b", "c"])] == ["", "a", "a and b", "a, b and c"]
