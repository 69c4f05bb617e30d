"""What a sweep shows while it runs."""

from __future__ import annotations

import io
import math

from rich.console import Console
from sweep_recipes import reported, tune_section

from tunesmith.tuning.board import MOST_ROWS, Board, Line, best_of, spelled
from tunesmith.tuning.records import Report

VALUES = {"train.learning_rate": 0.00123456, "adaptation.rank": 8}


def board(terminal: bool = False, trials: int = 4, mode: str = "min", reports: int = 5) -> Board:
    console = Console(file=io.StringIO(), force_terminal=terminal, width=120, highlight=False)
    return Board(console, tune_section(mode=mode, reports=reports), trials)


def said(shown: Board) -> list[str]:
    assert isinstance(shown.console.file, io.StringIO)
    return shown.console.file.getvalue().splitlines()


def table(shown: Board) -> list[str]:
    """The picture's lines as a terminal of 120 columns has them, without colours."""
    console = Console(file=io.StringIO(), width=120)
    console.print(shown.picture())
    assert isinstance(console.file, io.StringIO)
    return [line.rstrip() for line in console.file.getvalue().splitlines()]


def test_without_a_terminal_each_report_and_each_end_is_a_line():
    with board() as shown:
        shown.begin(1, VALUES)
        shown.report(1, reported(1, 2.5))
        shown.report(1, reported(2, 2.25, std=0.125))
        shown.end(1, "stopped", "by asha after report 2")
        shown.begin(2, {})
        shown.end(2, "finished")
    assert said(shown) == [
        "trial 1 · report 1/5 · eval_loss 2.5000 · 50 tokens/s · learning_rate=0.00123 rank=8",
        "trial 1 · report 2/5 · eval_loss 2.2500 ± 0.1250 · 50 tokens/s · learning_rate=0.00123 rank=8",
        "trial 1 stopped: by asha after report 2",
        "trial 2 finished",
    ]


def test_what_was_said_is_not_said_again():
    with board() as shown:
        shown.begin(1, VALUES)
        shown.report(1, reported(2, 2.5))
        shown.report(1, reported(2, 2.5))
        shown.report(1, reported(1, 2.75))
        shown.end(1, "finished")
        shown.end(1, "finished")
    assert len(said(shown)) == 2
    assert len(shown.lines[1].reports) == 1


def test_the_rate_is_that_between_two_reports():
    shown = board()
    shown.begin(1, VALUES)
    shown.report(1, Report(1, 10, 100, 2.0, 3.0))
    assert shown.lines[1].rate == 50
    shown.report(1, Report(2, 20, 400, 3.0, 3.0))
    assert shown.lines[1].rate == 300
    shown.report(1, Report(3, 30, 500, 3.0, 3.0))
    assert shown.lines[1].rate == 0, "no time has passed"


def test_the_table_has_a_row_for_each_trial_and_a_line_for_the_whole():
    shown = board()
    for number, values in ((1, [3.0, 2.0]), (2, [2.5]), (3, [])):
        shown.begin(number, VALUES if number == 1 else {"adaptation.rank": number})
        for report, value in enumerate(values, start=1):
            shown.report(number, reported(report, value, at=10.0 * report))
    shown.end(2, "stopped")
    shown.refuse(4, {"adaptation.rank": 512}, "it needs 9 GiB of 8")
    *rows, whole = table(shown)
    assert [row.split() for row in rows] == [
        ["trial", "state", "rung", "eval_loss", "tokens/s", "values"],
        ["1", "training", "2/5", "2.0000", "50", "learning_rate=0.00123", "rank=8"],
        ["2", "stopped", "1/5", "2.5000", "rank=2"],
        ["3", "training", "0/5", "rank=3"],
        ["4", "infeasible", "0/5", "rank=512"],
    ]
    assert whole == "2 of 4 trials ended · best trial 1 with eval_loss 2.0000 · at most 53s left"


def test_a_terminal_shows_the_table_and_no_lines():
    with board(terminal=True) as shown:
        shown.begin(1, VALUES)
        shown.report(1, reported(1, 2.5))
    drawn = "\n".join(said(shown))
    assert "learning_rate=0.00123" in drawn
    assert "trial 1 ·" not in drawn


def test_only_so_many_rows_are_shown_those_at_work_and_the_best():
    shown = board(trials=60)
    for number in range(1, 61):
        shown.begin(number, {})
        shown.report(number, reported(1, 1 / number))
        if number > 5:
            shown.end(number, "stopped")
    rows = [int(line.split()[0]) for line in table(shown)[1:-1]]
    assert rows == [*range(1, 6), *range(42, 61)]
    assert len(rows) == MOST_ROWS


def test_time_left_is_at_the_pace_of_the_reports_so_far():
    shown = board(trials=4, reports=5)
    shown.begin(1, {})
    assert shown.eta() is None
    shown.report(1, reported(1, 2.0, at=3.0))
    shown.report(1, reported(2, 2.0, at=6.0))
    assert shown.eta() == (20 - 2) * 3.0
    shown.end(1, "stopped")
    assert shown.eta() == (20 - 5) * 3.0, "what a stopped trial has not done is not left to do"


def test_no_time_is_left_when_all_have_ended():
    shown = board(trials=1)
    shown.begin(1, {})
    shown.report(1, reported(1, 2.0, at=3.0))
    shown.end(1, "finished")
    assert shown.eta() == 0


def test_the_best_is_by_the_mode_and_the_first_among_equals():
    lines = [
        Line(1, {}, "stopped", [reported(1, 2.0)]),
        Line(2, {}, "training", [reported(1, 3.0), reported(2, 2.0)]),
        Line(3, {}, "failed", [reported(1, 0.5)]),
        Line(4, {}, "training", [reported(1, math.nan)]),
        Line(5, {}, "training", []),
        Line(6, {}, "finished", [reported(1, 9.0)]),
    ]
    low, high = best_of(lines, "min"), best_of(lines, "max")
    assert low is not None
    assert high is not None
    assert (low.number, high.number) == (1, 6)
    assert best_of(lines[2:5], "min") is None


def test_a_trial_that_goes_on_shows_its_new_values():
    shown = board()
    shown.begin(1, {"adaptation.rank": 4})
    shown.begin(1, {"adaptation.rank": 8})
    assert shown.lines[1].values == {"adaptation.rank": 8}


def test_values_are_spelled_shortly():
    assert spelled({"a.b": 0.000123456, "c": True, "d.e": ["q_proj"], "f": 1234567.0}) == (
        "b=0.000123 c=True e=['q_proj'] f=1.23e+06"
    )
