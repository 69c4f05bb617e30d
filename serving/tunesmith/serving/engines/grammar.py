"""Answers that fit a JSON schema: at every position only tokens that can still lead to one may be drawn."""

from __future__ import annotations

from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from tunesmith.cluster.errors import RequestError

FORM: Any = {"whitespace_flexible": False, "item_separator": ", ?", "key_separator": ": ?"}
"""JSON on one line: a model that may write white space anywhere may write it for ever."""


class Grammar:
    """What one answer may still become. V is the width of the model's logits.

    Args:
        matcher: an `llguidance.LLMatcher`.
    """

    def __init__(self, matcher: Any) -> None:
        self._matcher = matcher

    @property
    def is_complete(self) -> bool:
        """Whether the answer fits as it is and can grow no further."""
        return self._matcher.is_stopped() and not self._matcher.is_error()

    def only_allowed(self, logits_V: Tensor) -> Tensor:
        """The logits, with minus infinity for every token after which no answer would fit any more."""
        bits = torch.frombuffer(bytearray(self._matcher.compute_bitmask()), dtype=torch.uint8)
        allowed_V = (bits[:, None] >> torch.arange(8, dtype=torch.uint8) & 1).flatten()[: len(logits_V)].bool()
        return logits_V.masked_fill(~allowed_V.to(logits_V.device), -torch.inf)

    def take(self, token: int) -> None:
        """Goes on by the token that was drawn.

        Raises:
            RequestError: the schema is more than the matcher can follow.
        """
        if not self._matcher.consume_token(token):
            raise _refused(self._matcher.get_error())

    def copy(self) -> Grammar:
        """For another answer to the same request."""
        return Grammar(self._matcher.deep_copy())


class Grammars:
    """Compiles schemas for the tokenizers of one engine.

    Args:
        vocabulary: width of the model's logits.
    """

    def __init__(self, vocabulary: int) -> None:
        self._vocabulary = vocabulary
        self._tokenizers: WeakKeyDictionary[Any, dict[frozenset[int], Any]] = WeakKeyDictionary()

    def compiled(self, schema: dict[str, Any], tokenizer: Any, stops: frozenset[int]) -> Grammar:
        """The grammar of a schema; `{}` is any JSON object. Takes up to a second, the first of a tokenizer longer.

        Args:
            stops: tokens that end an answer, allowed once it fits.

        Raises:
            RequestError: it says nothing that can be kept to.
        """
        from llguidance import LLMatcher, hf

        by_stops = self._tokenizers.setdefault(tokenizer, {})
        if stops not in by_stops:
            by_stops[stops] = hf.from_tokenizer(tokenizer, n_vocab=self._vocabulary, eos_token=sorted(stops))
        try:
            text = LLMatcher.grammar_from_json_schema(schema or {"type": "object"}, overrides=FORM)
        except ValueError as error:
            raise _refused(str(error)) from error
        matcher = LLMatcher(by_stops[stops], text, log_level=0)
        if matcher.is_error():
            raise _refused(matcher.get_error())
        return Grammar(matcher)


def _refused(reason: str) -> RequestError:
    said = " ".join(reason.split())[:300]
    return RequestError(f"no answer can be kept to this schema: {said}", param="response_format")
