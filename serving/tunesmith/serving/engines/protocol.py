"""What the gateway asks of an engine and what comes back. Plain values that cross processes; no torch, no Ray."""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, Protocol

if TYPE_CHECKING:
    from tunesmith.serving.engines.diary import News

Finish = Literal["stop", "length"]
Message = dict[str, Any]
"""`role` and `content`, as in OpenAI's API, with text only."""


@dataclass(frozen=True)
class Version:
    """One immutable adapter version as an engine needs it.

    Attributes:
        digest: hex sha256 of its content; its name everywhere.
        folder: a local, checked copy.
    """

    digest: str
    folder: str


@dataclass(frozen=True)
class Sampling:
    """How tokens are drawn.

    Attributes:
        temperature: 0 takes the likeliest token.
        top_k: 0 draws from all.
        stop: the answer ends before any of these.
        seed: of this request's own stream of random numbers; None draws one.
        logprobs: likeliest tokens reported for each position, beside the drawn one; None reports none.
        prompt_logprobs: likewise for the prompt's tokens.
        schema: a JSON schema that the answer must fit; `{}` is any JSON object.
    """

    max_tokens: int | None = None
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    stop: tuple[str, ...] = ()
    seed: int | None = None
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    schema: dict[str, Any] | None = None
    ignore_eos: bool = False


@dataclass(frozen=True)
class Ask:
    """One request of one prompt.

    Attributes:
        id: of the request; `cancel` takes it.
        prompt: a conversation, which the version's own chat template renders, or a text, or token ids.
        version: the adapter; None asks the base alone.
        n: answers wanted.
        stream: whether pieces are wanted as they come; else one for each answer will do.
    """

    id: str
    prompt: list[Message] | str | list[int]
    version: Version | None = None
    n: int = 1
    sampling: Sampling = field(default_factory=Sampling)
    stream: bool = True


@dataclass(frozen=True)
class TokenLogprob:
    """A token and how likely it was, in nats.

    Attributes:
        text: as it stands alone.
        logprob: None for a prompt's first token, which nothing foretells.
        raw: its bytes, which may be a part of a character only.
        top: the likeliest tokens of the position.
    """

    id: int
    text: str
    logprob: float | None
    raw: bytes
    top: tuple[TokenLogprob, ...] = ()


@dataclass(frozen=True)
class Piece:
    """What has come since the last piece of the same answer.

    Attributes:
        index: which of the n answers.
        text: new text; may be empty while a character is incomplete.
        tokens: how many tokens it stands for.
        finish: why the answer has ended; None while it goes on.
        prompt_tokens: of the prompt, in every piece.
        prompt: the prompt's tokens with their log-probabilities, in the first piece of an answer when asked for.
        logprobs: of the new tokens, when asked for.
    """

    index: int
    text: str
    tokens: int
    prompt_tokens: int
    finish: Finish | None = None
    logprobs: tuple[TokenLogprob, ...] = ()
    prompt: tuple[TokenLogprob, ...] = ()


@dataclass(frozen=True)
class Encoded:
    """What an encoder makes of some prompts.

    Attributes:
        vectors: one for each prompt: an embedding, or the classes' probabilities.
        tokens: of all prompts.
        labels: the classes' names; empty for embeddings.
    """

    vectors: list[list[float]]
    tokens: int
    labels: tuple[str, ...] = ()


class Engine(Protocol):
    """A base model with adapters over it."""

    def generate(self, ask: Ask) -> AsyncIterator[Piece]:
        """Answers piece by piece. Closing the iterator gives the request's slot back at once.

        Raises:
            RequestError: the prompt does not fit, or the engine cannot do what was asked.
        """
        ...

    async def tokenize(self, ask: Ask) -> list[int]:
        """The tokens that a prompt becomes.

        Raises:
            RequestError: as `generate`.
        """
        ...

    async def encode(self, texts: list[str] | list[list[int]], version: Version | None) -> Encoded:
        """A vector for each text, or list of token ids.

        Raises:
            RequestError: a prompt does not fit, or this base writes text.
        """
        ...

    async def load(self, version: Version) -> None:
        """Makes a version ready, so that its first request does not wait; others go on meanwhile.

        Raises:
            AdapterError: the engine cannot serve it.
        """
        ...

    async def news(self) -> News | None:
        """What it has loaded, let go and answered since it was last asked; None when there is nothing."""
        ...
