"""What the filters and methods that a chat template applies make of a value: nothing whose size is not known."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Protocol

from jinja2 import nodes

from tunesmith.serving.template_values import (
    COUNTING,
    FILTERS,
    KEEPING,
    METHODS,
    NUMBER,
    NUMBERS,
    OF_OBJECTS,
    SHORT,
    WIDEST,
    RefusedError,
    Value,
    either,
    item,
    times,
    total,
)


class _Own(Protocol):
    def __call__(self, node: nodes.Node, value: Value, is_written: bool = False) -> Value: ...


class Calls:
    """Filters and methods.

    Args:
        of: the value of an expression.
        own: the value, once it may be worked on in the loop at work.
        field: an attribute of a value.
    """

    def __init__(
        self,
        of: Callable[[nodes.Node], Value],
        own: _Own,
        field: Callable[[nodes.Node, Value, str], Value],
    ) -> None:
        self._of, self._own, self._field = of, own, field

    def method(self, node: nodes.Call, method: nodes.Getattr) -> Value:
        """`value.method(…)`."""
        base, name = self._of(method.node), method.attr
        if base.kind == "loop" and name in ("cycle", "changed"):
            return replace(total(*map(self._of, node.args)), kind="other")
        if name in ("replace", "join"):
            return self._inserted(node, name, base, node.args)
        if name not in METHODS or base.kind in ("namespace", "loop"):
            raise RefusedError(
                node.lineno, f"calls .{name[:60]}(), which is none of the methods that chat templates need"
            )
        self._own(method.node, base, True)
        given = [self._of(one) for one in (*node.args, *(one.value for one in node.kwargs))]
        if name in COUNTING:
            return NUMBER
        if name == "get":
            key = node.args[0] if node.args else None
            if isinstance(key, nodes.Const) and isinstance(key.value, str) and key.value not in OF_OBJECTS:
                base = self._field(node, base, key.value)
            return either(replace(base, kind=base.kind if base.kind in ("absent", "role") else "other"), *given[1:])
        return base if base.kind == "absent" else times(base, METHODS[name])

    def filter(self, node: nodes.Filter) -> Value:
        """`value | filter(…)`."""
        if node.node is None or node.dyn_args is not None or node.dyn_kwargs is not None:
            raise RefusedError(node.lineno, f"the filter {node.name} on a block, or with arguments that are unpacked")
        base = self._own(node.node, self._of(node.node), node.name not in NUMBERS)
        if node.name in ("replace", "join"):
            return self._inserted(node, node.name, base, node.args)
        values = [*node.args, *(one.value for one in node.kwargs)]
        if node.name == "map":
            return self._mapped(node, base)
        if node.name == "round" and all(
            isinstance(one, nodes.Const) and one.value in (0, 1, 2, 3, "common", "ceil", "floor") for one in values
        ):
            return NUMBER
        self._check_attributes(node)
        given = [self._own(one, self._of(one)) for one in values]
        if node.name in NUMBERS:
            return NUMBER
        if node.name not in FILTERS:
            raise RefusedError(node.lineno, f"the filter {node.name} is none of those that chat templates need")
        if node.name == "tojson":
            for one in values:
                _check_written(one)
        if node.name in ("default", "d"):
            return either(base, *given)
        if node.name in ("first", "last", "random", "max", "min"):
            return item(base)
        keeps = node.name in KEEPING if base.kind == "messages" else node.name in (*KEEPING, "items", "dictsort")
        kind = base.kind if keeps and base.kind in ("messages", "absent") else "other"
        factor = 1 if kind != "other" else FILTERS[node.name]
        return replace(times(total(base, *(given if node.name == "truncate" else ())), factor), kind=kind)

    def _mapped(self, node: nodes.Filter, base: Value) -> Value:
        """`map` with an attribute, or with a filter by its name."""
        if not node.args:
            if [one.key for one in node.kwargs] != ["attribute"]:
                raise RefusedError(node.lineno, "map with something else than a filter or an attribute")
            self._check_attributes(node)
            return replace(base, kind="other")
        name = node.args[0].value if isinstance(node.args[0], nodes.Const) else None
        if name not in FILTERS or name == "safe" or node.args[1:] or node.kwargs:
            raise RefusedError(
                node.lineno, f"map with {str(name)[:60]}, or with arguments for it: not what it may apply"
            )
        return replace(times(base, 2 * FILTERS[str(name)]), kind="other")

    def _check_attributes(self, node: nodes.Filter) -> None:
        """Names of attributes that a filter is given, which may lead to methods."""
        for one in node.kwargs:
            if one.key == "attribute":
                name = one.value.value if isinstance(one.value, nodes.Const) else None
                words = str(name).split(".")
                if name is None or any(word in OF_OBJECTS or word.startswith("_") for word in words):
                    raise RefusedError(node.lineno, f"the filter {node.name} takes the attribute {str(name)[:60]}")

    def _inserted(self, node: nodes.Call | nodes.Filter, name: str, base: Value, given: list[nodes.Expr]) -> Value:
        """`replace` and `join`, which put a text in as often as there is a place for it."""
        values = [self._of(one) for one in given]
        if isinstance(node, nodes.Filter):
            self._check_attributes(node)
        if name == "replace":
            old, new = (_text(one) for one in (given + [nodes.Const(None)] * 2)[:2])
            if new is None or len(new) > SHORT:
                raise RefusedError(node.lineno, f"replaces by something else than a text of up to {SHORT} characters")
            return times(base, max(1.0, len(new) / len(old) if old else len(new) + 1))
        if isinstance(node, nodes.Filter):
            between = _text(given[0]) if given else ""
        else:
            assert isinstance(node.node, nodes.Getattr), "a method"
            between, base = _text(node.node.node), self._own(node, total(*values), True)
        if between is None or len(between) > SHORT or any(one.key == "d" for one in node.kwargs):
            raise RefusedError(node.lineno, f"joins with something else than a text of up to {SHORT} characters")
        return times(base, 1 + len(between))


def _text(node: nodes.Expr) -> str | None:
    return node.value if isinstance(node, nodes.Const) and isinstance(node.value, str) else None


def _check_written(node: nodes.Node) -> None:
    """How `tojson` is told to write: its indent and separators are repeated."""
    parts = node.items if isinstance(node, nodes.Tuple) else [node]
    for one in parts:
        value = one.value if isinstance(one, nodes.Const) else "?" * (WIDEST + 1)
        if (value if isinstance(value, int) else len(str(value))) > WIDEST:
            raise RefusedError(node.lineno, f"tojson with an indent or a separator that may be wider than {WIDEST}")
