"""The drawings put every trial where its numbers say."""

from __future__ import annotations

import pytest
from sweep_results import Page, sweep, trial

from tunesmith.tuning.charts import improvements
from tunesmith.tuning.report import render

# Axes of the parallel coordinates: x 80, 360, 640 and 920 for three keys and the metric; y from 84 (top) to 412.
# The other charts: x from 60 to 504; y from 14 for a metric of 9, the baseline, to 272 for 4.
TOGETHER, CURVES, SO_FAR = range(3)
SHORT = trial(1, {"train.learning_rate": 1e-4, "adaptation.rank": 4}, [7.0, 5.0])
WIDE = {"train.learning_rate": 1e-3, "adaptation.rank": 8, "adaptation.lora_alpha": 16}
LONG = trial(2, WIDE, [9.0, 6.0])


def test_parallel_coordinates_with_a_log_axis_categories_and_a_gap_where_a_key_does_not_apply():
    page = Page(render(sweep([SHORT, LONG])))
    assert page.line(TOGETHER, 1) == "M80.0,248.0L360.0,330.0M920.0,84.0h0"
    assert page.line(TOGETHER, 2) == "M80.0,84.0L360.0,166.0L640.0,166.0L920.0,412.0"
    ends = [(element.attributes["cx"], element.attributes["cy"]) for element in page.all("circle", within="parallel")]
    assert ends == [("360.0", "330.0"), ("920.0", "84.0")]
    assert page.one("path", "gap").attributes["d"] == "M360.0,330.0L920.0,84.0"


def test_the_best_end_of_the_metric_is_on_top_in_both_modes():
    results = sweep([SHORT, LONG], mode="max", best=2, metric="score", baseline=None)
    assert Page(render(results)).line(TOGETHER, 2).endswith("L920.0,84.0")


def test_a_trial_without_a_result_ends_before_the_metric():
    failed = trial(2, WIDE, [], state="failed", why="NaN at step 7")
    assert Page(render(sweep([SHORT, failed]))).line(TOGETHER, 2) == "M80.0,84.0L360.0,166.0L640.0,166.0"


def test_learning_curves_run_over_tokens_and_say_how_each_trial_ended():
    stopped = trial(2, WIDE, [9.0], state="stopped")
    failed = trial(3, WIDE, [7.0], state="failed", value=None)
    running = trial(4, WIDE, [8.0], state="running")
    page = Page(render(sweep([SHORT, stopped, failed, running])))
    assert page.line(CURVES, 1) == "M282.0,117.2L504.0,220.4"
    assert page.line(CURVES, 2) == "M282.0,14.0h0"
    dot, ring = page.one("circle", "stopped"), page.one("circle", "running")
    assert (dot.attributes["cx"], dot.attributes["cy"]) == ("282.0", "14.0")
    assert (ring.attributes["cx"], ring.attributes["cy"]) == ("282.0", "65.6")
    assert page.one("path", "cross").attributes["d"].startswith("M278.0,113.2")
    assert page.all("path", "baseline")[0].attributes["d"] == "M60,14.0H504"


def test_a_population_marks_where_weights_were_taken_and_from_where():
    move = {"from": 1, "step": 10, "report": 1, "changed": {"train.learning_rate": [1e-3, 1.2e-4]}}
    page = Page(render(sweep([SHORT, LONG | {"lineage": [move]}], scheduler="pbt")))
    assert page.one("path", "exploit").attributes["d"] == "M282.0,9.0l5,5l-5,5l-5,-5z"
    assert page.one("path", "took").attributes["d"] == "M282.0,117.2L282.0,14.0"
    assert "trial 1 at step 10: train.learning_rate 1e-3 → 1.2e-4" in page.one("path", "exploit").text


def test_the_best_so_far_is_a_staircase_over_time_to_the_sweeps_end():
    results = sweep([SHORT, LONG], seconds=4.0)
    stairs = [element for element in Page(render(results)).all("path") if element.parents[-1].has("sofar")]
    assert [element.attributes["d"] for element in stairs] == ["M171.0,117.2H282.0V220.4H504"]


def test_a_failed_trial_is_never_the_best_so_far():
    failed = trial(3, WIDE, [1.0], state="failed", value=None)
    page = Page(render(sweep([SHORT, failed])))
    assert "trial 1" in [element for element in page.all("text", "name") if element.parents[-1].has("chart")][-1].text


@pytest.mark.parametrize(("mode", "expected"), [("min", [5.0, 4.0]), ("max", [5.0, 6.0])])
def test_improvements_are_strict(mode: str, expected: list[float]):
    reports = [(float(n), value, n) for n, value in enumerate([5.0, 6.0, 5.0, 4.0, 4.0, 6.0])]
    assert [value for _, value, _ in improvements(reports, mode)] == expected


def test_reports_that_are_not_finite_leave_no_mark():
    page = Page(render(sweep([SHORT, trial(2, WIDE, [9.0, float("nan")], state="failed", value=None)])))
    assert page.line(CURVES, 2) == "M282.0,14.0h0"
    assert "nan" not in "".join(str(element.attributes) for element in page.elements)


def test_one_that_diverged_is_drawn_at_the_edge_and_the_page_says_so():
    trials = [trial(n, WIDE, [5.0 + n / 10]) for n in range(1, 9)]
    html = render(sweep([*trials, trial(9, WIDE, [1e6])]))
    assert Page(html).line(TOGETHER, 9).endswith("L920.0,412.0")
    assert "1 far worse, drawn at the edge" in html


def test_names_of_many_keys_are_staggered_and_cut_but_stay_whole_in_their_title():
    long = "objective.a_very_long_name_of_a_parameter_that_nobody_would_type"
    space = {f"train.key_{n}": {"kind": "uniform", "low": 0, "high": 1} for n in range(11)} | {
        long: {"kind": "uniform", "low": 0, "high": 1}
    }
    page = Page(render(sweep([trial(1, dict.fromkeys(space, 0.5), [5.0])], space=space)))
    names = [element for element in page.all("text", "name", "key")]
    heights = [int(element.attributes["y"]) for element in names]
    assert [min(heights[n : n + 2]) < max(heights[n : n + 2]) for n in range(11)] == [True] * 11
    assert names[-1].text.endswith("…")
    assert names[-1].parents[-1].text.startswith(long)
    assert page.one("svg", "parallel").attributes["viewbox"] == "0 0 1168 430"


def test_a_baseline_is_drawn_or_named_where_it_would_press_the_curves_together():
    page = Page(render(sweep([SHORT], baseline=9.0)))
    assert len(page.all("path", "baseline")) == 2
    html = render(sweep([SHORT], baseline=5000.0))
    assert Page(html).all("path", "baseline") == []
    assert "before training 5000, off the chart" in html


def test_the_steep_start_of_a_curve_is_not_taken_for_one_that_diverged():
    page = Page(render(sweep([trial(1, WIDE, [8.0, 5.2, 5.1, 5.05, 5.0, 5.0, 5.0])])))
    assert "far worse" not in "".join(element.text for element in page.all("p", "legend"))


def test_no_metric_has_no_ticks():
    page = Page(render(sweep([trial(1, WIDE, [], state="failed")])))
    assert [element.text for element in page.all("text", "tick", "measure")] == []
