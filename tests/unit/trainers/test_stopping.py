"""Signals: before training they end the command, during it they ask the workers to save."""

from __future__ import annotations

import os
import signal

import pytest

from tunesmith.cluster.errors import InterruptedRunError, StoppedError
from tunesmith.trainers.stopping import StopSignals


@pytest.mark.parametrize(("number", "kind"), [(signal.SIGTERM, StoppedError), (signal.SIGINT, InterruptedRunError)])
def test_before_training_a_signal_ends_the_command(number: signal.Signals, kind: type[Exception]):
    with StopSignals("bot"), pytest.raises(kind, match="training had not begun"):
        os.kill(os.getpid(), number)


def test_during_training_the_first_signal_asks_and_the_second_ends():
    asked: list[bool] = []
    with StopSignals("bot") as signals:
        signals.stop_with(lambda: asked.append(True))
        os.kill(os.getpid(), signal.SIGTERM)
        assert asked == [True]
        assert signals.received == signal.SIGTERM
        with pytest.raises(StoppedError, match="at once"):
            os.kill(os.getpid(), signal.SIGTERM)


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
