"""What people read: on standard error, so that standard output carries data alone."""

from __future__ import annotations

import json
import os
import sys
import traceback
from typing import Any

from rich.console import Console
from rich.text import Text

from tunesmith.cluster.errors import InterruptedRunError, TunesmithError


def stderr() -> Console:
    """A console on standard error that never breaks a line in the middle of a path."""
    return Console(stderr=True, soft_wrap=True, highlight=False)


def stdout() -> Console:
    """A console on standard output, for what a command was asked for."""
    return Console(soft_wrap=True, highlight=False)


def say(console: Console, text: str, style: str = "") -> None:
    """Prints text as it is, markup and all."""
    console.print(Text(text, style=style))


def show_error(error: TunesmithError) -> None:
    """Prints what happened, and what to do."""
    console = stderr()
    label, colour = ("stopped", "yellow") if error.exit_code in (75, 130, 143) else ("error", "bold red")
    console.print(Text.assemble((f"{label}: ", colour), error.what))
    if error.fix:
        say(console, error.fix, "cyan")
    if debugging():
        traceback.print_exception(error)


def exit_code_of(error: BaseException) -> int:
    """Shows any exception that ended a command; the code to exit with. A traceback only for what nobody foresaw."""
    if isinstance(error, KeyboardInterrupt):
        error = InterruptedRunError("interrupted")
    if isinstance(error, TunesmithError):
        show_error(error)
        return error.exit_code
    traceback.print_exception(error)
    say(stderr(), "error: this is a bug in Tunesmith, or something it did not foresee", "bold red")
    return 1


def debugging() -> bool:
    """Whether TUNESMITH_DEBUG asks for the traceback of every error."""
    return os.environ.get("TUNESMITH_DEBUG", "") not in ("", "0")


def print_json(value: Any) -> None:
    """One JSON line on standard output."""
    sys.stdout.write(json.dumps(value, ensure_ascii=False) + "\n")
    sys.stdout.flush()
