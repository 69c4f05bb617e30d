"""What a chat template may do: only what takes, and makes, a bounded multiple of the conversation.

A template is judged by following it once with sizes instead of texts. Every value has a `weight`, the most that it can be
as a multiple of the conversation, and knows of which loop's item it is a part. Then

- a loop in a loop must go over a part of the outer one's item, so that all its rounds together see the conversation once;
  in a loop over anything but the messages themselves nothing else of the conversation may be written out;
- no value may weigh more than HEAVIEST, however often it was put together, escaped or split;
- what a namespace carries may stand once in what is assigned to a namespace, and no round writes a long text of its own;
- only functions, methods and filters whose result has a known weight can be called, and no callable is ever a value.

This service gives templates messages with a role and a text, the special tokens, and neither tools nor documents: loops
over those have no rounds. What stays possible is that a loop over the messages writes out something of all of them in every
round, as Mistral's does its system prompt.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

from jinja2 import nodes

from tunesmith.serving.template_calls import Calls
from tunesmith.serving.template_values import (
    ABSENT,
    CALLED,
    CARRIED,
    CONSTANT,
    GIVEN,
    MOST_FIXED,
    NAMES,
    NUMBER,
    OF_OBJECTS,
    SHORT,
    UNKNOWN,
    WHOLE,
    RefusedError,
    Round,
    Value,
    either,
    item,
    repeated,
    times,
    total,
)

HEAVIEST = 1000.0
"""Largest weight: a text that is so many times the conversation, or 100,000 characters of the template's own."""
MOST_STEPS = 100_000
"""Nodes that are looked at, those of a macro once for each call, and names that branches and macros take over."""
DEEPEST_LOOP = 3


_MAKES = {
    "Mul": "multiplies, which repeats texts and lists",
    "Pow": "raises to a power, which makes numbers of any length",
}


class Judge:
    """Follows one template.

    Args:
        tree: as Jinja parsed it.
    """

    def __init__(self, tree: nodes.Template) -> None:
        self._tree = tree
        self._macros: dict[str, nodes.Macro] = {}
        self._texts: set[str] = set()  # attributes of namespaces that are no numbers
        self._steps = self._loops = 0
        self._rounds: list[Round] = []
        self._names: dict[str, Value] = {}
        self._ever: dict[str, Value] = {**GIVEN}  # what each name has ever meant: a macro may see any of it
        self._calls = Calls(self._of, self._own, self._field)
        self._has_safe = any(one.name == "safe" for one in tree.find_all(nodes.Filter))

    def check(self) -> None:
        """Raises RefusedError."""
        self._check_macros()
        known = None
        while known != (len(self._texts), self._ever):  # an attribute is a number until a text is assigned to it
            known = (len(self._texts), dict(self._ever))
            self._loops, self._names = 0, {**GIVEN}
            self._run(self._tree.body)

    def _check_macros(self) -> None:
        for macro in self._tree.find_all(nodes.Macro):
            if macro.name in self._macros or macro.name in NAMES:
                raise RefusedError(macro.lineno, f"the macro {macro.name} has the name of another or of a function")
            self._macros[macro.name] = macro
        for macro in self._macros.values():
            for name in macro.find_all(nodes.Name):
                if name.name in self._macros:
                    whom = "itself" if name.name == macro.name else f"the macro {name.name}"
                    raise RefusedError(name.lineno, f"the macro {macro.name} calls {whom}")

    # --- statements: what they write ---

    def _run(self, body: Iterable[nodes.Node]) -> Value:
        written = Value()
        for node in body:
            self._step(node)
            run = getattr(self, f"_run_{type(node).__name__.lower()}", None)
            if run is None:
                what = {"Block": "block", "CallBlock": "call", "FilterBlock": "filter"}.get(type(node).__name__)
                raise RefusedError(
                    node.lineno, f"a statement that chat templates do without: {what or type(node).__name__}"
                )
            written = total(written, run(node))
        return written

    def _run_output(self, node: nodes.Output) -> Value:
        return total(*(self._own(one, self._of(one), True) for one in node.nodes))

    def _run_assign(self, node: nodes.Assign) -> Value:
        self._set(node.target, self._of(node.node))
        return Value()

    def _run_assignblock(self, node: nodes.AssignBlock) -> Value:
        if node.filter is not None:
            raise RefusedError(node.lineno, "a filter on a block")
        self._set(node.target, self._weighed(node, self._scoped(node.body)))
        return Value()

    def _run_scope(self, node: nodes.Scope) -> Value:
        return self._scoped(node.body)

    def _run_with(self, node: nodes.With) -> Value:
        before = dict(self._names)
        for target, value in zip(node.targets, node.values, strict=True):
            self._set(target, self._of(value))
        written = self._run(node.body)
        self._names = before
        return written

    def _run_if(self, node: nodes.If) -> Value:
        before, written, after = self._names, Value(), []
        for branch in (node, *node.elif_):
            self._names = dict(before)
            self._of(branch.test)
            written = either(written, self._run(branch.body))
            after.append(self._names)
        self._names = dict(before)
        written = either(written, self._run(node.else_))
        after.append(self._names)
        names = {name for one in after for name in one}
        self._step(node, len(names) * len(after))
        self._names = {name: either(*(one.get(name, UNKNOWN) for one in after)) for name in names}
        return written

    def _run_for(self, node: nodes.For) -> Value:
        if node.recursive:
            raise RefusedError(node.lineno, "a recursive loop")
        over = self._of(node.iter)
        if len(self._rounds) >= DEEPEST_LOOP:
            raise RefusedError(node.lineno, f"loops nested more deeply than {DEEPEST_LOOP}")
        outer, is_counted = self._innermost(), over.kind != "absent"
        if is_counted and outer is not None and over.part_of != outer.number:
            raise RefusedError(node.lineno, "a loop in a loop, over something else than a part of the outer one's item")
        if (over.gain > 0 and over.kind != "number") or (outer is not None and over.fixed > MOST_FIXED):
            raise RefusedError(node.lineno, "a loop over what a namespace has gathered, or over a text of the template")
        self._loops += 1
        each = replace(item(over), part_of=self._loops, fixed=0) if is_counted else ABSENT
        before = self._names
        self._names = {**before, "loop": Value(1, 0, self._loops, "loop")}
        self._rounds.append(Round(self._loops, each, over.kind == "messages", is_counted))
        self._set(node.target, each)
        if node.test is not None:
            self._of(node.test)
        written = self._run(node.body)
        ended = self._rounds.pop()
        self._names = before
        return either(repeated(node.lineno, over, ended, written), self._scoped(node.else_))

    def _run_macro(self, node: nodes.Macro) -> Value:
        rounds, self._rounds = self._rounds, []
        self._expand(node, [Value(1, 0, WHOLE)] * len(node.args), {})
        self._rounds = rounds
        return Value()

    def _run_break(self, _node: nodes.Node) -> Value:
        return Value()

    _run_continue = _run_break

    def _scoped(self, body: Iterable[nodes.Node]) -> Value:
        before, self._names = self._names, dict(self._names)
        written = self._run(body)
        self._names = before
        return written

    def _expand(self, macro: nodes.Macro, given: list[Value], named: dict[str, Value]) -> Value:
        """What a macro writes when it is called like that."""
        self._step(macro, len(self._ever))
        before, self._names = self._names, dict(self._ever)
        rest = total(*given[len(macro.args) :], *named.values())
        for name in ("varargs", "kwargs"):
            self._names[name] = rest
        unset = len(macro.args) - len(macro.defaults)
        for at, argument in enumerate(macro.args):
            default = macro.defaults[at - unset] if at >= unset else None
            value = given[at] if at < len(given) else named.get(argument.name)
            self._set(argument, value or (self._of(default) if default is not None else ABSENT))
        written = self._run(macro.body)
        self._names = before
        return self._weighed(macro, replace(written, kind="other"))

    def _set(self, target: nodes.Node, value: Value) -> None:
        if isinstance(target, nodes.Tuple):
            for one in target.items:
                self._set(one, replace(value, kind=value.kind if value.kind == "absent" else "other"))
        elif isinstance(target, nodes.NSRef):
            self._carry(target, target.attr, value)
        else:
            assert isinstance(target, nodes.Name), "Jinja assigns to names, tuples and namespaces"
            if target.name in NAMES or target.name in self._macros:
                raise RefusedError(target.lineno, f"{target.name} is given another meaning")
            self._names[target.name] = value
            unset = value if value.kind == "namespace" else UNKNOWN
            self._ever[target.name] = either(self._ever.get(target.name, unset), value)

    def _carry(self, node: nodes.Node, attribute: str, value: Value) -> None:
        if value.kind != "number":
            self._texts.add(attribute)
            if value.gain > 1:
                raise RefusedError(
                    node.lineno,
                    f"{attribute} of a namespace is assigned more than what it held: it would grow with every round",
                )

    # --- expressions: what they are ---

    def _of(self, node: nodes.Node) -> Value:
        self._step(node)
        of = getattr(self, f"_of_{type(node).__name__.lower()}", None)
        if of is None:
            raise RefusedError(
                node.lineno, _MAKES.get(type(node).__name__, f"no expression of chat templates: {node!r:.60}")
            )
        return self._weighed(node, of(node))

    def _of_const(self, node: nodes.Const) -> Value:
        if isinstance(node.value, str):
            return Value(len(node.value) / 100, fixed=len(node.value) / 100)
        return ABSENT if node.value is None else NUMBER

    def _of_templatedata(self, node: nodes.TemplateData) -> Value:
        return Value(len(node.data) / 100, fixed=len(node.data) / 100)

    def _of_name(self, node: nodes.Name) -> Value:
        if node.name in self._macros or (node.name in NAMES and node.name != "loop"):
            raise RefusedError(node.lineno, f"{node.name} is used as a value")
        return self._names.get(node.name, UNKNOWN)

    def _of_getattr(self, node: nodes.Getattr) -> Value:
        return self._field(node, self._of(node.node), node.attr)

    def _of_getitem(self, node: nodes.Getitem) -> Value:
        base = self._of(node.node)
        if isinstance(node.arg, nodes.Slice):
            for part in (node.arg.start, node.arg.stop, node.arg.step):
                if part is not None:
                    self._of(part)
            return base if base.kind in ("messages", "absent") else replace(base, kind="other")
        if isinstance(node.arg, nodes.Const) and isinstance(node.arg.value, str):
            return self._field(node, base, node.arg.value)
        index = self._of(node.arg)
        if index.kind not in ("number", "role") and base.kind != "absent":
            raise RefusedError(node.lineno, "an item is looked up by something that may be the name of a method")
        return item(base)

    def _field(self, node: nodes.Node, base: Value, name: str) -> Value:
        """An attribute or an item of that name."""
        if base.kind == "absent":
            return base
        if base.kind == "loop":
            each = next((one.item for one in self._rounds if one.number == base.part_of), UNKNOWN)
            return each if name in ("previtem", "nextitem") else NUMBER
        if name in OF_OBJECTS or name.startswith("_"):
            raise RefusedError(node.lineno, f"{name[:60]} is used as a value")
        if base.kind == "namespace":
            return Value(CARRIED, 1) if name in self._texts else NUMBER
        if base.kind == "message" and name != "content":
            return Value(0.2, 0, CONSTANT, "role") if name == "role" else ABSENT
        return replace(base, kind="other")

    def _of_filter(self, node: nodes.Filter) -> Value:
        return self._calls.filter(node)

    def _of_call(self, node: nodes.Call) -> Value:
        if node.dyn_args is not None or node.dyn_kwargs is not None:
            raise RefusedError(node.lineno, "a call with arguments that are unpacked")
        if isinstance(node.node, nodes.Getattr):
            return self._calls.method(node, node.node)
        name = node.node.name if isinstance(node.node, nodes.Name) else "a value"
        if name == "strftime_now":
            given = node.args[0] if len(node.args) == 1 and not node.kwargs else None
            if not isinstance(given, nodes.Const) or len(str(given.value)) > SHORT:
                raise RefusedError(
                    node.lineno, f"strftime_now with something else than a text of up to {SHORT} characters"
                )
            return Value(1)
        if name not in CALLED and name not in self._macros:
            raise RefusedError(node.lineno, f"calls {name}, which is none of the functions that chat templates need")
        if name == "namespace" and node.args:
            raise RefusedError(node.lineno, "a namespace of something else than names and values")
        given = [self._of(one) for one in node.args]
        named = {one.key: self._of(one.value) for one in node.kwargs}
        if name in self._macros:
            return self._expand(self._macros[name], given, named)
        if name == "namespace":
            for key, value in named.items():
                self._carry(node, key, value)
            return Value(CARRIED, 1, CONSTANT, "namespace")
        return Value() if name == "raise_exception" else replace(total(*given, *named.values()), kind="other")

    def _of_add(self, node: nodes.Add) -> Value:
        return self._joined(node, [node.left, node.right])

    def _of_concat(self, node: nodes.Concat) -> Value:
        return replace(self._joined(node, node.nodes), kind="other")

    def _joined(self, node: nodes.Node, parts: list[nodes.Expr]) -> Value:
        values = [self._own(one, self._of(one)) for one in parts]
        if all(one.kind == "number" for one in values):
            return NUMBER
        return times(total(*values), 6 if self._has_safe else 1)  # what meets a safe text is escaped

    def _of_mod(self, node: nodes.Mod) -> Value:
        left, _ = self._of(node.left), self._of(node.right)
        if left.kind != "number":
            raise RefusedError(node.lineno, "% of something else than a number, which fills texts to any width")
        return NUMBER

    def _counted(self, node: nodes.Node) -> Value:
        for one in node.iter_child_nodes():
            self._of(one)
        return NUMBER

    _of_sub = _of_div = _of_floordiv = _of_neg = _of_pos = _of_not = _counted

    def _of_compare(self, node: nodes.Compare) -> Value:
        for one in (node.expr, *(operand.expr for operand in node.ops)):
            self._of(one)
        return NUMBER

    def _of_test(self, node: nodes.Test) -> Value:
        if node.dyn_args is not None or node.dyn_kwargs is not None:
            raise RefusedError(node.lineno, "a test with arguments that are unpacked")
        is_asked = node.name in ("defined", "undefined") and isinstance(node.node, nodes.Name)
        for one in (*([] if is_asked else [node.node]), *node.args, *(one.value for one in node.kwargs)):
            self._of(one)
        return NUMBER

    def _of_and(self, node: nodes.And | nodes.Or) -> Value:
        return either(self._of(node.left), self._of(node.right))

    _of_or = _of_and

    def _of_condexpr(self, node: nodes.CondExpr) -> Value:
        self._of(node.test)
        return either(self._of(node.expr1), self._of(node.expr2) if node.expr2 is not None else ABSENT)

    def _of_list(self, node: nodes.List | nodes.Tuple) -> Value:
        return times(total(*(self._of(one) for one in node.items)), 2)

    _of_tuple = _of_list

    def _of_dict(self, node: nodes.Dict) -> Value:
        return times(total(*(self._of(part) for one in node.items for part in (one.key, one.value))), 2)

    # --- limits ---

    def _step(self, node: nodes.Node, steps: int = 1) -> None:
        self._steps += steps
        if self._steps > MOST_STEPS:
            raise RefusedError(node.lineno, f"more than {MOST_STEPS:,} steps, those of a macro counted at each call")

    def _weighed(self, node: nodes.Node, value: Value) -> Value:
        if value.weight > HEAVIEST:
            raise RefusedError(
                node.lineno, f"may be {value.weight:,.0f} times as long as the conversation; at most {HEAVIEST:,.0f}"
            )
        return value

    def _innermost(self) -> Round | None:
        return next((one for one in reversed(self._rounds) if one.is_counted), None)

    def _own(self, node: nodes.Node, value: Value, is_written: bool = False) -> Value:
        """The value, which in a loop over a part of the conversation must be a part of the loop's item."""
        inner = self._innermost()
        if inner is None or inner.is_plain or value.kind in ("number", "absent", "role"):
            return value
        if value.part_of not in (CONSTANT, inner.number) or (is_written and value.gain > 0):
            raise RefusedError(node.lineno, "repeats what is outside of a loop for every part of the conversation")
        if value.fixed > MOST_FIXED:
            raise RefusedError(node.lineno, "repeats a long text for every part of the conversation")
        return value
