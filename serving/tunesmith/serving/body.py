"""Bytes of a request to a checked object, or a RequestError: nothing that a client sends ends any other way.

JSON leaves room for what no client means: a key twice, NaN, integers of a million digits, a hundred thousand open
brackets, half of a surrogate pair. All of it is refused here, so that nothing behind has to think of it.
"""

from __future__ import annotations

import json
import math
from typing import Any, NoReturn, TypeVar

from pydantic import BaseModel, ValidationError

from tunesmith.cluster.errors import RequestError

DEEPEST = 64
"""Levels of nesting of a body; a JSON schema within it may be that deep less three."""

MOST_CONTAINERS = 200_000
"""Opening brackets in a body, those within texts too: each may cost some sixty bytes of memory for one on the wire."""

LONGEST_NUMBER = 40
"""Characters of a number: Python's own conversion takes quadratic time."""

UNSUPPORTED = "unsupported_parameter"
"""Type of the mistake of asking for what OpenAI does and this server does not; its context has the `key`."""

BRANCHES = ("one", "texts", "tokens", "token_lists")
"""Names that pydantic gives to the branches of a union within a mistake's path; clients know no such keys."""

_SHOWN = 80  # characters of a client's own key in a message

Type = TypeVar("Type", bound=BaseModel)


def parse_body(raw: bytes, type: type[Type], max_bytes: int) -> Type:
    """Reads and checks a request's body. A body of megabytes takes tenths of a second: give those to a thread.

    Raises:
        RequestError: 413 when it is longer than `max_bytes`, else 400, naming the parameter where one is wrong.
    """
    if len(raw) > max_bytes:
        raise RequestError(
            f"the body has {len(raw)} bytes and may have {max_bytes}", status=413, code="request_too_large"
        )
    tree = _read(raw)
    if not isinstance(tree, dict):
        raise _not_json("the body must be a JSON object")
    _check_texts_and_depth(tree)
    try:
        return type.model_validate(tree)
    except ValidationError as error:
        raise _explained(error) from None


def _read(raw: bytes) -> Any:
    if raw.count(b"[") + raw.count(b"{") > MOST_CONTAINERS:
        raise _not_json(f"the body has more than {MOST_CONTAINERS} opening brackets")
    try:
        return json.loads(
            raw.decode("utf-8"),
            object_pairs_hook=_object,
            parse_int=_integer,
            parse_float=_decimal,
            parse_constant=_constant,
        )
    except UnicodeDecodeError as error:
        raise _not_json(f"the body is not UTF-8 at byte {error.start}") from None
    except json.JSONDecodeError as error:
        raise _not_json(f"the body is not JSON: {error.msg} at character {error.pos}") from None
    except RecursionError:
        raise _too_deep() from None


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) < len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))
        raise _not_json(f"the body has the key {shown(twice)} twice in one object")
    return made


def _integer(written: str) -> int:
    if len(written) > LONGEST_NUMBER:
        raise _not_json(f"the body has a number of {len(written)} digits")
    return int(written)


def _decimal(written: str) -> float:
    if len(written) > LONGEST_NUMBER or not math.isfinite(number := float(written)):
        raise _not_json(f"the number {shown(written)} is out of range")
    return number


def _constant(written: str) -> NoReturn:
    raise _not_json(f"{written} is not JSON")


def _check_texts_and_depth(tree: Any) -> None:
    """Level by level, without recursion, so that the tree's depth is not the stack's."""
    level: list[Any] = [tree]
    for _ in range(DEEPEST):
        below: list[Any] = []
        for node in level:
            if isinstance(node, dict):
                _check_texts(node)
            children = list(node.values()) if isinstance(node, dict) else node
            kinds = set(map(type, children))
            if str in kinds:
                _check_texts(child for child in children if isinstance(child, str))
            if dict in kinds or list in kinds:
                below.extend(child for child in children if isinstance(child, dict | list))
        if not below:
            return
        level = below
    raise _too_deep()


def _check_texts(texts: Any) -> None:
    for text in texts:
        if not text.isascii():
            try:
                text.encode()
            except UnicodeEncodeError as error:
                raise _not_json(
                    f"a text holds half of a surrogate pair (U+{ord(text[error.start]):04X}), which is no character"
                ) from None


def _explained(error: ValidationError) -> RequestError:
    """The first mistake in words; pydantic's own text would quote the value, which may be the whole prompt."""
    mistakes = error.errors(include_url=False, include_input=False)
    first = mistakes[0]
    where, context = first["loc"], first.get("ctx", {})
    path = [str(part)[:_SHOWN] for index, part in enumerate(where) if not (index and part in BRANCHES)]
    if first["type"] == UNSUPPORTED:
        path.append(context["key"])
    param = ".".join(path)[:200] or None
    if first["type"] == "extra_forbidden":
        what = f"{shown(param or '')} is not a parameter of this request"
        return RequestError(what, param=param, code="unknown_parameter")
    said = str(context["error"]) if "error" in context else first["msg"]
    more = f" (and {len(mistakes) - 1} more mistakes)" if len(mistakes) > 1 else ""
    code = {"missing": "missing_required_parameter", UNSUPPORTED: UNSUPPORTED}.get(first["type"], "invalid_value")
    return RequestError(f"{param or 'body'}: {said[:500]}{more}", param=param, code=code)


def shown(text: str) -> str:
    """A client's own text in a message: quoted, escaped and cut."""
    return json.dumps(text if len(text) <= _SHOWN else text[:_SHOWN] + "…")


def _not_json(what: str) -> RequestError:
    return RequestError(what, code="invalid_json")


def _too_deep() -> RequestError:
    return _not_json(f"the body is nested more than {DEEPEST} levels deep")
