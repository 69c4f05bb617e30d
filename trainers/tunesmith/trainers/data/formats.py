"""What a row says: formats recognised by their columns, and rows brought to one of three shapes."""

from __future__ import annotations

import json
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any, Literal

Format = Literal["messages", "sharegpt", "alpaca", "prompt_completion", "text"]

_ALSO_READ: dict[Format, tuple[str, ...]] = {
    "messages": ("system", "tools"),
    "sharegpt": ("system", "tools"),
    "alpaca": ("input", "system", "history"),
    "prompt_completion": ("system", "tools"),
    "text": (),
}

COLUMNS: dict[Format, tuple[str, ...]] = {
    "messages": ("messages",),
    "sharegpt": ("conversations",),
    "alpaca": ("instruction", "output"),
    "prompt_completion": ("prompt", "completion"),
    "text": ("text",),
}
"""The columns each format is recognised by, the first match wins."""

_ROLES = {
    "system": "system",
    "developer": "developer",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "model": "assistant",
    "bot": "assistant",
    "tool": "tool",
    "function": "tool",
    "observation": "tool",
}


@dataclass(frozen=True)
class Conversation:
    """A chat. Only the assistant's turns from message `first_trained` on may be trained: what is before is a prompt.

    `untrained` has the positions of the messages whose `weight` is 0.
    """

    messages: list[dict[str, Any]]
    tools: list[Any] | None = None
    first_trained: int = 0
    untrained: tuple[int, ...] = ()


@dataclass(frozen=True)
class Completion:
    """Plain text and what follows it."""

    prompt: str
    completion: str


@dataclass(frozen=True)
class Text:
    """A document."""

    text: str


Example = Conversation | Completion | Text


def detect(columns: Collection[str]) -> Format | None:
    """The format that has these columns, or None."""
    for name, needed in COLUMNS.items():
        if all(column in columns for column in needed):
            return name
    return None


def ignored(row: dict[str, Any], fmt: Format) -> list[str]:
    """The columns of a row that hold something and are not read."""
    read = {*COLUMNS[fmt], *_ALSO_READ[fmt]}
    if fmt == "prompt_completion" and isinstance(_parsed(row.get("prompt")), str):
        read = set(COLUMNS[fmt])
    return [str(column) for column, value in row.items() if column not in read and value not in (None, "")]


def normalise(row: dict[str, Any], fmt: Format) -> Example | str:
    """The row as an example, or the reason why it cannot be used."""
    missing = [column for column in COLUMNS[fmt] if row.get(column) is None]
    if missing:
        there = ", ".join(sorted(map(str, row))) or "none"
        return f"no `{missing[0]}` (columns: {there})" if missing[0] not in row else f"`{missing[0]}` is null"
    try:
        return _NORMALISERS[fmt](row)
    except _Unusable as reason:
        return str(reason)


class _Unusable(Exception):
    """Why a row cannot be used; never leaves this module."""


def _from_messages(row: dict[str, Any]) -> Example:
    return _conversation(_turns(row["messages"], "messages"), row)


def _from_sharegpt(row: dict[str, Any]) -> Example:
    return _conversation(_turns(row["conversations"], "conversations"), row)


def _from_alpaca(row: dict[str, Any]) -> Example:
    """Instruction and input make the user's turn, a blank line between them; `history` makes the turns before it."""
    asked = _words(row["instruction"], "instruction")
    if row.get("input") not in (None, ""):
        asked += "\n\n" + _words(row["input"], "input")
    exchanges = [*_history(row.get("history")), (asked, _words(row["output"], "output"))]
    said = [
        turn
        for question, answer in exchanges
        for turn in ({"role": "user", "content": question}, {"role": "assistant", "content": answer})
    ]
    return Conversation(_system(row) + said)


def _history(value: Any) -> list[tuple[str, str]]:
    value = _parsed(value)
    if value in (None, ""):
        return []
    if not isinstance(value, list):
        raise _Unusable(f"`history` is not a list of [question, answer] but {_kind(value)}")
    pairs = []
    for index, pair in enumerate(value):
        if not isinstance(pair, list | tuple) or len(pair) != 2:
            raise _Unusable(f"history[{index}] is not [question, answer]")
        pairs.append((_words(pair[0], f"history[{index}][0]"), _words(pair[1], f"history[{index}][1]")))
    return pairs


def _from_prompt_completion(row: dict[str, Any]) -> Example:
    prompt, completion = row["prompt"], row["completion"]
    if isinstance(prompt, str) and isinstance(completion, str):
        if not completion:
            raise _Unusable("`completion` is empty")
        return Completion(prompt, completion)
    if isinstance(prompt, str) or isinstance(completion, str):
        raise _Unusable("`prompt` and `completion` must both be text or both be lists of messages")
    asked, answered = _turns(prompt, "prompt"), _turns(completion, "completion")
    return _conversation(asked + answered, row, first_trained=len(asked))


def _from_text(row: dict[str, Any]) -> Example:
    return Text(_words(row["text"], "text"))


_NORMALISERS = {
    "messages": _from_messages,
    "sharegpt": _from_sharegpt,
    "alpaca": _from_alpaca,
    "prompt_completion": _from_prompt_completion,
    "text": _from_text,
}


def _words(value: Any, column: str) -> str:
    if not isinstance(value, str):
        raise _Unusable(f"`{column}` is not text but {_kind(value)}")
    if not value.strip():
        raise _Unusable(f"`{column}` is empty")
    return value


def _conversation(turns: list[dict[str, Any]], row: dict[str, Any], first_trained: int = 0) -> Conversation:
    tools = _parsed(row.get("tools"))
    if tools is not None and not isinstance(tools, list):
        raise _Unusable(f"`tools` is not a list but {_kind(tools)}")
    system = _system(row)
    if system and turns[0]["role"] == "system":
        if turns[0]["content"].strip() != system[0]["content"].strip():
            raise _Unusable("`system` and the system turn that the messages begin with differ")
        system = []
    turns = system + turns
    untrained = tuple(index for index, turn in enumerate(turns) if turn.pop("weight", 1) == 0)
    return Conversation(turns, tools or None, first_trained and first_trained + len(system), untrained)


def _system(row: dict[str, Any]) -> list[dict[str, Any]]:
    """The row's `system` as a turn, if it has one."""
    system = row.get("system")
    if system is not None and not isinstance(system, str):
        raise _Unusable(f"`system` is not text but {_kind(system)}")
    return [{"role": "system", "content": system}] if system and system.strip() else []


def _turns(value: Any, column: str) -> list[dict[str, Any]]:
    value = _parsed(value)
    if not isinstance(value, list):
        raise _Unusable(f"`{column}` is not a list of messages but {_kind(value)}")
    if not value:
        raise _Unusable(f"`{column}` is empty")
    return [_turn(item, f"{column}[{index}]") for index, item in enumerate(value)]


def _turn(item: Any, where: str) -> dict[str, Any]:
    """One message as role, content and whatever else a template may want (name, tool_calls …)."""
    if not isinstance(item, dict):
        raise _Unusable(f"{where} is not an object but {_kind(item)}")
    item = {key: value for key, value in item.items() if value is not None}
    role_key, content_key = ("from", "value") if "from" in item else ("role", "content")
    role = item.pop(role_key, None)
    if not isinstance(role, str):
        raise _Unusable(f"{where} has no `{role_key}`")
    if role not in _ROLES:
        raise _Unusable(f"{where} has the unknown role {role!r}")
    content = _content(item.pop(content_key, None), where, content_key, "tool_calls" in item)
    if not content.strip() and _ROLES[role] in ("user", "assistant") and "tool_calls" not in item:
        raise _Unusable(f"{where}: the {_ROLES[role]}'s content is empty")
    if (weight := item.get("weight", 1)) not in (0, 1) or isinstance(weight, bool):
        raise _Unusable(f"{where}: `weight` is {weight!r}: it may be 0 (not trained) or 1")
    return {"role": _ROLES[role], "content": content, **item}


def _content(value: Any, where: str, key: str, may_miss: bool) -> str:
    if isinstance(value, str):
        return value
    if value is None and may_miss:
        return ""
    if value is None:
        raise _Unusable(f"{where} has no `{key}`")
    if isinstance(value, list) and all(isinstance(part, dict) for part in value):
        others = sorted({str(part.get("type")) for part in value if not isinstance(part.get("text"), str)})
        if others:
            raise _Unusable(f"{where} has a part of type {', '.join(others)}: only text can be trained on")
        return "".join(part["text"] for part in value)
    raise _Unusable(f"{where}: `{key}` is not text but {_kind(value)}")


def _parsed(value: Any) -> Any:
    """CSV and some Parquet files hold lists as JSON text."""
    if isinstance(value, str) and value.lstrip().startswith("["):
        try:
            return json.loads(value)
        except ValueError:
            return value
    return value


def _kind(value: Any) -> str:
    names = {dict: "an object", list: "a list", str: "text", bool: "true or false", int: "a number", float: "a number"}
    return "null" if value is None else names.get(type(value), type(value).__name__)
