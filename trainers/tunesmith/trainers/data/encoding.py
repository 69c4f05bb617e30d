"""Examples to tokens, and which of them are trained.

Which characters are trained is found by `turns`; they become tokens by the tokenizer's offsets. Where this has no exact
answer there is a reason instead of a guess.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from tunesmith.cluster.errors import DataError
from tunesmith.trainers.data.formats import Completion, Conversation, Example, Text
from tunesmith.trainers.data.templates import NAMES, Renderer, apply
from tunesmith.trainers.data.turns import Inexact, check_support, trained_spans

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
                except Inexact as reason:
                    return str(reason)

    def _write_chat(self, chat: Conversation) -> _Written:
        assert self.renderer is not None, "conversations need a template"
        check_support(chat, self.renderer.template)
        try:
            if not self.only_assistant:
                if chat.untrained:
                    raise Inexact("a message has weight 0, and loss_on: all trains every token")
                return _Written(self.renderer.render(chat.messages, chat.tools), None, special=False, end=False)
            assert self.end_of_turn is not None, "found when the template was"
            text, spans = trained_spans(chat, self.renderer, self.end_of_turn)
        except _template_errors() as error:
            raise Inexact(f"the template refuses it: {error}") from error
        return _Written(text, spans, special=False, end=False)

    def _mask(self, written: _Written, encoding: Encoding) -> Encoded | str:
        tokens = np.asarray(encoding.ids, dtype=np.int32)
        trained = np.full(len(tokens), written.spans is None)
        for start, stop in written.spans or []:
            try:
                first, last = _token_range(encoding, written.text, start, stop)
            except Inexact as reason:
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


def _token_range(encoding: Encoding, text: str, start: int, stop: int) -> tuple[int, int]:
    """First and last token of the characters [start, stop), which must begin and end with them.

    A character may be several tokens (its bytes), of which the tokenizer finds the first.
    """
    first, last = _token_at(encoding, range(start, stop)), _token_at(encoding, range(stop - 1, start - 1, -1))
    if first is None or last is None:
        raise Inexact("the tokenizer makes no token of the assistant's words")
    while first and _is_within(encoding, first - 1, start, stop):
        first -= 1
    while last + 1 < len(encoding) and _is_within(encoding, last + 1, start, stop):
        last += 1
    begin, end = _begin(encoding, text, first, start), _characters(encoding, last)[1]
    if begin < start:
        raise Inexact(
            f"the answer begins inside a token ({text[begin:start][-10:]!r} and {text[start : start + 10]!r} are one): "
            "mind white space at the end of the prompt or the start of the answer"
        )
    if text[stop:end].strip():
        raise Inexact(f"the answer ends inside a token, before {text[stop:end]!r}")
    return first, last


def _characters(encoding: Encoding, token: int) -> tuple[int, int]:
    characters = encoding.token_to_chars(token)
    assert characters is not None, f"token {token} was found by its characters"
    return characters


def _is_within(encoding: Encoding, token: int, start: int, stop: int) -> bool:
    """Whether the token begins in [start, stop). White space that the offsets leave out is at the end of what it was."""
    characters = encoding.token_to_chars(token)
    if characters is None:  # the tokenizer's own first or last token
        return False
    begin, end = characters
    return start <= begin < stop if begin < end else start < end <= stop or start == end == 0


def _begin(encoding: Encoding, text: str, first: int, start: int) -> int:
    """Where the first token begins, also when its offsets do not say that it reaches into what precedes the answer."""
    if (
        start
        and encoding.char_to_token(start) is None
        and len(unicodedata.normalize("NFC", text[start - 1 : start + 1])) < 2
    ):
        return start - 1  # the tokenizer composed the two characters
    begin = _characters(encoding, first)[0]
    spaced = start and text[start - 1].isspace() and not text[start].isspace()
    if spaced and begin == start and encoding.tokens[first].startswith("Ġ"):
        return start - 1  # trimmed offsets: the space before is the token's
    return begin


def _token_at(encoding: Encoding, positions: range) -> int | None:
    """The token of the first of these characters that has one: some tokenizers leave white space out of offsets."""
    for position in positions:
        token = encoding.char_to_token(position)
        if token is not None:
            return token
    return None


def _template_errors() -> tuple[type[Exception], ...]:
    """What a template's own code raises on messages it was not made for."""
    import jinja2

    return jinja2.TemplateError, TypeError, ValueError, KeyError, AttributeError
