"""How large what a chat template makes can be: values as multiples of the conversation, and what filters and methods do."""

from __future__ import annotations

from dataclasses import dataclass, replace

CONSTANT, WHOLE = -1, 0
TOKEN, CARRIED, CAPTURED = 10.0, 32.0, 64.0
"""Weights of a special token and of a namespace's attribute; factor of what a captured loop repeats."""
CALLED = {"namespace", "dict", "raise_exception", "strftime_now"}
NAMES = CALLED | {"range", "lipsum", "cycler", "joiner", "self", "super", "caller", "loop"}
NUMBERS = {"length", "count", "wordcount", "int", "float", "abs"}
FILTERS = {
    **dict.fromkeys(("default", "d", "first", "last", "max", "min", "random", "sort", "trim", "unique", "string"), 1),
    **dict.fromkeys(("select", "reject", "selectattr", "rejectattr", "lower", "truncate", "safe"), 1),
    **dict.fromkeys(("items", "dictsort"), 2),
    **dict.fromkeys(("upper", "title", "capitalize"), 3),
    **dict.fromkeys(("list", "reverse", "tojson"), 8),
}
"""Filters by how much larger they can make a text or the way a list is written: `list` and `tojson` add quotes, commas
and escapes to every character."""
KEEPING = {"select", "reject", "selectattr", "rejectattr", "list", "reverse", "sort", "unique", "default", "d"}
"""Filters of which messages come out as messages."""
COUNTING = {"count", "endswith", "find", "index", "rfind", "rindex", "startswith", "isspace", "isdigit", "isalnum"}
COUNTING |= {"isalpha", "islower", "isupper", "isnumeric", "isdecimal", "isidentifier", "istitle"}
METHODS = {
    **dict.fromkeys(("get", "keys", "values", "copy", "lstrip", "rstrip", "strip", "removeprefix", "removesuffix"), 1),
    **dict.fromkeys(("items", "lower"), 2),
    **dict.fromkeys(("capitalize", "casefold", "swapcase", "title", "upper"), 3),
    **dict.fromkeys(("partition", "rpartition", "split", "rsplit", "splitlines"), 5),
    **dict.fromkeys(COUNTING, 0),
}
OF_OBJECTS = {name for kind in (str, bytes, int, float, list, dict, tuple, set, range) for name in dir(kind)}
OF_OBJECTS -= {"index", "count", "title", "real", "imag"}
MOST_FIXED, MOST_FIXED_OF_MESSAGES = 5.0, 200.0
"""Weight of a template's own text that a round of a loop may write; more where a round is for a whole message."""
SHORT, WIDEST = 64, 8
"""Characters of a replacement or a separator; spaces of tojson's indent."""


class RefusedError(Exception):
    """A template does what it may not.

    Args:
        line: where.
        reason: what it does, as a sentence without its end.
    """

    def __init__(self, line: int, reason: str) -> None:
        super().__init__(line, reason)
        self.line, self.reason = line, reason


@dataclass(frozen=True)
class Value:
    """What is known of a value.

    Attributes:
        weight: most that it can be, as a multiple of the conversation.
        gain: how often it may hold what a namespace carries.
        part_of: number of the loop of whose item it is a part; else the whole conversation, or nothing of it.
        kind: what it is, where that is known: `number`, `messages`, `message`, `role`, `namespace`, `loop`,
            `absent` (tools, and whatever this service does not give).
        fixed: the part of the weight that is the template's own text, which every round of a loop writes again.
    """

    weight: float = 0.0
    gain: float = 0.0
    part_of: int = CONSTANT
    kind: str = "other"
    fixed: float = 0.0


NUMBER, ABSENT = Value(kind="number"), Value(kind="absent")
UNKNOWN = Value(TOKEN, fixed=1)
GIVEN = {"messages": Value(1, 0, WHOLE, "messages"), "tools": ABSENT, "documents": ABSENT}


@dataclass(frozen=True)
class Round:
    """A loop at work; `is_plain` when it goes over the messages themselves, `is_counted` unless it has no rounds."""

    number: int
    item: Value
    is_plain: bool
    is_counted: bool


def total(*values: Value) -> Value:
    """All of them, one after the other."""
    made = Value()
    for one in values:
        part_of = _common(made.part_of, one.part_of)
        made = Value(made.weight + one.weight, made.gain + one.gain, part_of, fixed=made.fixed + one.fixed)
    return made


def either(*values: Value) -> Value:
    """One of them, nobody knows which."""
    made = values[0]
    for one in values[1:]:
        kinds = {made.kind, one.kind} - {"absent"} or {"absent"}
        made = Value(
            max(made.weight, one.weight),
            max(made.gain, one.gain),
            _common(made.part_of, one.part_of),
            kinds.pop() if len(kinds) == 1 else "other",
            max(made.fixed, one.fixed),
        )
    return made


def times(value: Value, factor: float) -> Value:
    """A text made of one, and so many times as large."""
    return Value(value.weight * factor, value.gain * factor, value.part_of, fixed=value.fixed * factor)


def item(value: Value) -> Value:
    """One that it holds."""
    return replace(value, kind={"messages": "message", "absent": "absent"}.get(value.kind, "other"))


def repeated(line: int, over: Value, ended: Round, written: Value) -> Value:
    """What all rounds of a loop write.

    Args:
        over: what it goes over.
        written: by one round.
    """
    if not ended.is_counted:
        return written
    most, items = (MOST_FIXED_OF_MESSAGES, 4) if ended.is_plain else (MOST_FIXED, 100)  # in a weight of one
    if written.fixed > most:
        raise RefusedError(line, f"every round writes {100 * written.fixed:,.0f} characters; at most {100 * most:,.0f}")
    factor = 1.0 if written.part_of == ended.number else CAPTURED
    parts = over.part_of if written.part_of in (ended.number, CONSTANT) else written.part_of
    return Value(factor * written.weight + items * over.weight * written.fixed, CAPTURED * written.gain, parts)


def _common(one: int, other: int) -> int:
    """What both are a part of."""
    if one == other or other == CONSTANT:
        return one
    return other if one == CONSTANT else WHOLE
