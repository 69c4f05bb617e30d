"""Which characters of a rendered conversation the assistant is trained on.

Where a turn starts is found in one of three ways. The template marks it with `{% generation %}`. Or the text of all
messages is compared with the text of those before the turn plus the generation prompt, which must be its beginning:
that is what the model is given when it answers. Or, for long chats, where that takes one rendering a turn, the contents
are replaced by placeholders in a single rendering, whose pieces must fit the real one exactly.
A turn reaches through its end-of-turn token; white space after that is not trained.
"""

from __future__ import annotations

from tunesmith.trainers.data.formats import Conversation
from tunesmith.trainers.data.templates import Renderer

_FEW = 3
"""Turns up to which one rendering a turn is the cheaper way."""

Span = tuple[int, int]


class Inexact(Exception):
    """Why there is no exact mask."""


def trained_spans(chat: Conversation, renderer: Renderer, end_of_turn: str) -> tuple[str, list[Span]]:
    """The text of a chat, and the character span [start, stop) of every trained turn with its end-of-turn token.

    Raises:
        Inexact: there is no assistant turn, or where one starts or ends has no exact answer.
        jinja2.TemplateError and what else the template's own code may raise.
    """
    messages, first = chat.messages, chat.first_trained
    answers = [index for index, message in enumerate(messages) if message["role"] == "assistant" and index >= first]
    turns = [index for index in answers if index not in chat.untrained]
    if not turns:
        raise Inexact("every assistant turn has weight 0" if answers else "no assistant turn")
    if renderer.marks_generation and first == 0 and turns == answers:
        text, marked = renderer.render_spans(chat)
        return text, [_through_end(text, start, stop, end_of_turn) for start, stop in marked if stop > start]
    text = renderer.render(messages, chat.tools)
    starts = _starts_by_placeholders(chat, turns, text, renderer) if len(turns) > _FEW else None
    starts = starts or [_start_by_prefix(chat, turn, text, renderer) for turn in turns]
    return text, [
        _span_of_turn(chat, turn, text, start, renderer, end_of_turn) for turn, start in zip(turns, starts, strict=True)
    ]


def check_support(chat: Conversation, template: str) -> None:
    """Raises Inexact when the chat says what the template would leave out."""
    if chat.tools and "tools" not in template:
        raise Inexact("the row has `tools`, and the template has no place for them")
    if any("tool_calls" in message for message in chat.messages) and "tool_calls" not in template:
        raise Inexact("a message has `tool_calls`, and the template has no place for them")


def _through_end(text: str, start: int, stop: int, end_of_turn: str) -> Span:
    """A marked span up to and with its end-of-turn token, which is taken in if only white space is between."""
    found = text.find(end_of_turn, start)
    if found < 0 or text[stop:found].strip():
        raise Inexact(f"an assistant turn does not end with {end_of_turn}")
    end = found + len(end_of_turn)
    if text[end:stop].strip():
        raise Inexact(f"the assistant's content holds the end-of-turn token {end_of_turn}")
    return start, end


def _start_by_prefix(chat: Conversation, turn: int, text: str, renderer: Renderer) -> int:
    before = renderer.render(chat.messages[:turn], chat.tools, prompt=True)
    if not text.startswith(before):
        raise Inexact(f"the template writes what precedes messages[{turn}] differently once it is answered")
    return len(before)


def _starts_by_placeholders(chat: Conversation, turns: list[int], text: str, renderer: Renderer) -> list[int] | None:
    """Where each turn starts, or None when the placeholders change what the template writes around them.

    The first turn is located by its prefix; that shows the generation prompt and what the template writes between it
    and the content (`lead`). Every other turn must be preceded by the same.
    """
    messages = list(chat.messages)
    placeholders = [f"<TUNESMITH-TURN-{turn}>" for turn in turns]
    for turn, placeholder in zip(turns, placeholders, strict=True):
        messages[turn] = {**messages[turn], "content": placeholder}
    pieces = _pieces(renderer.render(messages, chat.tools), placeholders)
    asked = renderer.render(messages[: turns[0]], chat.tools)
    prompted = renderer.render(messages[: turns[0]], chat.tools, prompt=True)
    if pieces is None or "<TUNESMITH-TURN-" in text or not prompted.startswith(asked):
        return None
    if not pieces[0].startswith(prompted) or not text.startswith(pieces[0]):
        return None
    lead = pieces[0][len(prompted) :]
    opening = prompted[len(asked) :] + lead
    starts, position = [], 0
    for turn, piece, after in zip(turns, pieces[:-1], pieces[1:], strict=True):
        position += len(piece)
        content = chat.messages[turn]["content"]
        said = next((s for s in (content, content.strip()) if text.startswith(s + after, position)), None)
        if said is None or not piece.endswith(opening):
            return None
        starts.append(position - len(lead))
        position += len(said)
    return starts if position + len(pieces[-1]) == len(text) else None


def _pieces(text: str, separators: list[str]) -> list[str] | None:
    """The text cut at each of the separators, which must come in this order, once each."""
    pieces = []
    for separator in separators:
        piece, found, text = text.partition(separator)
        if not found:
            return None
        pieces.append(piece)
    return [*pieces, text]


def _span_of_turn(chat: Conversation, turn: int, text: str, start: int, renderer: Renderer, end_of_turn: str) -> Span:
    """From a turn's start through the first end-of-turn token, once it is sure that this is the turn's own."""
    content = chat.messages[turn]["content"]
    if end_of_turn in content:
        raise Inexact(f"the assistant's content holds the end-of-turn token {end_of_turn}")
    found = text.find(end_of_turn, start)
    if found < 0:
        raise Inexact(f"messages[{turn}]: the template does not end the turn with {end_of_turn}")
    stop = found + len(end_of_turn)
    if not _is_said(content, text[start:found]):
        through = renderer.render(chat.messages[: turn + 1], chat.tools)
        if not text.startswith(through) or not start < stop <= len(through):
            raise Inexact(f"messages[{turn}]: the template rewrites the assistant's words: they cannot be found")
    return start, stop


def _is_said(content: str, turn: str) -> bool:
    """Whether the turn's text ends with the content, or is its end (templates drop earlier thoughts)."""
    content, turn = content.strip(), turn.strip()
    return bool(turn) and bool(content) and (turn.endswith(content) or content.endswith(turn))
