"""Chat templates by name, and what a template does with a conversation.

The named ones mark the assistant's words with `{% generation %}`, end every turn with one token of the vocabulary, and
begin with the tokenizer's own first token where it has one, so that they suit any tokenizer. Nothing is ever added to
a vocabulary.
"""

from __future__ import annotations

import json
from datetime import datetime
from typing import TYPE_CHECKING, Any, cast

from tunesmith.cluster.errors import DataError
from tunesmith.trainers.data.formats import Conversation

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

NAMES = ("chatml", "llama3", "alpaca")

_CHATML = """\
{{- @BOS@ }}
{%- for message in messages %}
    {{- '<|im_start|>' + message['role'] + '\\n' }}
    {%- if message['role'] == 'assistant' %}
        {%- generation %}{{- message['content'] + @END@ }}{%- endgeneration %}{{- '\\n' }}
    {%- else %}
        {{- message['content'] + @END@ + '\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"""

_LLAMA3 = """\
{{- @BOS@ }}
{%- for message in messages %}
    {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' }}
    {%- if message['role'] == 'assistant' %}
        {%- generation %}{{- message['content'] | trim + @END@ }}{%- endgeneration %}
    {%- else %}
        {{- message['content'] | trim + @END@ }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{%- endif %}"""

_ALPACA = """\
{{- @BOS@ }}
{%- if messages[0]['role'] != 'system' %}
    {{- 'Below is an instruction that describes a task. ' }}
    {{- 'Write a response that appropriately completes the request.\\n\\n' }}
{%- endif %}
{%- for message in messages %}
    {%- if message['role'] == 'system' %}
        {{- message['content'] | trim + '\\n\\n' }}
    {%- elif message['role'] == 'user' %}
        {{- '### Instruction:\\n' + message['content'] | trim + '\\n\\n' }}
    {%- elif message['role'] == 'assistant' %}
        {{- '### Response:\\n' }}
        {%- generation %}{{- message['content'] | trim + @END@ }}{%- endgeneration %}{{- '\\n\\n' }}
    {%- else %}
        {{- raise_exception('alpaca has no role ' + message['role']) }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '### Response:\\n' }}{%- endif %}"""

_NAMED = {"chatml": (_CHATML, "<|im_end|>"), "llama3": (_LLAMA3, "<|eot_id|>"), "alpaca": (_ALPACA, None)}

_DAY = datetime(2024, 7, 26)
"""What templates that print today's date are told: the day that Llama 3.1's own falls back on. With the real date, the
same data would give other tokens tomorrow."""


def apply(tokenizer: PreTrainedTokenizerBase, name: str) -> str:
    """Gives the tokenizer the named template, or checks that it brought its own; returns the template.

    Raises:
        DataError: `tokenizer` was asked for and it has none, or a named one finds no token to end a turn with.
    """
    if name == "tokenizer":
        if not tokenizer.chat_template:
            what = "data.template: the data are conversations, and the base model's tokenizer has no chat template"
            raise DataError(what, f"Name one: template: {' | '.join(NAMES)}.")
        try:
            return tokenizer.get_chat_template()
        except ValueError as error:
            raise DataError(f"data.template: {error}", f"Name one: template: {' | '.join(NAMES)}.") from error
    text, marker = _NAMED[name]
    end = marker if marker and is_one_token(tokenizer, marker) else tokenizer.eos_token
    if not end:
        what = f"data.template: {name} ends turns with {marker or 'the end-of-text token'}, and the vocabulary has"
        raise DataError(f"{what} neither that nor an end-of-text token", "Use a tokenizer that has an eos_token.")
    tokenizer.chat_template = text.replace("@BOS@", json.dumps(_first_token(tokenizer))).replace(
        "@END@", json.dumps(end, ensure_ascii=False)
    )
    return str(tokenizer.chat_template)


def is_one_token(tokenizer: PreTrainedTokenizerBase, text: str) -> bool:
    """Whether the vocabulary has the text as one token that it is always cut into."""
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    return len(ids) == 1 and ids[0] != tokenizer.unk_token_id


def _first_token(tokenizer: PreTrainedTokenizerBase) -> str:
    """The begin-of-text token, if this tokenizer begins texts with it."""
    ids = tokenizer("a")["input_ids"]
    return str(tokenizer.bos_token) if tokenizer.bos_token and ids and ids[0] == tokenizer.bos_token_id else ""


class Renderer:
    """A template in use: conversations to text, and the text that ends an assistant's turn."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, template: str) -> None:
        self.tokenizer = tokenizer
        self.template = template
        self._names = tokenizer.special_tokens_map
        self.marks_generation = self._marks_generation()

    def render(self, messages: list[dict[str, Any]], tools: list[Any] | None = None, prompt: bool = False) -> str:
        """The text of the messages; `prompt` adds what comes before an answer.

        Raises:
            jinja2.TemplateError and what else the template's own code may raise.
        """
        return self._render(messages, tools, prompt, spans=False)[0]

    def render_spans(self, chat: Conversation) -> tuple[str, list[tuple[int, int]]]:
        """The text, and the character spans inside `{% generation %}`."""
        return self._render(chat.messages, chat.tools, False, spans=True)

    def end_of_turn(self) -> str:
        """The token that ends an assistant's turn, found by rendering a small chat.

        Raises:
            DataError: the template puts no single token there, so a model could not learn where to stop.
        """
        answer = "TUNESMITH-ANSWER"
        chat = [{"role": "user", "content": "TUNESMITH-QUESTION"}, {"role": "assistant", "content": answer}]
        after = self.render(chat).partition(answer)[2].lstrip()
        added = {str(token) for token in self.tokenizer.added_tokens_decoder.values()}
        added |= set(self._names.values())
        found = max((token for token in added if after.startswith(token)), key=len, default=None)
        if not found or not is_one_token(self.tokenizer, found):
            what = f"data.template: after an assistant's turn the tokenizer's template writes {after[:40]!r}"
            raise DataError(
                f"{what}, no token of its own that a model could learn to stop with",
                f"Name a template: {' | '.join(NAMES)}, or train on everything with loss_on: all.",
            )
        return found

    def _render(
        self, messages: list[dict[str, Any]], tools: list[Any] | None, prompt: bool, spans: bool
    ) -> tuple[str, list[tuple[int, int]]]:
        from transformers.utils.chat_template_utils import render_jinja_template

        names: dict[str, Any] = {**self._names, "strftime_now": _DAY.strftime}
        texts, indices = cast(
            tuple[list[str], list[list[tuple[int, int]]]],
            render_jinja_template(
                conversations=[messages],
                tools=tools,
                chat_template=self.template,
                add_generation_prompt=prompt,
                return_assistant_tokens_mask=spans,
                **names,
            ),
        )
        return texts[0], indices[0] if spans else []

    def _marks_generation(self) -> bool:
        """Whether the template has `{% generation %}` and the spans it yields hold the answer and nothing asked.

        In a macro they come out shifted, and then they cannot be used.
        """
        if "endgeneration" not in self.template:
            return False
        question, answer = "TUNESMITH-QUESTION", "TUNESMITH-ANSWER"
        messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
        text, spans = self.render_spans(Conversation(messages))
        inside = "\n".join(text[start:stop] for start, stop in spans)
        return answer in inside and question not in inside
