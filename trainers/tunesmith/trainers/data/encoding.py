"""Examples to tokens, and which of them are trained.

Which characters of a conversation are the assistant's is found in one of two ways: the template marks them with
`{% generation %}`, or the text of all messages is compared with the text of those before the turn plus the generation
prompt, which must be its beginning. A turn reaches through its end-of-turn token; white space after that is not
trained. Characters become tokens by the tokenizer's offsets. Where this has no exact answer there is a reason instead.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from tunesmith.cluster.errors import DataError
from tunesmith.trainers.data.formats import Completion, Conversation, Example, Text
from tunesmith.trainers.data.templates import NAMES, Renderer, apply

if TYPE_CHECKING:
    from tokenizers import Encoding
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Encoded:
    """Tokens of one example and which of them are trained.

    Attributes:
        tokens: int32 [T].
        trained: bool [T].
    """

    tokens: np.ndarray
    trained: np.ndarray


class _Written(NamedTuple):
    """An example as text: what to tokenise, and the character spans to train (None: all of it)."""

    text: str
    spans: list[tuple[int, int]] | None
    special: bool
    """Whether the tokenizer adds its own first token; templates write theirs."""
    end: bool
    """Whether the end-of-text token is appended."""


class _Inexact(Exception):
    """Why there is no exact mask; never leaves this module."""


class Encoder:
    """Encodes examples with one tokenizer.

    Args:
        tokenizer: a fast one.
        loss_on: `assistant` trains the assistant's turns and completions, `all` every token.

    Raises:
        DataError: the tokenizer is not a fast one.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, loss_on: str) -> None:
        if not tokenizer.is_fast:
            what = f"the tokenizer {type(tokenizer).__name__} has no fast version: its tokens have no known place"
            raise DataError(what, "Convert it to a tokenizer.json and put that into the model's folder.")
        self.tokenizer = tokenizer
        self.only_assistant = loss_on == "assistant"
        self.renderer: Renderer | None = None
        self.end_of_turn: str | None = None
        self.end_of_turn_id: int | None = None

    def use_template(self, name: str) -> None:
        """Gives the tokenizer the template that conversations need.

        Raises:
            DataError: the tokenizer or its template cannot serve (see `templates.apply`, `Renderer.end_of_turn`).
        """
        template = apply(self.tokenizer, name)
        try:
            self.renderer = Renderer(self.tokenizer, template)
            if self.only_assistant:
                self.end_of_turn = self.renderer.end_of_turn()
                self.end_of_turn_id = self._ids(self.end_of_turn)[0]
        except _template_errors() as error:
            what = f"data.template: the tokenizer's template fails on a question and an answer: {error}"
            raise DataError(what, f"Name a template: {' | '.join(NAMES)}.") from error

    def encode(self, examples: Sequence[Example]) -> list[Encoded | str]:
        """Each example's tokens and mask, or the reason why it has none. In batches: one call of the tokenizer."""
        written = [self._write(example) for example in examples]
        encodings: list[Encoding | None] = [None] * len(written)
        for special in (False, True):
            chosen = [i for i, item in enumerate(written) if isinstance(item, _Written) and item.special == special]
            if chosen:
                texts = [item.text for i in chosen if isinstance(item := written[i], _Written)]
                for i, encoding in zip(chosen, self._tokenise(texts, special), strict=True):
                    encodings[i] = encoding
        return [
            self._mask(item, encoding) if isinstance(item, _Written) and encoding is not None else str(item)
            for item, encoding in zip(written, encodings, strict=True)
        ]

    def _tokenise(self, texts: list[str], special: bool) -> list[Encoding]:
        batch = self.tokenizer(
            texts,
            add_special_tokens=special,
            return_attention_mask=False,
            return_token_type_ids=False,
            verbose=False,
        )
        assert batch.encodings is not None, "a fast tokenizer has encodings"
        return batch.encodings

    def _ids(self, text: str) -> list[int]:
        return self._tokenise([text], special=False)[0].ids

    def _write(self, example: Example) -> _Written | str:
        match example:
            case Text(text):
                return _Written(text, None, special=True, end=True)
            case Completion(prompt, completion):
                text = prompt + completion
                spans = [(len(prompt), len(text))] if self.only_assistant else None
                return _Written(text, spans, special=True, end=True)
            case Conversation():
                try:
                    return self._write_chat(example)
                except _Inexact as reason:
                    return str(reason)

    def _write_chat(self, chat: Conversation) -> _Written:
        assert self.renderer is not None, "conversations need a template"
        _check_support(chat, self.renderer.template)
        spans = None
        try:
            if not self.only_assistant:
                return _Written(self.renderer.render(chat.messages, chat.tools), None, special=False, end=False)
            text, spans = self._spans(chat, self.renderer)
        except _template_errors() as error:
            raise _Inexact(f"the template refuses it: {error}") from error
        return _Written(text, spans, special=False, end=False)

    def _spans(self, chat: Conversation, renderer: Renderer) -> tuple[str, list[tuple[int, int]]]:
        """The text and the character span of every trained turn, end-of-turn token included."""
        turns = [
            i for i, message in enumerate(chat.messages) if message["role"] == "assistant" and i >= chat.first_trained
        ]
        if not turns:
            raise _Inexact("no assistant turn")
        if renderer.marks_generation and chat.first_trained == 0:
            text, marked = renderer.render_spans(chat)
            return text, [(start, self._end(text, start, stop)) for start, stop in marked if stop > start]
        text = renderer.render(chat.messages, chat.tools)
        return text, [self._span_by_prefix(chat, turn, text, renderer) for turn in turns]

    def _end(self, text: str, start: int, stop: int) -> int:
        """Where a marked span ends: after its end-of-turn token, taken in if only white space is between."""
        assert self.end_of_turn is not None, "found when the template was"
        found = text.find(self.end_of_turn, start)
        if found < 0 or text[stop:found].strip():
            raise _Inexact(f"an assistant turn does not end with {self.end_of_turn}")
        if text[found + len(self.end_of_turn) : stop].strip():
            raise _Inexact(f"the assistant's content holds the end-of-turn token {self.end_of_turn}")
        return found + len(self.end_of_turn)

    def _span_by_prefix(self, chat: Conversation, turn: int, text: str, renderer: Renderer) -> tuple[int, int]:
        """Span of one turn, by the prefix method."""
        assert self.end_of_turn is not None, "found when the template was"
        message = chat.messages[turn]
        if self.end_of_turn in message["content"]:
            raise _Inexact(f"the assistant's content holds the end-of-turn token {self.end_of_turn}")
        before = renderer.render(chat.messages[:turn], chat.tools, prompt=True)
        if not text.startswith(before):
            raise _Inexact(f"the template writes what precedes messages[{turn}] differently once it is answered")
        start = len(before)
        found = text.find(self.end_of_turn, start)
        if found < 0:
            raise _Inexact(f"messages[{turn}]: the template does not end the turn with {self.end_of_turn}")
        stop = found + len(self.end_of_turn)
        if not _is_said(message["content"], text[start:found]):
            through = renderer.render(chat.messages[: turn + 1], chat.tools)
            if not text.startswith(through) or text[stop : len(through)].strip():
                raise _Inexact(
                    f"messages[{turn}]: the template rewrites the assistant's words, so they cannot be found"
                )
        return start, stop

    def _mask(self, written: _Written, encoding: Encoding) -> Encoded | str:
        tokens = np.asarray(encoding.ids, dtype=np.int32)
        trained = np.full(len(tokens), written.spans is None)
        for start, stop in written.spans or []:
            try:
                first, last = _token_range(encoding, written.text, start, stop)
            except _Inexact as reason:
                return str(reason)
            trained[first : last + 1] = True
        return self._ended(tokens, trained) if written.end else Encoded(tokens, trained)

    def _ended(self, tokens: np.ndarray, trained: np.ndarray) -> Encoded:
        """With the end-of-text token, which is always trained."""
        end = self.tokenizer.eos_token_id
        if not isinstance(end, int):
            raise DataError("the tokenizer has no end-of-text token (eos_token) to end plain text with")
        if not len(tokens) or tokens[-1] != end:
            tokens, trained = np.append(tokens, np.int32(end)), np.append(trained, True)
        trained[-1] = True
        return Encoded(tokens, trained)


def encode(example: Example, tokenizer: PreTrainedTokenizerBase, loss_on: str, template: str | None) -> Encoded | str:
    """One example alone; see `Encoder` for many."""
    encoder = Encoder(tokenizer, loss_on)
    if template:
        encoder.use_template(template)
    return encoder.encode([example])[0]


def _is_said(content: str, turn: str) -> bool:
    """Whether the turn's text ends with the content, or is its end (templates drop earlier thoughts)."""
    content, turn = content.strip(), turn.strip()
    return bool(turn) and bool(content) and (turn.endswith(content) or content.endswith(turn))


def _token_range(encoding: Encoding, text: str, start: int, stop: int) -> tuple[int, int]:
    """First and last token of the characters [start, stop), which must begin and end with them."""
    first, last = _token_at(encoding, range(start, stop)), _token_at(encoding, range(stop - 1, start - 1, -1))
    if first is None or last is None:
        raise _Inexact("the tokenizer makes no token of the assistant's words")
    begin, end = _characters(encoding, first)[0], _characters(encoding, last)[1]
    if begin < start:
        raise _Inexact(
            f"the answer begins inside a token ({text[begin:start][-10:]!r} and {text[start : start + 10]!r} are one): "
            "mind white space at the end of the prompt or the start of the answer"
        )
    if text[stop:end].strip():
        raise _Inexact(f"the answer ends inside a token, before {text[stop:end]!r}")
    return first, last


def _characters(encoding: Encoding, token: int) -> tuple[int, int]:
    characters = encoding.token_to_chars(token)
    assert characters is not None, f"token {token} was found by its characters"
    return characters


def _token_at(encoding: Encoding, positions: range) -> int | None:
    """The token of the first of these characters that has one: some tokenizers leave white space out of offsets."""
    for position in positions:
        token = encoding.char_to_token(position)
        if token is not None:
            return token
    return None


def _check_support(chat: Conversation, template: str) -> None:
    if chat.tools and "tools" not in template:
        raise _Inexact("the row has `tools`, and the template has no place for them")
    if any("tool_calls" in message for message in chat.messages) and "tool_calls" not in template:
        raise _Inexact("a message has `tool_calls`, and the template has no place for them")


def _template_errors() -> tuple[type[Exception], ...]:
    """What a template's own code raises on messages it was not made for."""
    import jinja2

    return jinja2.TemplateError, TypeError, ValueError, KeyError, AttributeError
