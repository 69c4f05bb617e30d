"""OpenAI's requests as this server takes them, and what an engine is asked for them.

Nothing that was asked for is silently ignored: what we cannot do is refused by name unless its value asks for nothing,
and a key that OpenAI does not know either is refused too. Only what cannot change an answer is passed over.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, ClassVar, Literal, cast

from pydantic import BaseModel, BeforeValidator, ConfigDict, Discriminator, Field, Tag, model_validator
from pydantic_core import PydanticCustomError

from tunesmith.serving.body import UNSUPPORTED
from tunesmith.serving.engines.protocol import Ask, Message, Sampling, Version
from tunesmith.serving.schemas import check_schema

MOST_MESSAGES, MOST_PROMPTS, MOST_CHOICES, MOST_ANSWERS = 2048, 128, 128, 16
"""Messages of a conversation; prompts of a request; prompts x answers; answers to one prompt (`n`)."""

MOST_TOKENS = 2**20
"""Token ids of a prompt, and tokens of an answer: more than any context."""

DEFAULT_COMPLETION_TOKENS = 16
"""OpenAI's own for `/v1/completions`; a chat goes on to the end of the context."""

UNHEARD = frozenset(
    [
        "metadata",
        "store",
        "service_tier",
        "safety_identifier",
        "prompt_cache_key",
        "prompt_cache_options",
        "prompt_cache_retention",
        "prediction",
    ]
)
"""Passed over: bookkeeping, caching and speed, which cannot change an answer."""

_REFUSED_CHAT: dict[str, tuple[Any, ...]] = {
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "parallel_tool_calls": (True, False),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "audio": (),
    "modalities": ([], ["text"]),
    "logit_bias": ({},),
    "reasoning_effort": ("none",),
    "verbosity": ("medium",),
    "web_search_options": (),
    "moderation": (),
}
_REFUSED_COMPLETION: dict[str, tuple[Any, ...]] = {"logit_bias": ({},), "suffix": ("",)}
_REFUSED_MESSAGE: dict[str, tuple[Any, ...]] = {
    "name": ("",),
    "tool_calls": ([],),
    "function_call": (),
    "audio": (),
    "refusal": ("",),
    "annotations": ([],),
}
_REFUSED_STREAM: dict[str, tuple[Any, ...]] = {"include_obfuscation": (True, False)}  # padding, no answer

TokenId = Annotated[int, Field(ge=0, lt=2**31)]
TokenIds = Annotated[list[TokenId], Field(min_length=1, max_length=MOST_TOKENS, fail_fast=True)]
Texts = Annotated[list[str], Field(min_length=1, max_length=MOST_PROMPTS, fail_fast=True)]
TokenIdLists = Annotated[list[TokenIds], Field(min_length=1, max_length=MOST_PROMPTS, fail_fast=True)]


def _kind_of_prompt(written: Any) -> str:
    if isinstance(written, list) and written:
        return {str: "texts", list: "token_lists"}.get(type(written[0]), "tokens")
    return "texts" if isinstance(written, list) else "one"


Prompts = Annotated[
    Annotated[str, Tag("one")]
    | Annotated[Texts, Tag("texts")]
    | Annotated[TokenIds, Tag("tokens")]
    | Annotated[TokenIdLists, Tag("token_lists")],
    Discriminator(_kind_of_prompt),
]


class StrictRequest(BaseModel):
    """Base of what clients send: strict types, as JSON has them."""

    model_config = ConfigDict(
        extra="forbid", strict=True, frozen=True, allow_inf_nan=False, use_attribute_docstrings=True
    )
    refused: ClassVar[Mapping[str, tuple[Any, ...]]] = {}
    unheard: ClassVar[frozenset[str]] = frozenset()

    @model_validator(mode="before")
    @classmethod
    def _only_what_we_do(cls, written: Any) -> Any:
        if not isinstance(written, dict):
            return written
        kept = {}
        for key, value in written.items():
            if key in cls.refused:
                if not (value is None or any(type(value) is type(one) and value == one for one in cls.refused[key])):
                    raise PydanticCustomError(UNSUPPORTED, "this server does not support it", {"key": key})
            elif key not in cls.unheard:
                kept[key] = value
        return kept


class StreamOptions(StrictRequest):
    """Of a streamed answer."""

    refused = _REFUSED_STREAM

    include_usage: bool | None = None
    """Whether a last chunk carries the usage."""


class TextPart(BaseModel):
    """A part of a message; for the documentation alone, since parts are joined before types are checked."""

    model_config = ConfigDict(extra="forbid")

    type: Literal["text"]
    text: str


def _text_of(content: Any) -> Any:
    """Text parts as one text, a line each; anything else is left for the type to refuse."""
    if not isinstance(content, list):
        return content
    texts = []
    for index, part in enumerate(content):
        if not (isinstance(part, dict) and part.keys() == {"type", "text"} and part["type"] == "text"):
            kind = part.get("type") if isinstance(part, dict) else None
            said = f"a content part of type {kind}" if isinstance(kind, str) and len(kind) < 40 else "a content part"
            raise ValueError(f"part {index}: {said} is not supported; only {{type: text, text: …}} is")
        if not isinstance(part["text"], str):
            raise ValueError(f"part {index}: text must be a string")
        texts.append(part["text"])
    return "\n".join(texts)


class ChatMessage(StrictRequest):
    """One message of a conversation."""

    refused = _REFUSED_MESSAGE

    role: Literal["system", "developer", "user", "assistant"]
    """`developer` is OpenAI's newer word for `system`."""
    content: Annotated[str, BeforeValidator(_text_of, json_schema_input_type=str | list[TextPart])]
    """Text, or text parts."""


class JsonSchema(StrictRequest):
    """What an answer must fit."""

    name: str = Field(min_length=1, max_length=64)
    """The client's own name for it."""
    description: str | None = Field(default=None, max_length=2000)
    """Not shown to the model."""
    schema_: dict[str, Any] | None = Field(default=None, alias="schema")
    """None takes any JSON object."""
    strict: bool | None = None
    """The answer always fits, whether asked or not."""


class ResponseFormat(StrictRequest):
    """The shape of an answer."""

    type: Literal["text", "json_object", "json_schema"]
    """`json_object` is any object; `json_schema` one that fits the schema."""
    json_schema: JsonSchema | None = None
    """The schema, for `json_schema`."""

    @model_validator(mode="after")
    def _schema_where_due(self) -> ResponseFormat:
        if (self.type == "json_schema") != (self.json_schema is not None):
            raise ValueError(f"type {self.type} {'takes no' if self.json_schema else 'needs a'} json_schema")
        if self.json_schema is not None and self.json_schema.schema_ is not None:
            check_schema(self.json_schema.schema_)
        return self


def _stops(written: Any) -> Any:
    return [written] if isinstance(written, str) else written


Stop = Annotated[
    list[Annotated[str, Field(min_length=1, max_length=256)]],
    Field(max_length=4),
    BeforeValidator(_stops, json_schema_input_type=str | list[str]),
]


class _Generation(StrictRequest):
    """What both ways of generating share."""

    unheard = UNHEARD

    model: str = Field(min_length=1, max_length=256)
    """A base, an adapter's alias, or an agent."""
    max_tokens: int | None = Field(default=None, ge=0, le=MOST_TOKENS)
    """Most tokens of an answer."""
    temperature: float | None = Field(default=None, ge=0, le=2)
    """0 takes the likeliest token; 1 when not given."""
    top_p: float | None = Field(default=None, gt=0, le=1)
    """Draws from the likeliest tokens that together have this probability; 1 when not given."""
    top_k: int | None = Field(default=None, ge=-1, le=2**31 - 1)
    """Draws from this many; 0 and -1 from all. Not OpenAI's own."""
    n: int | None = Field(default=None, ge=1, le=MOST_ANSWERS)
    """Answers to each prompt."""
    stop: Stop | None = None
    """Texts that end an answer; they are not part of it."""
    seed: int | None = Field(default=None, ge=-(2**63), lt=2**63)
    """The same seed, request and version give the same answer."""
    frequency_penalty: float | None = Field(default=None, ge=-2, le=2)
    """Taken off a token's logit for every time it has come."""
    presence_penalty: float | None = Field(default=None, ge=-2, le=2)
    """Taken off a token's logit once it has come."""
    ignore_eos: bool | None = None
    """Goes on to max_tokens; for measurements. Not OpenAI's own."""
    response_format: ResponseFormat | None = None
    """The shape of the answer."""
    stream: bool | None = None
    """Chunks as they come instead of one answer."""
    stream_options: StreamOptions | None = None
    """Of the stream."""
    user: str | None = Field(default=None, max_length=512)
    """Whom the request is for: an alias that is split between versions gives one user always the same."""

    @model_validator(mode="after")
    def _options_of_a_stream(self) -> _Generation:
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options is for stream: true only")
        return self

    @property
    def answers(self) -> int:
        """Answers to each prompt."""
        return self.n or 1

    @property
    def usage_streamed(self) -> bool:
        """Whether the stream ends with its usage."""
        return bool(self.stream_options and self.stream_options.include_usage)

    def sampling(self, max_tokens: int | None, logprobs: int | None, prompt_logprobs: int | None) -> Sampling:
        """How an engine draws, with OpenAI's defaults for what was not given."""
        return Sampling(
            max_tokens=max_tokens,
            temperature=1.0 if self.temperature is None else self.temperature,
            top_p=1.0 if self.top_p is None else self.top_p,
            top_k=max(0, self.top_k or 0),
            frequency_penalty=self.frequency_penalty or 0.0,
            presence_penalty=self.presence_penalty or 0.0,
            stop=tuple(self.stop or ()),
            seed=self.seed,
            logprobs=logprobs,
            prompt_logprobs=prompt_logprobs,
            schema=_schema_of(self.response_format),
            ignore_eos=bool(self.ignore_eos),
        )


class ChatRequest(_Generation):
    """`/v1/chat/completions`."""

    refused = _REFUSED_CHAT

    messages: list[ChatMessage] = Field(min_length=1, max_length=MOST_MESSAGES, fail_fast=True)
    """The conversation; the version's own chat template renders it."""
    max_completion_tokens: int | None = Field(default=None, ge=1, le=MOST_TOKENS)
    """OpenAI's newer word for max_tokens."""
    logprobs: bool | None = None
    """Whether the tokens come with their log-probabilities."""
    top_logprobs: int | None = Field(default=None, ge=0, le=20)
    """Likeliest tokens shown for each position."""

    @model_validator(mode="after")
    def _consistent(self) -> ChatRequest:
        if self.top_logprobs and not self.logprobs:
            raise ValueError("top_logprobs needs logprobs: true")
        if self.max_tokens == 0:
            raise ValueError("max_tokens: must be 1 or more")
        if None not in (self.max_tokens, self.max_completion_tokens) and self.max_tokens != self.max_completion_tokens:
            raise ValueError(
                f"max_tokens {self.max_tokens} and max_completion_tokens {self.max_completion_tokens} differ"
            )
        return self

    @property
    def conversation(self) -> list[Message]:
        """Messages as engines take them."""
        return conversation_of(self.messages)


class CompletionRequest(_Generation):
    """`/v1/completions`."""

    refused = _REFUSED_COMPLETION

    prompt: Prompts
    """A text, token ids, or a list of either."""
    echo: bool | None = None
    """Whether the answer begins with the prompt."""
    logprobs: int | None = Field(default=None, ge=0, le=20)
    """Likeliest tokens shown for each position, beside the drawn one; with echo those of the prompt too."""
    best_of: int | None = Field(default=None, ge=1, le=MOST_ANSWERS)
    """Only as many as n: all answers are given."""

    @model_validator(mode="after")
    def _consistent(self) -> CompletionRequest:
        if self.best_of is not None and self.best_of != self.answers:
            raise ValueError(f"best_of {self.best_of} with n {self.answers}: only best_of equal to n is supported")
        if self.max_tokens == 0 and not self.echo:
            raise ValueError("max_tokens: 0 is for echo: true only, which scores a prompt")
        if (wanted := len(self.prompts) * self.answers) > MOST_CHOICES:
            raise ValueError(
                f"{len(self.prompts)} prompts x {self.answers} answers are {wanted}; {MOST_CHOICES} at most"
            )
        return self

    @property
    def prompts(self) -> list[str] | list[list[int]]:
        """Every prompt."""
        return listed(self.prompt)

    @property
    def scores_only(self) -> bool:
        """Whether no token is wanted beyond the prompt's own."""
        return self.max_tokens == 0


def conversation_of(messages: Sequence[ChatMessage]) -> list[Message]:
    """Messages as engines take them."""
    return [{"role": "system" if one.role == "developer" else one.role, "content": one.content} for one in messages]


def to_ask(request: ChatRequest, id: str, version: Version | None) -> Ask:
    """What an engine is asked for a chat request."""
    most = request.max_completion_tokens or request.max_tokens
    logprobs = (request.top_logprobs or 0) if request.logprobs else None
    sampling = request.sampling(most, logprobs, None)
    return Ask(id, request.conversation, version, request.answers, sampling, bool(request.stream))


def to_asks(request: CompletionRequest, id: str, version: Version | None) -> list[Ask]:
    """What an engine is asked for a completion request: once for each prompt, as `ID-0`, `ID-1`, …

    Engines always draw a token. For a request that only scores they draw one, which the answer leaves out.
    """
    most = DEFAULT_COMPLETION_TOKENS if request.max_tokens is None else max(1, request.max_tokens)
    # echo takes the prompt's text from its tokens, which come with their log-probabilities
    of_prompt = (request.logprobs or 0) if request.echo else None
    sampling = request.sampling(most, request.logprobs, of_prompt)
    return [
        Ask(f"{id}-{index}", prompt, version, request.answers, sampling, bool(request.stream))
        for index, prompt in enumerate(request.prompts)
    ]


def _schema_of(format: ResponseFormat | None) -> dict[str, Any] | None:
    if format is None or format.type == "text":
        return None
    return (format.json_schema.schema_ or {}) if format.json_schema else {}


def listed(prompt: str | list[str] | list[int] | list[list[int]]) -> list[str] | list[list[int]]:
    if isinstance(prompt, str):
        return [prompt]
    many = [prompt] if isinstance(prompt[0], int) else prompt
    return cast("list[str] | list[list[int]]", many)
