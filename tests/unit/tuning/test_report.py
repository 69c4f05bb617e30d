"""The page about a sweep says what came of it, in every state that a sweep can be in."""

from __future__ import annotations

import math
from typing import Any

import pytest
from sweep_results import Page, sweep, trial

from tunesmith.tuning.report import ancestors, ranked, render

NARROW = {"train.learning_rate": 1e-4, "adaptation.rank": 4}
WIDE = {"train.learning_rate": 1e-3, "adaptation.rank": 8, "adaptation.lora_alpha": 16}


def verdict(results: dict[str, Any]) -> str:
    return Page(render(results)).one("p", "verdict").text


def rows(page: Page) -> list[str]:
    return [element.text for element in page.all("tr") if "data-t" in element.attributes]


def test_the_verdict_compares_the_best_with_no_training_and_with_the_median():
    trials = [trial(n, WIDE, [value]) for n, value in enumerate([6.0, 4.5, 5.0], 1)]
    trials += [trial(4, WIDE, [8.0], state="stopped"), trial(5, WIDE, [], state="infeasible")]
    assert verdict(sweep(trials)) == (
        "Trial 2 is best, with eval_loss 4.500: 50% (4.5) below the 9.000 before training and "
        "10% (0.5) below the 5.000 of the median finished trial."
        "5 trials: 3 finished, 1 was stopped early and 1 was infeasible; 3m 20s, 12.3k tokens."
    )


def test_a_sweep_that_found_nothing_better_than_no_training_says_so():
    page = Page(render(sweep([trial(1, WIDE, [9.5])])))
    assert page.one("p", "verdict").has("bad")
    assert "5.6% (0.5) above the 9.000 before training" in page.one("p", "verdict").text
    page = Page(render(sweep([trial(1, WIDE, [9.5])], mode="max")))
    assert page.one("p", "verdict").has("good")


def test_a_running_sweep_says_what_is_best_so_far():
    trials = [trial(1, WIDE, [6.0], state="running"), trial(2, NARROW, [], state="waiting")]
    said = verdict(sweep(trials, complete=False, best=1))
    assert said.startswith("Running; so far trial 1 is best, with eval_loss 6.000")
    assert "1 is running and 1 is waiting" in said
    assert verdict(sweep([], complete=False)).startswith("Running; no trial has reported yet.No trials yet")


def test_a_sweep_whose_trials_all_failed_gives_the_most_frequent_reason():
    trials = [trial(n, WIDE, [], state="failed", why="NaN at step 7" if n < 3 else "lost") for n in (1, 2, 3)]
    page = Page(render(sweep(trials)))
    assert page.one("p", "verdict").has("bad")
    assert page.one("p", "verdict").text.startswith(
        "No trial has a result. 2 of 3 for this reason: NaN at step 73 trials: 3 failed"
    )
    assert len(page.all("p", "nothing")) == 2
    assert len(rows(page)) == 3


def test_where_the_winner_lies_and_how_it_did_again():
    again = {"seeds": [1, 2], "values": [5.1, 5.3], "mean": 5.2, "std": 0.1}
    results = sweep([trial(1, WIDE, [5.0])], winner="runs/s/winner.yaml", artifact="runs/s/artifact", retrained=again)
    facts = [element.text for element in Page(render(results)).all("dd")]
    assert facts[:3] == ["runs/s/winner.yaml", "runs/s/artifact", "5.200 ± 0.1 over 2 seeds (1: 5.100, 2: 5.300)"]
    assert facts[-1] == "2026-11-21 18:00 UTC"


def test_the_table_is_sorted_best_first_with_those_without_a_result_last():
    trials = [
        trial(1, WIDE, [], state="failed", why="NaN at step 7"),
        trial(2, WIDE, [6.0]),
        trial(3, NARROW, [7.0, 5.0], std=0.02),
        trial(4, WIDE, [math.nan], state="stopped"),
        trial(5, WIDE, [5.5], state="stopped", why="stopped by asha at report 1"),
    ]
    assert [each["trial"] for each in ranked(sweep(trials))] == [3, 5, 2]
    assert [each["trial"] for each in ranked(sweep(trials, mode="max"))] == [2, 5, 3]
    assert rows(Page(render(sweep(trials)))) == [
        "3finished5.000 ± 0.022 to step 202001e-44–",
        "5stoppedstopped by asha at report 15.5001 to step 101001e-3816",
        "2finished6.0001 to step 101001e-3816",
        "4stopped–1 to step 101001e-3816",
        "1failedNaN at step 7–001e-3816",
    ]


def test_every_mark_of_a_trial_has_the_colour_of_its_rank():
    trials = [trial(n, WIDE, [5.0 + n]) for n in range(1, 10)] + [trial(10, WIDE, [], state="failed")]
    page = Page(render(sweep(trials)))
    looks = {
        int(element.attributes["data-t"]): element.attributes["class"]
        for element in page.all("tr")
        if element.parents[-1].tag == "tbody"
    }
    assert looks == {1: "best", 2: "q1", 3: "q2", 4: "q3", 5: "q4", 6: "q4", 7: "q5", 8: "q6", 9: "q7", 10: "none"}
    drawn = [element for element in page.all("g", "t", "parallel")]
    assert {int(element.attributes["data-t"]): element.attributes["class"] for element in drawn} == {
        number: f"t {look}" for number, look in looks.items()
    }
    assert [element.attributes["data-t"] for element in drawn][-3:] == ["3", "2", "1"]  # the best over the others


def test_text_from_users_is_escaped_wherever_it_stands():
    evil = "<script>alert('x')</script>\"&"
    values = {evil: evil}
    move = {"from": 1, "step": 1, "report": 1, "changed": {evil: [evil, evil]}}
    trials = [
        trial(1, values, [5.0, 4.0], why=evil, lineage=[move]),
        trial(2, values, [], state="failed", why=evil),
        trial(3, values, [6.0], lineage=[move, move]),
    ]
    text = {"name": evil, "metric": evil, "why": evil, "winner": evil, "artifact": evil, "scheduler": evil}
    space = {evil: {"kind": "choice", "values": [evil], "when": {evil: [evil]}}}
    for results in (sweep(trials, space=space, **text), sweep(trials[1:2], space=space, **text)):
        html = render(results)
        page = Page(html)
        assert html.count("<script>") == html.count("</script>") == 1
        assert "alert(" not in page.one("script").text
        assert page.one("h1").text == evil
        assert not [value for element in page.elements for value in element.attributes if "alert" in value]


def test_the_page_fetches_nothing():
    html = render(sweep([trial(1, WIDE, [5.0])]))
    for word in ("src=", "href=", "url(", "@import", "http:", "https:", "<link", "<img"):
        assert word not in html


def test_budgets_show_what_was_spent_of_each_limit_that_is_set():
    spent = {"trials": 5, "hours": 0.75, "gpu_hours": 1.5, "tokens": 123_456}
    budget = {"trials": 20, "max_hours": 0.5, "max_gpu_hours": None, "max_tokens": 1_000_000, "spent": spent}
    page = Page(render(sweep([], budget=budget)))
    lines = [element.text for element in page.all("div", "row") if not element.text.startswith(("train", "adaptation"))]
    assert lines == [
        "trials5 of 20 · 25%",
        "time45m of 30m · 150%",
        "GPU hours1.5, no limit",
        "tokens123k of 1M · 12%",
    ]
    bars = [element for element in page.all("u") if "style" in element.attributes]
    assert [(bar.attributes["style"], bar.has("over")) for bar in bars] == [
        ("width:25.0%", False),
        ("width:100.0%", True),
        ("width:12.3%", False),
    ]


def test_importance_is_shown_as_bars_or_as_too_few_trials_to_tell():
    few = [trial(n, WIDE, [5.0 + n]) for n in (1, 2, 3)]
    assert "Too few trials to tell" in render(sweep(few))
    enough = [trial(n, WIDE | {"train.learning_rate": 10 ** (-3 - n / 10)}, [5.0 + n]) for n in range(1, 13)]
    page = Page(render(sweep(enough)))
    shares = [element.text for element in page.all("em")][:3]
    assert shares == ["100%", "0.0%", "0.0%"]
    described = [element.text for element in page.all("small", within="row")]
    assert described[0] == "1e-5 to 1e-3 on a log scale · best trial: 7.94e-4"
    assert described[2] == "one of 8, 16, only where adaptation.rank is 8 · best trial: 16"


def test_a_populations_best_is_traced_back_through_the_trials_it_took_weights_from():
    def move(source: int, report: int) -> dict[str, Any]:
        return {"from": source, "step": 10 * report, "report": report, "changed": {"train.learning_rate": [1e-4, 2e-4]}}

    trials = [
        trial(1, WIDE, [7.0, 6.0, 5.0], lineage=[move(2, 1), move(3, 3)]),  # its first exploit was overwritten
        trial(2, WIDE, [7.5, 6.5, 5.5]),
        trial(3, WIDE, [7.0, 6.0, 5.0], lineage=[move(2, 2), move(1, 3)]),  # the one at report 3 came after trial 1's
    ]
    results = sweep(trials, scheduler="pbt", best=1)
    assert [(number, step["from"], step["report"]) for number, step in ancestors(results, 1)] == [(3, 2, 2), (1, 3, 3)]
    page = Page(render(results))
    assert [element.text for element in page.all("li")] == [
        "Trial 3 took trial 2's weights at step 20: train.learning_rate 1e-4 → 2e-4",
        "Trial 1 took trial 3's weights at step 30: train.learning_rate 1e-4 → 2e-4",
    ]
    assert "2 exploits" in page.one("table").text


def test_a_report_that_beat_the_winner_in_passing_is_named():
    assert "Trial 2 was at 4.000 before its last" in render(sweep([trial(1, WIDE, [5.0]), trial(2, WIDE, [4.0, 6.0])]))
    assert "before its last" not in render(sweep([trial(1, WIDE, [5.0]), trial(2, WIDE, [6.0])]))


@pytest.mark.parametrize("count", [0, 1, 2, 200])
@pytest.mark.parametrize("complete", [True, False])
@pytest.mark.parametrize("baseline", [None, 9.0, math.nan, 1e9])
def test_pages_of_any_size_are_well_formed(count: int, complete: bool, baseline: float | None):
    trials = [trial(n, [WIDE, NARROW][n % 2], [6.0 + n / 100, 5.0 + n / 100]) for n in range(1, count + 1)]
    page = Page(render(sweep(trials, complete=complete, baseline=baseline)))
    assert len(rows(page)) == count
    assert page.one("body").has("many") == (count > 40)


def test_a_space_without_keys_and_a_sweep_of_equal_results_are_drawn():
    assert Page(render(sweep([trial(1, {}, [5.0]), trial(2, {}, [5.0])], space={}))).one("table")
