"""Chat templates that would take all of a machine's memory or time, each with the refusal that it is to get."""

from __future__ import annotations

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
