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
from template_bombs import BOMBS, END, M
from tiny_models import CHATML

from tunesmith.cluster.errors import AdapterError
from tunesmith.serving import adapters_command, templates
from tunesmith.serving.adapters_command import Offered
from tunesmith.serving.checks import Rules
from tunesmith.serving.registry import Registry
from tunesmith.serving.templates import check_template


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
    assert registry.read()[0] == 0
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
