"""Where values lie on an axis, and which are written beside it."""

from __future__ import annotations

import pytest

from tunesmith.tuning.axes import Axis, count_ticks, metric_ticks, of_metric, of_space, time_ticks


def test_a_log_axis_gives_every_decade_the_same_length():
    axis = of_space({"kind": "loguniform", "low": 1e-5, "high": 1e-2}, [])
    assert [axis.share(value) for value in (1e-5, 1e-4, 1e-3, 1e-2)] == pytest.approx([0, 1 / 3, 2 / 3, 1])
    assert [text for _, text in axis.ticks()] == ["1e-5", "1e-4", "1e-3", "0.01"]


def test_a_log_axis_of_less_than_two_decades_has_ticks_between_them():
    axis = of_space({"kind": "loguniform", "low": 1e-4, "high": 1e-3}, [])
    assert [text for _, text in axis.ticks()] == ["1e-4", "2e-4", "5e-4", "1e-3"]


def test_ticks_leave_room_for_the_ends():
    axis = of_space({"kind": "randint", "low": 10, "high": 102}, [])
    assert [text for _, text in axis.ticks()] == ["10", "25", "50", "75", "102"]


def test_categories_stand_in_the_middle_of_equal_parts():
    axis = of_space({"kind": "choice", "values": [4, 8, 16, 32]}, [])
    assert [axis.share(value) for value in (4, 8, 16, 32)] == [0.125, 0.375, 0.625, 0.875]


def test_values_beyond_the_space_widen_its_axis():
    numbers = of_space({"kind": "loguniform", "low": 1e-5, "high": 1e-3}, [2e-3])
    assert (numbers.high, numbers.log) == (2e-3, True)
    categories = of_space({"kind": "grid", "values": [4, 8]}, [8, 10])
    assert categories.categories == (4, 8, 10)


def test_a_range_of_one_value_is_drawn_in_the_middle():
    axis = of_space({"kind": "uniform", "low": 0.1, "high": 0.1}, [])
    assert axis.share(0.1) == 0.5
    assert axis.ticks() == [(0.1, "0.1")]


def test_a_metric_ends_in_round_numbers():
    axis = of_metric([5.21, 5.9, 6.4, 7.7], "min")
    assert (axis.low, axis.high) == (5, 8)
    assert [text for _, text in metric_ticks(axis)] == ["5", "6", "7", "8"]
    assert [text for _, text in metric_ticks(of_metric([0.51, 0.83], "max"))] == ["0.5", "0.6", "0.7", "0.8"]


@pytest.mark.parametrize(("mode", "sign"), [("min", 1.0), ("max", -1.0)])
def test_one_trial_that_diverged_does_not_flatten_the_others(mode: str, sign: float):
    axis = of_metric([sign * value for value in (5.0, 5.5, 6.0, 6.0, 1e6)], mode)
    assert sorted((sign * axis.low, sign * axis.high)) == [5.0, 6.0]
    assert not axis.holds(sign * 1e6)
    assert axis.share(sign * 1e6) == (1.0 if mode == "min" else 0.0)


def test_a_far_better_trial_is_never_cut():
    assert of_metric([2.0, 8.0, 8.1, 8.2], "min").holds(2.0)
    assert of_metric([0.9, 0.1, 0.11, 0.12], "max").holds(0.9)


@pytest.mark.parametrize("value", [0.0, 5.0, -3.0, 1e-9, 1e12])
def test_a_metric_of_one_value_has_an_axis_and_ticks(value: float):
    axis = of_metric([value, value], "min")
    assert axis.low < value < axis.high
    assert len(metric_ticks(axis)) >= 2


def test_room_is_left_beyond_the_best_value_only():
    axis = of_metric([5.0, 9.0], "min", room=0.1)
    assert (axis.low, axis.high) == (4, 9)
    axis = of_metric([5.0, 9.0], "max", room=0.1)
    assert (axis.low, axis.high) == (5, 10)


def test_counts_and_times_have_round_ticks():
    assert [text for _, text in count_ticks(46_080)] == ["0", "20k", "40k"]
    assert [text for _, text in time_ticks(203.4)] == ["0", "1m", "2m", "3m"]
    assert [text for _, text in time_ticks(2.0)] == ["0s", "0.5s", "1s", "1.5s", "2s"]
    assert [text for _, text in time_ticks(20 * 86400)] == ["0", "5d 0h", "10d 0h", "15d 0h", "20d 0h"]
    assert time_ticks(0.0) == [(0.0, "0s")]


def test_a_short_axis_shows_every_second_of_many_categories():
    axis = Axis(categories=tuple(range(20)))
    assert [value for value, _ in axis.ticks()] == list(range(0, 20, 2))
