"""Signals: before training they end the command, during it they ask the workers to save."""

from __future__ import annotations

import contextlib
import os
import signal
import time

import pytest

from tunesmith.cluster.errors import InterruptedRunError, StoppedAtOnceError, StoppedError
from tunesmith.cluster.events import Event, Note
from tunesmith.trainers import stopping
from tunesmith.trainers.stopping import StopSignals


@pytest.mark.parametrize(("number", "kind"), [(signal.SIGTERM, StoppedError), (signal.SIGINT, InterruptedRunError)])
def test_before_training_a_signal_ends_the_command(number: signal.Signals, kind: type[Exception]):
    with StopSignals("bot"), pytest.raises(kind, match="training had not begun"):
        os.kill(os.getpid(), number)


@pytest.mark.parametrize(("number", "kind"), [(signal.SIGTERM, StoppedError), (signal.SIGINT, InterruptedRunError)])
def test_a_signal_whose_error_a_library_has_caught_is_not_forgotten(number: signal.Signals, kind: type[Exception]):
    with StopSignals("bot") as signals:
        with contextlib.suppress(Exception):
            os.kill(os.getpid(), number)
        with pytest.raises(kind, match="training had not begun"):
            signals.stop_with(lambda: None)


@pytest.mark.parametrize(
    ("number", "kind", "code"),
    [(signal.SIGTERM, StoppedAtOnceError, 143), (signal.SIGINT, InterruptedRunError, 130)],
)
def test_during_training_the_first_signal_asks_and_the_second_ends(
    number: signal.Signals, kind: type[StoppedError], code: int, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(stopping, "ONE_STOP_S", 0.05)
    asked: list[bool] = []
    with StopSignals("bot") as signals:
        signals.stop_with(lambda: asked.append(True))
        os.kill(os.getpid(), signal.SIGTERM)
        assert asked == [True]
        assert signals.received == signal.SIGTERM
        os.kill(os.getpid(), number)  # `timeout` sends it twice
        time.sleep(0.1)
        with pytest.raises(kind, match="at once") as error:
            os.kill(os.getpid(), number)
        assert error.value.exit_code == code


def test_a_signal_is_acknowledged_once_and_not_before_it_came():
    said: list[Event] = []
    with StopSignals("bot") as signals:
        signals.stop_with(lambda: None)
        signals.acknowledge(said.append)
        assert said == []
        os.kill(os.getpid(), signal.SIGTERM)
        signals.acknowledge(said.append)
        signals.acknowledge(said.append)
    assert [event.text for event in said if isinstance(event, Note)] == [
        "stopping: the workers save after this step; once more to stop at once without saving"
    ]


def test_a_stop_asked_for_by_sigint_exits_130_and_by_sigterm_75():
    stopped = StoppedError("saved step 3")
    with StopSignals("bot") as signals:
        signals.stop_with(lambda: None)
        assert signals.translated(stopped).exit_code == 75
        os.kill(os.getpid(), signal.SIGINT)
        assert signals.translated(stopped).exit_code == 130


def test_the_handlers_that_were_there_come_back():
    before = signal.getsignal(signal.SIGTERM)
    with StopSignals("bot"):
        assert signal.getsignal(signal.SIGTERM) != before
    assert signal.getsignal(signal.SIGTERM) == before
