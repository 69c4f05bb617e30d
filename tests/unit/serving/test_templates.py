"""Chat templates of adapters: bombs are refused with line and reason before anything is rendered, real ones pass."""

from __future__ import annotations

import json
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import jinja2
import pytest
import tiny_adapters
from chat_templates import KNOWN
from tiny_models import CHATML

from tunesmith.cluster.errors import AdapterError
from tunesmith.serving import adapters_command, templates
from tunesmith.serving.adapters_command import Offered
from tunesmith.serving.checks import Rules
from tunesmith.serving.registry import Registry
from tunesmith.serving.templates import check_template

M = "{% for m in messages %}"
END = "{% endfor %}"
BOMBS: dict[str, tuple[str, int, str]] = {
    "loops over ranges": (
        "\n{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
        2,
        "calls range, which is none of the functions",
    ),
    "a range by another name": (
        "{% set r = range %}{% for a in r(99999) %}{% endfor %}",
        1,
        "range is used as a value",
    ),
    "a range in a namespace": ("{% set n = namespace(get=range) %}{{ n.get(9) }}", 1, "range is used as a value"),
    "an allowed name for a range": ("{% set namespace = messages %}", 1, "namespace is given another meaning"),
    "lipsum": ("{{ lipsum(n=99999) }}", 1, "calls lipsum"),
    "cycler": ("{% set c = cycler('a') %}", 1, "calls cycler"),
    "joiner": ("{% set c = joiner('a') %}", 1, "calls joiner"),
    "a text times a number": ("{{ 'x' * 3000000000 }}", 1, "multiplies"),
    "a list times a number": ("{% for a in [1] * 3000000000 %}{% endfor %}", 1, "multiplies"),
    "a power": ("{{ 9 ** 9 ** 9 }}", 1, "raises to a power"),
    "a wide %": ("a\nb\n{{ '%999999999d' % 1 }}", 3, "% of something else than a number"),
    "a wide % by a name": ("{% set f = '%99999999d' %}{{ f % 1 }}", 1, "% of something else than a number"),
    "a wide % in a namespace": (
        "{% set n = namespace(f=1) %}{{ n.f % 1 }}{% set n.f = '%9999999d' %}{{ n.f % 1 }}",
        1,
        "% of something else than a number",
    ),
    "doubling in a namespace": (
        "{% set ns = namespace(x='a') %}\n" + M + "{% set ns.x = ns.x ~ ns.x %}" + END + "{{ ns.x }}",
        2,
        "x of a namespace is assigned more than what it held: it would grow with every round",
    ),
    "doubling by +": (
        "{% set ns = namespace(x='a') %}" + M + "{% set ns.x = ns.x + ns.x %}" + END,
        1,
        "grow with every",
    ),
    "doubling by a detour": (
        "{% set ns = namespace(x='a') %}" + M + "{% set t = ns.x %}{% set ns.x = t ~ t %}" + END,
        1,
        "it would grow with every round",
    ),
    "doubling by a block": (
        "{% set ns = namespace(x='a') %}" + M + "{% set ns.x %}{{ ns.x }}{{ ns.x }}{% endset %}" + END,
        1,
        "it would grow with every round",
    ),
    "doubling by a macro": (
        "{% macro t(a) %}{{ a }}{{ a }}{% endmacro %}{% set ns = namespace(x='a') %}"
        + M
        + "{% set ns.x = t(ns.x) %}"
        + END,
        1,
        "it would grow with every round",
    ),
    "doubling between two": (
        "{% set ns = namespace(x='a', y='a') %}" + M + "{% set ns.x = ns.y ~ ns.x %}{% set ns.y = ns.x %}" + END,
        1,
        "x of a namespace is assigned more",
    ),
    "doubling by join": (
        "{% set ns = namespace(x='a') %}" + M + "{% set ns.x = ns.x|join('--') %}" + END,
        1,
        "grow with",
    ),
    "doubling by quoting": (
        "{% set ns = namespace(x='a') %}" + M + "{% set ns.x = ns.x|tojson %}" + END,
        1,
        "grow with",
    ),
    "doubling by a list": (
        "{% set ns = namespace(x='a') %}" + M + "{% set ns.x = ns.x|list|string %}" + END,
        1,
        "grow",
    ),
    "doubling by replacing": (
        "{% set ns = namespace(x='a') %}" + M + "{% set ns.x = ns.x|replace('a', 'aa') %}" + END,
        1,
        "it would grow with every round",
    ),
    "doubling line by line": (
        "{% set x = messages[0].content %}" + "{% set x = x ~ x %}\n" * 40,
        10,
        "may be 1,024 times as long as the conversation; at most 1,000",
    ),
    "quoting line by line": ("{% set x = 'a' %}" + "{% set x = x|tojson %}" * 30, 1, "times as long"),
    "captured loops": (
        "{% set t = messages[0].content %}" + ("{% set t %}" + M + "{{ t }}" + END + "{% endset %}") * 3,
        1,
        "may be 4,096 times as long",
    ),
    "a macro that calls itself": ("{% macro a() %}\n{{ a() }}{% endmacro %}{{ a() }}", 2, "the macro a calls itself"),
    "macros that call macros": (
        "{% macro a() %}{% endmacro %}{% macro b() %}{{ a() }}{{ a() }}{% endmacro %}",
        1,
        "the macro b calls the macro a",
    ),
    "a macro as a value": ("{% macro a() %}{% endmacro %}{% set n = namespace(get=a) %}", 1, "a is used as a value"),
    "a macro called twice over": (
        "{% macro a() %}" + "{{ 1 }}" * 900 + "{% endmacro %}" + "{{ a() }}" * 900,
        1,
        "steps",
    ),
    "calls with bodies": ("{% macro a() %}{% endmacro %}{% call a() %}{% endcall %}", 1, "do without: call"),
    "caller": ("{% macro a() %}{{ caller() }}{% endmacro %}", 1, "calls caller"),
    "a recursive loop": ("{% for a in messages recursive %}{{ loop(messages) }}{% endfor %}", 1, "a recursive loop"),
    "blocks that contain themselves": ("{% block a %}{{ self.a() }}{% endblock %}", 1, "do without: block"),
    "four loops": (
        "{% for a in messages %}{% for b in a %}{% for c in b %}{% for d in c %}" + END * 4,
        1,
        "loops nested more deeply than 3",
    ),
    "messages by messages": (M + "{% for n in messages %}x" + END + END, 1, "a loop in a loop, over something else"),
    "a part by itself": (
        M + "{% for a in m.content %}{% for b in m.content %}x" + END * 3,
        1,
        "a loop in a loop, over something else",
    ),
    "a loop in a macro": (
        "{% macro a(x) %}{% for y in x %}{% endfor %}{% endmacro %}\n" + M + "{{ a(messages) }}" + END,
        1,
        "a loop in a loop, over something else",
    ),
    "a macro that sees another name than its caller": (
        "{% set x = messages[0].content %}{% macro a() %}{% for c in x %}y{% endfor %}{% endmacro %}"
        "{% for c in messages[0].content %}{% set x = c %}{{ a() }}{% endfor %}",
        1,
        "a loop in a loop, over something else",
    ),
    "a macro that sees a token": (
        "{% macro a() %}{{ x % 1 }}{% endmacro %}{{ a() }}{% set x = 1 %}",
        1,
        "% of something else than a number",
    ),
    "doubling by a macro line by line": (
        "{% set x = 'a' %}{% macro a() %}{{ x }}{{ x }}{% endmacro %}" + "{% set x = a() %}" * 40,
        1,
        "times as long",
    ),
    "the conversation for every letter": (
        "{% for c in messages[0].content %}{{ messages[0].content }}{% endfor %}",
        1,
        "repeats what is outside of a loop",
    ),
    "all of it for every letter of a part": (
        M + "{% for c in m.content %}{{ m.content|tojson }}" + END + END,
        1,
        "repeats what is outside of a loop",
    ),
    "what was gathered for every letter": (
        "{% set ns = namespace(x='') %}{% set ns.x = messages[0].content %}"
        "{% for c in messages[0].content %}{{ ns.x }}{% endfor %}",
        1,
        "repeats what is outside of a loop",
    ),
    "a long text for every letter": (
        "{% for c in messages[0].content %}" + "x" * 90_000 + "{% endfor %}",
        1,
        "repeats a long text for every part",
    ),
    "many texts for every letter": (
        "{% for c in messages[0].content %}" + "{{ 'xxxxxxxxxx' }}" * 60 + "{% endfor %}",
        1,
        "every round writes 600 characters; at most 500",
    ),
    "a long text for every message": (M + "x" * 90_000 + END, 1, "every round writes 90,000 characters"),
    "a long text behind every letter": (
        M + "{% for c in m.content %}{% for d in c ~ '" + "x" * 9_000 + "' %}y" + END * 3,
        1,
        "repeats a long text for every part",
    ),
    "letters spread again and again": (
        "{% set t = messages[0].content %}" + "{% set t %}{% for c in t %}{{ c }}x{% endfor %}{% endset %}" * 20,
        1,
        "times as long as the conversation",
    ),
    "letters gathered again and again": (
        "{% set ns = namespace(x=messages[0].content, y='') %}"
        + "{% for c in ns.x %}{% set ns.y = ns.y ~ 'xx' %}{% endfor %}{% set ns.x = ns.y %}{% set ns.y = '' %}" * 20,
        1,
        "a loop over what a namespace has gathered",
    ),
    "center": ("{{ 'x'|center(999999999) }}", 1, "the filter center is none of those"),
    "wordwrap": ("{{ 'x'|wordwrap(1, wrapstring='x') }}", 1, "the filter wordwrap"),
    "indent": ("{{ 'x'|indent(999999999) }}", 1, "the filter indent"),
    "format": ("{{ '%9999999d'|format(1) }}", 1, "the filter format"),
    "batch": ("{{ [1]|batch(999999999, 'x') }}", 1, "the filter batch"),
    "slice": ("{{ [1]|slice(999999999) }}", 1, "the filter slice"),
    "attr": ("{{ ('x'|attr('ljust'))(999999999) }}", 1, "calls a value"),
    "round": ("{{ 1.5|round(999999999, 'ceil') }}", 1, "the filter round"),
    "map": ("{{ ['x']|map('center', 999999999)|list }}", 1, "map with center"),
    "map with a value": (
        "{{ messages|map('default', messages, true)|list }}",
        1,
        "map with default, or with arguments",
    ),
    "map to methods": ("{{ (['x']|map(attribute='ljust')|first)(9) }}", 1, "calls a value"),
    "a method of map": ("{% set f = ['x']|map(attribute='ljust')|first %}", 1, "takes the attribute ljust"),
    "a wide indent": ("{{ messages|tojson(indent=999999999) }}", 1, "an indent or a separator that may be wider"),
    "a wide indent in words": ("{{ messages|tojson(indent='" + " " * 99 + "') }}", 1, "may be wider"),
    "a wide indent by place": ("{{ messages|tojson(true, 999999999, sort_keys=true) }}", 1, "may be wider"),
    "wide separators": ("{{ messages|tojson(separators=(',', '" + "x" * 99 + "')) }}", 1, "may be wider"),
    "replacing by all": (
        "{{ messages[0].content.replace('a', messages[0].content) }}",
        1,
        "replaces by something else",
    ),
    "joining with all": ("{{ messages[0].content|join(messages[0].content) }}", 1, "joins with something else"),
    "joining by a method": ("{{ messages[0].content.join(messages[0].content) }}", 1, "joins with something else"),
    "joining by name": ("{{ messages[0].content|join(d=messages[0].content) }}", 1, "joins with something else"),
    "ljust": ("{{ 'x'.ljust(999999999) }}", 1, r"calls \.ljust\(\), which is none of the methods"),
    "to_bytes": ("{{ (1).to_bytes(999999999, 'big') }}", 1, r"calls \.to_bytes\(\)"),
    "expandtabs": ("{{ '\t'.expandtabs(999999999) }}", 1, r"calls \.expandtabs\(\)"),
    "str.format": ("{{ '{:>999999999}'.format(1) }}", 1, r"calls \.format\(\)"),
    "translate": ("{{ 'x'.translate({120: 'xxxx'}) }}", 1, r"calls \.translate\(\)"),
    "a method by an item": ("{{ 'x'['ljust'](999999999) }}", 1, "calls a value"),
    "a method kept in a table": ("{% set d = {'strip': 'x'.ljust} %}{{ d.strip(99) }}", 1, "ljust is used as a value"),
    "a method by a worked-out name": ("{% set d = {'strip': 'x'['lju' ~ 'st']} %}", 1, "may be the name of a method"),
    "arguments unpacked": ("{{ 'x'.split(*messages) }}", 1, "arguments that are unpacked"),
    "a date as wide as you like": ("{{ strftime_now('%9d' ~ 'x') }}", 1, "strftime_now with something else"),
    "includes": ("{% include 'x' %}", 1, "do without: Include"),
    "a filter on a block": ("{% filter center(999999999) %}{% endfilter %}", 1, "do without: filter"),
    "no Jinja": ("a\n{% for %}", 2, "no Jinja: "),
    "an open loop": ("{% for a in messages %}", 1, "no Jinja: "),
}
"""By what they do: the template, the line that is named, and the reason."""


@pytest.mark.parametrize("kind", BOMBS)
def test_a_bomb_is_refused_with_its_line_and_reason_and_never_run(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    text, line, reason = BOMBS[kind]

    def never(*_: Any, **__: Any) -> None:
        raise AssertionError("a template was compiled or rendered")

    for name in ("compile", "from_string", "compile_expression", "_generate"):
        monkeypatch.setattr(jinja2.Environment, name, never)
    began = time.monotonic()
    with pytest.raises(AdapterError, match=rf"chat_template\.jinja: line {line}: .*{reason}.*") as refusal:
        check_template(text, "chat_template.jinja")
    assert "A chat template runs at every request." in refusal.value.fix
    assert "--trust-template" in refusal.value.fix
    assert time.monotonic() - began < 2


UNREADABLE = {
    "deep statements": "{% if 1 %}" * 200 + "{% endif %}" * 200,
    "deep brackets": "{{ " + "(" * 5000 + ")" * 5000 + " }}",
    "a long sum": "{{ " + "+".join("1" * 2000) + " }}",
    "a number of many digits": "{{ " + "9" * 9999 + " }}",
    "too many characters": "x" * (2**18 + 1),
}


@pytest.mark.parametrize("kind", UNREADABLE)
def test_what_cannot_be_judged_is_refused(kind: str) -> None:
    with pytest.raises(AdapterError, match=r"chat_template\.jinja: "):
        check_template(UNREADABLE[kind], "chat_template.jinja")


@pytest.mark.parametrize("model", KNOWN)
def test_templates_of_well_known_models_pass(model: str) -> None:
    check_template(KNOWN[model], model)


OURS = """\
{%- for message in messages %}
    {{- '<|im_start|>' + message['role'] + '\\n' }}
    {%- if message['role'] == 'assistant' %}
        {%- generation %}{{- message['content'] | trim + "<|im_end|>" }}{%- endgeneration %}{{- '\\n' }}
    {%- else %}
        {{- raise_exception('there is no role ' + message['role']) }}
    {%- endif %}
{%- endfor %}"""
SMALL = {
    "the tests' own": CHATML,
    "as ours are made": OURS,
    "gathering": "{% set ns = namespace(x='') %}" + M + "{% set ns.x = ns.x ~ m.content %}" + END + "{{ ns.x }}",
    "a macro for each message": "{% macro a(m) %}{{ m.role }}: {{ m.content|trim }}{% endmacro %}"
    + M
    + "{{ a(m) }}"
    + END,
    "a macro over names of the template": "{% set ns = namespace(i=0) %}{% set b = '<' %}"
    "{% macro a(m) %}{{ b ~ m.content }}{% if ns.i % 2 == 0 %}x{% endif %}{% endmacro %}"
    + M
    + "{{ a(m) }}{% set ns.i = ns.i + 1 %}"
    + END,
    "roles by a table": "{% set names = {'user': 'U'} %}" + M + "{{ names[m.role] }}" + END,
    "leaving early": M + "{% if loop.index > 2 %}{% break %}{% else %}{% continue %}{% endif %}" + END,
    "numbers": "{% set n = messages|length %}{% if n % 2 == 0 and (n - 1) // 2 > 1 %}{% endif %}",
    "escaping": "{{ messages[0].content|replace('\"', '\\\\\"')|replace('\\n', '\\\\n')|tojson|safe }}",
}


@pytest.mark.parametrize("kind", SMALL)
def test_what_templates_ordinarily_do_passes(kind: str) -> None:
    check_template(SMALL[kind], kind)


def test_every_template_that_training_gives_passes() -> None:
    from tunesmith.trainers.data.templates import _NAMED

    for name, (text, marker) in _NAMED.items():
        for first in ("", "<s>"):
            filled = text.replace("@BOS@", json.dumps(first)).replace("@END@", json.dumps(marker or "</s>"))
            check_template(filled, name)


BOMB = "a\n{{ 'x' * 3000000000 }}"
PLACES: dict[str, tuple[str, str, str]] = {
    "chat_template.jinja": ("chat_template.jinja", BOMB, r"chat_template\.jinja: line 2: multiplies"),
    "another template": (
        "additional_chat_templates/tool_use.jinja",
        BOMB,
        r"additional_chat_templates/tool_use\.jinja: line 2: multiplies",
    ),
    "a text in the settings": (
        "tokenizer_config.json",
        json.dumps({"chat_template": BOMB}),
        r"tokenizer_config\.json: chat_template: line 2: multiplies",
    ),
    "a list in the settings": (
        "tokenizer_config.json",
        json.dumps({"chat_template": [{"name": "a", "template": "x"}, {"name": "a", "template": BOMB}]}),
        r"tokenizer_config\.json: chat_template 'a': line 2: multiplies",
    ),
    "a table in the settings": (
        "tokenizer_config.json",
        json.dumps({"chat_template": {"tool": BOMB}}),
        r"tokenizer_config\.json: chat_template 'tool': line 2: multiplies",
    ),
    "a number in the settings": (
        "tokenizer_config.json",
        json.dumps({"chat_template": [1]}),
        "chat_template is neither a text nor a list of names and templates",
    ),
    "settings of a processor": (
        "chat_template.json",
        json.dumps({"chat_template": BOMB}),
        r"chat_template\.json: chat_template: line 2: multiplies",
    ),
    "a token that is a book": (
        "tokenizer_config.json",
        json.dumps({"extra_special_tokens": {"a": {"content": "x" * 1001}}}),
        r"tokenizer_config\.json: a text of 1,001 characters",
    ),
}


@pytest.mark.parametrize("place", PLACES)
def test_bombs_are_found_wherever_a_tokenizer_looks_and_enter_only_when_trusted(tmp_path: Path, place: str) -> None:
    name, text, reason = PLACES[place]
    folder = tiny_adapters.plain(tmp_path / "adapter")
    (folder / name).parent.mkdir(exist_ok=True)
    (folder / name).write_text(text)
    registry = Registry(str(tmp_path / "registry"))
    with pytest.raises(AdapterError, match=reason):
        registry.add("support", folder, rules=Rules(trust_base=True))
    assert registry.newest() == 0
    assert registry.add("support", folder, rules=Rules(trust_base=True, trust_template=True)).new


def test_trust_is_an_option_of_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tiny_adapters.plain(tmp_path / "adapter")
    (folder / "chat_template.jinja").write_text(BOMB)
    offered = Offered("support", folder, base_digest=tiny_adapters.BASE_DIGEST)
    with pytest.raises(AdapterError, match="multiplies"):
        adapters_command.add(str(tmp_path / "registry"), offered, True)
    adapters_command.add(str(tmp_path / "registry"), replace(offered, trust_template=True), True)
    assert json.loads(capsys.readouterr().out)["new"] is True


def test_a_template_that_is_no_text_is_refused(tmp_path: Path) -> None:
    folder = tiny_adapters.plain(tmp_path / "adapter")
    (folder / "chat_template.jinja").write_bytes(b"\xff\xfe")
    with pytest.raises(AdapterError, match=r"chat_template\.jinja: not UTF-8"):
        Registry(str(tmp_path / "registry")).add("support", folder, rules=Rules(trust_base=True))


def test_nothing_is_rendered_while_a_sound_template_is_judged(monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*_: Any, **__: Any) -> None:
        raise AssertionError("a template was compiled or rendered")

    for name in ("compile", "from_string", "compile_expression", "_generate"):
        monkeypatch.setattr(jinja2.Environment, name, never)
    for name, text in KNOWN.items():
        check_template(text, name)
    assert templates.LONGEST == 2**18
