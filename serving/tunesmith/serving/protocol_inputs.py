"""Requests that generate nothing: embeddings and classes, the tokens of a text, and operators' changes of aliases."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from tunesmith.serving.engines.protocol import Message
from tunesmith.serving.protocol import (
    MOST_MESSAGES,
    UNHEARD,
    ChatMessage,
    Prompts,
    StrictRequest,
    conversation_of,
    listed,
)

_REFUSED_EMBEDDING: dict[str, tuple[Any, ...]] = {"dimensions": ()}


class ClassifyRequest(StrictRequest):
    """`/classify`, as vLLM has it."""

    unheard = UNHEARD

    model: str = Field(min_length=1, max_length=256)
    """A base or an adapter's alias."""
    user: str | None = Field(default=None, max_length=256)
    """Whom to keep on one version of a split alias."""
    input: Prompts
    """A text, token ids, or a list of either."""

    @property
    def prompts(self) -> list[str] | list[list[int]]:
        """Every text or list of token ids."""
        return listed(self.input)


class EmbeddingRequest(ClassifyRequest):
    """`/v1/embeddings`."""

    refused = _REFUSED_EMBEDDING

    encoding_format: Literal["float", "base64"] | None = None
    """`base64` is of little-endian 32-bit floats."""


class TokenizeRequest(StrictRequest):
    """`/tokenize`, as vLLM has it."""

    model: str = Field(min_length=1, max_length=256)
    """A base or an adapter's alias."""
    user: str | None = Field(default=None, max_length=256)
    """Whom to keep on one version of a split alias."""
    prompt: str | None = None
    """A text."""
    messages: list[ChatMessage] | None = Field(default=None, min_length=1, max_length=MOST_MESSAGES, fail_fast=True)
    """A conversation, which the version's own chat template renders."""

    @model_validator(mode="after")
    def _one_of_both(self) -> TokenizeRequest:
        if (self.prompt is None) == (self.messages is None):
            raise ValueError("prompt or messages: exactly one of them")
        return self

    @property
    def asked(self) -> str | list[Message]:
        """What engines take."""
        return self.prompt if self.prompt is not None else conversation_of(self.messages or [])


Digits = Annotated[str, Field(min_length=1, max_length=64)]
Generation = Annotated[int, Field(ge=0, lt=2**53)]


class MoveRequest(StrictRequest):
    """Where an alias is to lead."""

    version: Digits
    """Its digest, or the beginning of it."""
    generation: Generation | None = None
    """Of the registry that was looked at: the change is refused when it is another by now."""


class SplitRequest(StrictRequest):
    """Versions that an alias is to be split between."""

    weights: dict[Digits, Annotated[float, Field(gt=0)]] = Field(min_length=1, max_length=64)
    """By version, as its digest or the beginning of it; only their ratio counts."""
    shadow: Digits | None = None
    """A version that is asked too, and whose answers nobody sees."""
    generation: Generation | None = None
    """Of the registry that was looked at: the change is refused when it is another by now."""
