"""A conversation with a served model in the terminal: streamed, with the model changed by a word."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable
from typing import Any

from openai import APIConnectionError, APIError, APIStatusError, OpenAI

from tunesmith.cluster.errors import UsageError

HELP = """\
/model NAME   talk to another model, adapter or mixture from here on; without a name: which there are
/system TEXT  begin anew with this system prompt
/clear        begin anew
/help         this
/quit         the end (so is Ctrl-D)"""


class Chat:
    """One conversation.

    Args:
        say: takes text as it comes, for standard output.
        note: takes lines about the conversation, for standard error.
    """

    def __init__(self, client: OpenAI, model: str, say: Callable[[str], None], note: Callable[[str], None]) -> None:
        self._client, self._model, self._say, self._note = client, model, say, note
        self._system: str | None = None
        self._messages: list[dict[str, str]] = []

    def take(self, line: str) -> bool:
        """Answers a line; False when it ends the conversation."""
        word, _, rest = line.strip().partition(" ")
        if not word:
            return True
        if word in ("/quit", "/exit"):
            return False
        if word == "/help":
            self._note(HELP)
        elif word == "/clear":
            self._messages.clear()
            self._note("a new conversation")
        elif word == "/system":
            self._system = rest.strip() or None
            self._messages.clear()
            self._note("a new conversation" + (f", told: {self._system}" if self._system else ""))
        elif word == "/model":
            self._change_model(rest.strip())
        elif word.startswith("/"):
            self._note(f"there is no {word}; /help shows what there is")
        else:
            self._ask(line.strip())
        return True

    def _change_model(self, name: str) -> None:
        try:
            models = [one.id for one in self._client.models.list()]
        except APIError as error:
            self._note(error.message)
            return
        if name in models:
            self._model = name
        self._note(
            f"now with {name}" if name in models else f"{name or self._model}: there are {', '.join(models) or 'none'}"
        )

    def _ask(self, text: str) -> None:
        asked = [*self._messages, {"role": "user", "content": text}]
        system = [{"role": "system", "content": self._system}] if self._system else []
        messages: Any = [*system, *asked]
        answer = ""
        try:
            for chunk in self._client.chat.completions.create(model=self._model, messages=messages, stream=True):
                if chunk.choices and (new := chunk.choices[0].delta.content):
                    answer += new
                    self._say(new)
        except KeyboardInterrupt:
            self._note("\n(stopped)")
        except APIError as error:
            self._note(error.message if isinstance(error, APIStatusError) else f"the answer broke off: {error.message}")
            return
        self._say("\n")
        self._messages = [*asked, {"role": "assistant", "content": answer}]


def talk(url: str, key: str | None, model: str, lines: Iterable[str] | None = None) -> None:
    """Talks until the lines end.

    Args:
        lines: what is said; None reads the terminal.

    Raises:
        UsageError: nothing answers, or there is no such model.
    """
    client = OpenAI(base_url=url, api_key=key or "none")
    try:
        models = [one.id for one in client.models.list()]
    except APIConnectionError as error:
        raise UsageError(f"{url}: nothing answers there", "Is `tunesmith serve` up? --url names another.") from error
    except APIStatusError as error:
        said = error.message if key else "no API key was given"
        raise UsageError(f"{url}: {said}", "Give a key in TUNESMITH_API_KEY.") from error
    if model not in models and "@" not in model:
        raise UsageError(f"{model} is not served; there are {', '.join(models) or 'none'}")

    def say(text: str) -> None:
        sys.stdout.write(text)
        sys.stdout.flush()

    chat = Chat(client, model, say, lambda text: print(text, file=sys.stderr))
    if lines is None and sys.stdin.isatty():
        print(f"{model} at {url}; /help shows the commands, Ctrl-D ends", file=sys.stderr)
    for line in lines if lines is not None else _typed():
        if not chat.take(line):
            break


def _typed() -> Iterable[str]:
    while True:
        try:
            yield input("> " if sys.stdin.isatty() else "")
        except EOFError:
            return
        except KeyboardInterrupt:
            print(file=sys.stderr)
