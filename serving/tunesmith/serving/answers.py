"""Engines' pieces as OpenAI's answers: whole, in chunks, embeddings, models, errors.

Three of OpenAI's own shapes do not fit the types of its client, which checks them only when it is told to be strict: in
streamed completions `finish_reason` is null until the end, the log-probability of a prompt's first token is null, and
vectors in base64, which the client asks for unless told otherwise, are no lists of numbers. They stay as OpenAI's server
sends them; any other value would be false.
"""

from __future__ import annotations

import base64
import codecs
import json
import math
import struct
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from tunesmith.cluster.errors import RequestError
from tunesmith.serving.engines.protocol import Encoded, Finish, Piece, TokenLogprob

IMPOSSIBLE = -9999.0
"""OpenAI's log-probability for tokens that cannot be drawn: JSON has no infinity."""

DONE = b"data: [DONE]\n\n"
KEEP_ALIVE = b": keep-alive\n\n"
"""A comment, which clients pass over."""

Json = dict[str, Any]


@dataclass(frozen=True)
class Head:
    """What every answer and chunk of a request carries.

    Attributes:
        id: such as `chatcmpl-…`.
        created: seconds since 1970.
        fingerprint: base digest, adapter version and generation.
    """

    id: str
    model: str
    created: int
    fingerprint: str


@dataclass
class Usage:
    """Tokens of a request."""

    prompt: int = 0
    completion: int = 0

    def as_json(self) -> Json:
        """OpenAI's shape."""
        return {
            "prompt_tokens": self.prompt,
            "completion_tokens": self.completion,
            "total_tokens": self.prompt + self.completion,
        }


@dataclass
class Answer:
    """One answer, put together from its pieces."""

    text: str = ""
    tokens: int = 0
    prompt_tokens: int = 0
    finish: Finish | None = None
    logprobs: list[TokenLogprob] = field(default_factory=list)
    prompt: tuple[TokenLogprob, ...] = ()

    def add(self, piece: Piece) -> None:
        """Takes the next piece."""
        self.text += piece.text
        self.tokens += piece.tokens
        self.prompt_tokens = piece.prompt_tokens
        self.finish = piece.finish or self.finish
        self.logprobs += piece.logprobs
        self.prompt = piece.prompt or self.prompt


def collect(pieces: Iterable[Piece], n: int) -> list[Answer]:
    """The n answers of one ask."""
    answers = [Answer() for _ in range(n)]
    for piece in pieces:
        answers[piece.index].add(piece)
    return answers


def usage_of(asks: Sequence[Sequence[Answer]], scores_only: bool = False) -> Usage:
    """Tokens of all asks; a prompt counts once however many answers it has."""
    prompt = sum(max(answer.prompt_tokens for answer in answers) for answers in asks)
    completion = 0 if scores_only else sum(answer.tokens for answers in asks for answer in answers)
    return Usage(prompt, completion)


def chat_answer(head: Head, answers: Sequence[Answer], logprobs: bool, extra: Mapping[str, Any] | None = None) -> Json:
    """A whole `chat.completion`; `extra` are further keys at its top."""
    choices = [
        {
            "index": index,
            "message": {"role": "assistant", "content": answer.text, "refusal": None},
            "logprobs": _chat_logprobs(answer.logprobs) if logprobs else None,
            "finish_reason": answer.finish or "length",
        }
        for index, answer in enumerate(answers)
    ]
    return _object("chat.completion", head, choices, usage_of([answers])) | dict(extra or {})


class ChatStream:
    """The chunks of a chat: a role first, texts as they come, a finish, and the usage when it was asked for."""

    def __init__(self, head: Head, logprobs: bool, include_usage: bool) -> None:
        self._head, self._logprobs, self._include_usage = head, logprobs, include_usage
        self._begun: set[int] = set()
        self.usage = Usage()

    def chunks(self, piece: Piece, extra: Mapping[str, Any] | None = None) -> list[Json]:
        """What to send for a piece; `extra` are further keys of the chunk with the finish.

        They need no chunk of their own, which would have no choices: many a client reads `choices[0]` of each.
        """
        made = []
        if piece.index not in self._begun:
            self._begun.add(piece.index)
            made.append(self._chunk(piece.index, {"role": "assistant", "content": ""}))
        self.usage.prompt = max(self.usage.prompt, piece.prompt_tokens)
        self.usage.completion += piece.tokens
        if piece.text or piece.logprobs:
            logprobs = _chat_logprobs(piece.logprobs) if self._logprobs else None
            made.append(self._chunk(piece.index, {"content": piece.text}, logprobs))
        if piece.finish is not None:
            made.append(self._chunk(piece.index, {}, finish=piece.finish) | dict(extra or {}))
        return made

    def end(self) -> list[Json]:
        """What to send at the end, before DONE."""
        return [_object("chat.completion.chunk", self._head, [], self.usage)] if self._include_usage else []

    def _chunk(self, index: int, delta: Json, logprobs: Json | None = None, finish: Finish | None = None) -> Json:
        choice = {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": finish}
        return _object("chat.completion.chunk", self._head, [choice], None) | _null_usage(self._include_usage)


def completion_answer(
    head: Head,
    asks: Sequence[Sequence[Answer]],
    *,
    logprobs: bool,
    echo: bool = False,
    scores_only: bool = False,
    prompts: Sequence[str | list[int]] = (),
) -> Json:
    """A whole `text_completion`: the answers of every prompt, prompt after prompt.

    Args:
        asks: for each prompt its answers.
        prompts: those of the request, which `echo` repeats.
        scores_only: the one token that engines always draw is left out.
    """
    choices = []
    for answers, prompt in zip(asks, prompts or [""] * len(asks), strict=True):
        for answer in answers:
            before = _prompt_text(prompt, answer.prompt) if echo else ""
            tokens = [*answer.prompt] if echo else []
            tokens += [] if scores_only else answer.logprobs
            choices.append(
                {
                    "index": len(choices),
                    "text": before + ("" if scores_only else answer.text),
                    "logprobs": _completion_logprobs(tokens, _Offset()) if logprobs else None,
                    "finish_reason": answer.finish or "length",
                }
            )
    return _object("text_completion", head, choices, usage_of(asks, scores_only))


class CompletionStream:
    """The chunks of a completion.

    Args:
        n: answers to each prompt; a choice's index is its prompt's times n, and its own.
        prompts: those of the request, when they are to be repeated.
    """

    def __init__(
        self,
        head: Head,
        n: int,
        logprobs: bool,
        include_usage: bool,
        echo: Sequence[str | list[int]] | None = None,
        scores_only: bool = False,
    ) -> None:
        self._head, self._n, self._logprobs, self._include_usage = head, n, logprobs, include_usage
        self._echo, self._scores_only = echo, scores_only
        self._offsets: dict[int, _Offset] = {}
        self._prompt_tokens: dict[int, int] = {}
        self.usage = Usage()

    def chunks(self, prompt: int, piece: Piece) -> list[Json]:
        """What to send for a piece of the answer to the prompt of this index."""
        choice = prompt * self._n + piece.index
        first = choice not in self._offsets
        echoing = self._echo is not None and first
        text = _prompt_text(self._echo[prompt], piece.prompt) if self._echo is not None and first else ""
        tokens = [*piece.prompt] if echoing else []
        if not self._scores_only:
            text += piece.text
            tokens += piece.logprobs
            self.usage.completion += piece.tokens
        offset = self._offsets.setdefault(choice, _Offset())
        self._prompt_tokens[prompt] = piece.prompt_tokens
        self.usage.prompt = sum(self._prompt_tokens.values())
        if not (text or tokens or piece.finish):
            return []
        made = {
            "index": choice,
            "text": text,
            "logprobs": _completion_logprobs(tokens, offset) if self._logprobs else None,
            "finish_reason": piece.finish,
        }
        return [_object("text_completion", self._head, [made], None) | _null_usage(self._include_usage)]

    def end(self) -> list[Json]:
        """What to send at the end, before DONE."""
        return [_object("text_completion", self._head, [], self.usage)] if self._include_usage else []


def embedding_answer(model: str, vectors: Sequence[Sequence[float]], prompt_tokens: int, encoding: str | None) -> Json:
    """Vectors as numbers, or as base64 of little-endian 32-bit floats."""
    data = [
        {"object": "embedding", "index": index, "embedding": _base64(vector) if encoding == "base64" else list(vector)}
        for index, vector in enumerate(vectors)
    ]
    usage = {"prompt_tokens": prompt_tokens, "total_tokens": prompt_tokens}
    return {"object": "list", "data": data, "model": model, "usage": usage}


def classes_answer(head: Head, made: Encoded) -> Json:
    """The likeliest class of each prompt and all probabilities, as vLLM's `/classify` gives them."""
    data = [
        {
            "index": index,
            "label": made.labels[max(range(len(probabilities)), key=probabilities.__getitem__)],
            "probs": probabilities,
            "num_classes": len(probabilities),
        }
        for index, probabilities in enumerate(made.vectors)
    ]
    usage = {"prompt_tokens": made.tokens, "total_tokens": made.tokens}
    return {"id": head.id, "object": "list", "created": head.created, "model": head.model, "data": data, "usage": usage}


def model_answer(name: str, created: int, owner: str = "tunesmith") -> Json:
    """One entry of `/v1/models`."""
    return {"id": name, "object": "model", "created": created, "owned_by": owner}


def models_answer(models: Sequence[Json]) -> Json:
    """`/v1/models`."""
    return {"object": "list", "data": list(models)}


_TYPES = {401: "authentication_error", 403: "permission_error", 404: "not_found_error", 429: "rate_limit_error"}


def error_answer(error: RequestError) -> Json:
    """OpenAI's error object, the body of an answer or the last event of a stream."""
    kind = _TYPES.get(error.status, "server_error" if error.status >= 500 else "invalid_request_error")
    return {"error": {"message": error.what, "type": kind, "param": error.param, "code": error.code}}


def error_headers(error: RequestError) -> dict[str, str]:
    """Retry-After in whole seconds, rounded up, where waiting helps."""
    headers = {} if error.retry_after is None else {"Retry-After": str(max(1, math.ceil(error.retry_after)))}
    return headers | ({"WWW-Authenticate": "Bearer"} if error.status == 401 else {})


def event(data: Json) -> bytes:
    """A server-sent event."""
    return b"data: " + json.dumps(data, ensure_ascii=False, allow_nan=False).encode() + b"\n\n"


def _object(kind: str, head: Head, choices: list[Json], usage: Usage | None) -> Json:
    made = {
        "id": head.id,
        "object": kind,
        "created": head.created,
        "model": head.model,
        "system_fingerprint": head.fingerprint,
        "choices": choices,
    }
    return made if usage is None else made | {"usage": usage.as_json()}


def _null_usage(include_usage: bool) -> Json:
    return {"usage": None} if include_usage else {}


def _chat_logprobs(tokens: Iterable[TokenLogprob]) -> Json:
    content = [_chat_logprob(one) | {"top_logprobs": [_chat_logprob(other) for other in one.top]} for one in tokens]
    return {"content": content, "refusal": None}


def _chat_logprob(one: TokenLogprob) -> Json:
    return {"token": token_name(one), "logprob": _nats(one.logprob), "bytes": list(one.raw)}


class _Offset:
    """Where in the text the next token begins, in characters; a character may be of several tokens."""

    def __init__(self) -> None:
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._at = 0

    def pass_over(self, one: TokenLogprob) -> int:
        """Where this token begins; the next begins behind it."""
        began = self._at
        self._at += len(self._decoder.decode(one.raw))
        return began


def _completion_logprobs(tokens: Sequence[TokenLogprob], offset: _Offset) -> Json:
    return {
        "tokens": [token_name(one) for one in tokens],
        "token_logprobs": [None if one.logprob is None else _nats(one.logprob) for one in tokens],
        "top_logprobs": [_top(one) for one in tokens],
        "text_offset": [offset.pass_over(one) for one in tokens],
    }


def _top(one: TokenLogprob) -> dict[str, float] | None:
    """The likeliest tokens and always the drawn one; of tokens with one text, the likeliest."""
    if one.logprob is None:
        return None
    top: dict[str, float] = {}
    for other in one.top:
        top[token_name(other)] = max(_nats(other.logprob), top.get(token_name(other), -math.inf))
    top.setdefault(token_name(one), _nats(one.logprob))
    return top


def token_name(one: TokenLogprob) -> str:
    """A token's text, or its bytes in OpenAI's notation when they are a part of a character only."""
    try:
        return one.raw.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in one.raw)


def _nats(logprob: float | None) -> float:
    return IMPOSSIBLE if logprob is None else max(logprob, IMPOSSIBLE)


def _prompt_text(prompt: str | list[int], tokens: Sequence[TokenLogprob]) -> str:
    if isinstance(prompt, str):
        return prompt
    return b"".join(one.raw for one in tokens).decode(errors="replace")


def _base64(vector: Sequence[float]) -> str:
    return base64.b64encode(struct.pack(f"<{len(vector)}f", *vector)).decode()
