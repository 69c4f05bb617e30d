"""What `tunesmith serve FILE` reads: bases and their engines, adapters, agents, limits. As strict as the recipe."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt, model_validator

from tunesmith.cluster.errors import ServeConfigError
from tunesmith.cluster.recipe.lines import read_yaml
from tunesmith.cluster.recipe.mistakes import checked
from tunesmith.cluster.recipe.section import Section

NAME = r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$"
"""Of bases, adapters, aliases and agents: nothing that a path or a header could take for something else."""

Name = Annotated[str, Field(pattern=NAME)]


class Autoscaling(Section):
    """Replicas by load."""

    min_replicas: PositiveInt = 1
    """Replicas that are always there."""
    max_replicas: PositiveInt = 1
    """Most there may be."""
    target_ongoing_requests: PositiveFloat = 8.0
    """Requests at work in a replica on average, above which one more is started."""

    @model_validator(mode="after")
    def _in_order(self) -> Autoscaling:
        if self.min_replicas > self.max_replicas:
            raise ValueError(f"min_replicas {self.min_replicas} is more than max_replicas {self.max_replicas}")
        return self


class Base(Section):
    """One base model and the engine that runs it."""

    path: str
    """A folder, a hub id, or run:NAME for a fully trained artifact."""
    engine: Literal["auto", "vllm", "transformers", "encoder"] = "auto"
    """`vllm` is the fast one; `transformers` takes every adapter; `encoder` gives embeddings or classes. `auto` goes by the model."""
    dtype: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """Number format of the weights. `auto` is bf16 on GPUs and fp32 on CPUs."""
    quantization: Literal["nf4", "int8"] | None = None
    """Of the base, as it was in training. The transformers engine only."""
    max_length: PositiveInt | None = None
    """Most tokens of a prompt and its answer together. None takes the model's context."""
    max_batch: PositiveInt = 8
    """Sequences that a replica works on at once."""
    max_queue: NonNegativeInt | None = None
    """Requests that may wait for a replica; beyond it the answer is 503 with Retry-After. None is `max_batch`."""
    max_adapters: PositiveInt = 8
    """Adapters that share one batch of the vllm engine; that many are held beside the base."""
    max_cached_adapters: PositiveInt = 64
    """Adapters held in host memory, the least recently used leaving first."""
    disk_cache_gib: PositiveFloat = 20.0
    """Copies of adapters on a machine's disk (`~/.cache/tunesmith/adapters`), in GiB, which all its services share; the least recently used leaves first, none while it is in use."""
    max_rank: PositiveInt = 64
    """Largest LoRA rank that the vllm engine serves; it reserves memory for it."""
    replicas: PositiveInt = 1
    """Copies of the engine, when autoscaling is not given."""
    autoscaling: Autoscaling | None = None
    """Replicas by load instead of a fixed number."""
    cpus: PositiveFloat = 1.0
    """CPUs that a replica reserves."""
    gpus: NonNegativeFloat = 0.0
    """GPUs that a replica reserves."""
    memory_gib: PositiveFloat = 1.0
    """The vllm engine's memory for keys and values on a CPU, in GiB; on a GPU it takes what is free."""

    @model_validator(mode="after")
    def _what_vllm_does(self) -> Base:
        if self.engine == "vllm" and self.quantization is not None:
            raise ValueError(f"quantization {self.quantization}: vllm serves whole weights; take engine: transformers")
        return self

    @property
    def queue_length(self) -> int:
        """Requests that may wait for a replica. With `max_batch` one waits for about as long as one is worked on."""
        return self.max_batch if self.max_queue is None else self.max_queue


class Endpoint(Section):
    """An OpenAI-compatible server outside, which a mixture may ask."""

    url: str = Field(pattern=r"^https?://")
    """Its base URL, up to and with /v1."""
    api_key_env: str | None = None
    """Environment variable of the gateway with its key; the key itself never stands in a file."""


class Sampling(Section):
    """How tokens are drawn; what is not given is the request's, or the engine's."""

    temperature: NonNegativeFloat | None = None
    """0 takes the likeliest token."""
    top_p: float | None = Field(default=None, gt=0, le=1)
    """Draws from the likeliest tokens that together have this probability."""
    max_tokens: PositiveInt | None = None
    """Most tokens of the answer."""


class Proposer(Section):
    """One member of a mixture."""

    model: str
    """An adapter's alias, a base, or a model of an endpoint."""
    endpoint: Name | None = None
    """Name of an endpoint above; None asks this server."""
    role: str | None = None
    """What the answer is called before the aggregator; None is `model`."""
    system: str | None = None
    """System prompt put before the conversation."""
    sampling: Sampling = Sampling()
    """How it draws tokens."""
    samples: PositiveInt = 1
    """Answers that it gives: with one proposer and several samples this is Self-MoA."""


class Agent(Section):
    """A mixture of agents, asked for by its name as a model."""

    layers: list[Annotated[list[Proposer], Field(min_length=1)]] = Field(min_length=1)
    """Proposers by layer; those of a later layer see the answers of the one before."""
    aggregator: Proposer | None = None
    """Writes the answer from the last layer's proposals; None answers with the best proposal itself."""
    deadline_s: PositiveFloat = 30.0
    """Seconds a proposer has."""
    grace_s: NonNegativeFloat = 2.0
    """Seconds that the others still get once a quorum has answered."""
    quorum: PositiveInt | None = None
    """Proposals of a layer that are enough; None waits for all until the deadline."""

    @property
    def members(self) -> list[Proposer]:
        """All proposers and the aggregator."""
        return [*(one for layer in self.layers for one in layer), *([self.aggregator] if self.aggregator else [])]


class Limits(Section):
    """What one key may use; None is without a limit."""

    requests_per_minute: PositiveInt | None = None
    """Requests that may begin in a minute."""
    tokens_per_minute: PositiveInt | None = None
    """Tokens of prompts and answers in a minute."""
    concurrency: PositiveInt | None = 64
    """Requests at work at once."""


class Http(Section):
    """Where the gateway listens."""

    host: str = "127.0.0.1"
    """Address; only this machine reaches the default."""
    port: int = Field(default=8000, ge=1, le=65535)
    """Port."""
    gateways: PositiveInt = 1
    """Processes that take requests."""
    max_body_mib: PositiveFloat = 4.0
    """Larger requests are refused unread."""
    auth: Literal["keys", "none"] = "keys"
    """`keys` refuses every request without a key; `none` is for this machine alone and for tests."""
    log_prompts: bool = False
    """Whether prompts are written to the gateway's log."""


class Serve(Section):
    """One serving configuration."""

    bases: dict[Name, Base] = Field(min_length=1)
    """Models by the name that clients ask for."""
    registry: str = "registry"
    """Folder or object-store URI of the adapters, aliases and keys."""
    agents: dict[Name, Agent] = Field(default_factory=dict)
    """Mixtures of agents by the name that clients ask for."""
    endpoints: dict[Name, Endpoint] = Field(default_factory=dict)
    """Servers outside that agents may ask: the allow-list."""
    limits: Limits = Limits()
    """Of a key that has none of its own."""
    http: Http = Http()
    """Where the gateway listens."""

    @model_validator(mode="after")
    def _names_once(self) -> Serve:
        twice = sorted(self.bases.keys() & self.agents.keys())
        if twice:
            raise ValueError(f"agents: {', '.join(twice)}: a base has this name too")
        if self.http.auth == "none" and self.http.host not in ("127.0.0.1", "localhost", "::1"):
            raise ValueError(f"http: auth none on {self.http.host} would let everyone in; take keys")
        for name, agent in self.agents.items():
            for one in agent.members:
                if one.endpoint is not None and one.endpoint not in self.endpoints:
                    known = ", ".join(self.endpoints) or "none"
                    raise ValueError(f"agents.{name}: it asks {one.endpoint}; the endpoints are: {known}")
                if one.endpoint is None and one.model in self.agents:
                    raise ValueError(f"agents.{name}: it asks the mixture {one.model}; mixtures do not nest")
        return self


def load_config(path: str | Path) -> Serve:
    """Reads and checks a serving configuration.

    Raises:
        ServeConfigError: naming the file, line, key and nearest valid key of every mistake.
    """
    path = Path(path)
    tree, lines = read_yaml(path, ServeConfigError, "serving configuration", "bases")
    origins = {key: f"{path}:{line}" for key, line in lines.items()}
    return checked(Serve, tree, origins, path, ServeConfigError)
