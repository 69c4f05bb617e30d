"""What a run shows where there is no terminal, and on one."""

from __future__ import annotations

import io

from rich.console import Console

from tunesmith.cluster.events import Ended, Note, Step, Training, Warned
from tunesmith.cluster.progress import Display, StepState, duration


def line(step: int, **more: object) -> dict[str, object]:
    return {
        "step": step,
        "epoch": step // 4,
        "loss": 2.0,
        "learning_rate": 1e-4,
        "tokens_per_second": 1234.5,
        "step_seconds": 2.0,
        "memory_gib": 1.5,
        "skipped_rows": 3,
        "checkpoint": 4,
        "total_steps": 10,
        **more,
    }


def shown(*events: object, terminal: bool = False) -> str:
    out = io.StringIO()
    with Display(Console(file=out, force_terminal=terminal, width=200, soft_wrap=True)) as display:
        for event in events:
            display(event)  # type: ignore[arg-type]
    return out.getvalue()


def test_a_line_says_all_that_matters():
    state = StepState()
    state.take(line(5, eval_loss=2.5))
    assert state.headline() == "step 5/10"
    assert state.facts() == (
        "loss 2.0000 · held-out 2.5000 · epoch 2 · 1,234 tokens/s · 10s left · 1.5 GiB · 3 rows skipped · saved at 4"
    )


def test_the_time_left_follows_the_recent_pace():
    state = StepState()
    state.take(line(1, step_seconds=60.0))
    state.take(line(2, step_seconds=2.0))
    first = state.eta()
    for step in range(3, 9):
        state.take(line(step, step_seconds=2.0))
    assert first is not None
    assert state.eta() is not None
    assert state.eta() < first  # type: ignore[operator]


def test_an_evaluation_before_the_first_step_needs_no_loss():
    state = StepState()
    state.take({"step": 0, "eval_loss": 4.0})
    assert state.facts() == "held-out 4.0000"


def test_without_a_terminal_only_some_steps_are_said():
    begun = Training("bot", 1, 0, None)
    text = shown(begun, *(Step(line(step)) for step in range(1, 11)), Ended())
    assert text.count("step ") == 2  # the first and the last
    assert "run bot starts" in text
    assert "step 10/10" in text
    assert text.endswith("writing the artifact and its receipts…\n")


def test_a_resumed_attempt_says_from_where():
    assert "run bot goes on from step 40, attempt 2" in shown(Training("bot", 2, 40, 100))


def test_paths_in_brackets_are_text_and_not_markup():
    text = shown(Note("found [red]data[/red]"), Warned("lost [rank 1]"))
    assert "found [red]data[/red]" in text
    assert "warning: lost [rank 1]" in text


def test_on_a_terminal_there_is_a_bar_with_the_facts():
    text = shown(Training("bot", 1, 0, 10), Step(line(5)), Ended(), terminal=True)
    assert "step 5/10" in text
    assert "writing the artifact" not in text
    assert "saved at 4" in text


def test_on_a_terminal_the_bar_says_what_follows_the_last_step():
    text = shown(Training("bot", 1, 0, 10), Step(line(10)), Ended(), terminal=True)
    assert "step 10/10 · writing the artifact and its receipts…" in text


def test_durations_read_as_a_person_says_them():
    assert [duration(s) for s in (42, 200, 7500)] == ["42s", "3m 20s", "2h 05m"]
