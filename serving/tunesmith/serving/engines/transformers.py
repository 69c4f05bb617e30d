"""The engine for whatever PEFT can load, and for machines without vLLM: Transformers' own `generate`, in batches.

Every adapter has a module tree of its own over the one base in memory (see `weights`), so loading one disturbs no other
and no adapter is ever switched under a request. A batch is made of waiting requests for one version; it takes no further
ones until it ends. Two batches run at once, so that a long one does not keep all others waiting.
"""

from __future__ import annotations

import asyncio
from collections import OrderedDict, deque
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import LogitsProcessor, LogitsProcessorList, StoppingCriteria, StoppingCriteriaList

from tunesmith.cluster.base import BaseRef
from tunesmith.cluster.errors import RequestError
from tunesmith.serving.config import Base
from tunesmith.serving.engines import prompts, weights
from tunesmith.serving.engines.diary import Diary, News
from tunesmith.serving.engines.grammar import Grammar, Grammars
from tunesmith.serving.engines.protocol import Ask, Encoded, Finish, Piece, TokenLogprob, Version
from tunesmith.serving.engines.sampling import Drawer
from tunesmith.serving.engines.text import TextStream, spelled

BATCHES_AT_ONCE = 2


@dataclass
class Row:
    """One answer that is being written.

    Attributes:
        room: tokens it may still have.
        grammar: what it has to fit, if anything.
        emit: takes its pieces; safe to call from a batch's thread.
    """

    ask: Ask
    index: int
    tokens: list[int]
    room: int
    stops: frozenset[int]
    drawer: Drawer
    text: TextStream
    tokenizer: Any
    emit: Callable[[Piece | BaseException], None]
    grammar: Grammar | None = None
    finish: Finish | None = None
    is_cancelled: bool = False
    first: tuple[TokenLogprob, ...] = ()
    drawn: list[int] = field(default_factory=list)

    @property
    def is_over(self) -> bool:
        return self.finish is not None or self.is_cancelled

    def take(self, logits_V: Tensor) -> int:
        """Draws the next token from fp32 logits and emits what it adds. What fails ends this row, and not its neighbours."""
        try:
            return self._take(logits_V)
        except Exception as error:  # noqa: BLE001 - its client is told
            self.fail(error)
            return 0

    def fail(self, error: Exception) -> None:
        """Ends the row with an error."""
        self.is_cancelled = True
        self.emit(error)

    def _take(self, logits_V: Tensor) -> int:
        token = self.drawer.draw(logits_V if self.grammar is None else self.grammar.only_allowed(logits_V))
        self.drawn.append(token)
        if self.grammar is not None:
            self.grammar.take(token)
        wanted = self.ask.sampling.logprobs
        logprobs = () if wanted is None else (logprob_of(token, logits_V.log_softmax(-1), wanted, self.tokenizer),)
        self.room -= 1
        is_end = token in self.stops and not self.ask.sampling.ignore_eos
        text = "" if is_end else self.text.add(token)
        if is_end or self.text.is_stopped or (self.grammar is not None and self.grammar.is_complete):
            self.finish = "stop"
        elif self.room <= 0:
            self.finish = "length"
        if self.finish:
            text += self.text.rest()
        prompt, self.first = self.first, ()
        self.emit(Piece(self.index, text, 1, len(self.tokens), self.finish, logprobs, prompt))
        return token

    def end_without_answer(self) -> None:
        """Emits the one piece of an answer of no tokens."""
        self.finish = "length"
        self.emit(Piece(self.index, "", 0, len(self.tokens), "length", (), self.first))


@dataclass
class Loaded:
    """A version in memory.

    Attributes:
        model: what generates: the model with its adapter's layers in it, or PEFT's wrapper where virtual tokens stand
            before the prompt.
        users: rows that wait or run with it.
        is_busy: whether no further batch may start with it.
    """

    model: nn.Module
    users: int = 0
    is_busy: bool = False

    @property
    def is_prompted(self) -> bool:
        """Whether PEFT puts virtual tokens before the prompt.

        It then gives padded rows wrong positions, and two threads in its `generate` take each other's hooks away: its
        batches have prompts of one length, and run one at a time.
        """
        return hasattr(self.model, "peft_config") and any(c.is_prompt_learning for c in self.model.peft_config.values())  # type: ignore[union-attr,operator]


@dataclass
class TransformersEngine:
    """See the module; `await start()` loads the base.

    Attributes:
        name: of the base, in messages.
    """

    name: str
    ref: BaseRef
    settings: Base
    diary: Diary = field(default_factory=Diary)
    _models: OrderedDict[str | None, Loaded] = field(default_factory=OrderedDict)
    _loading: dict[str, asyncio.Task[None]] = field(default_factory=dict)
    _waiting: deque[Row] = field(default_factory=deque)
    _running: int = 0

    async def start(self) -> None:
        """Loads the base and its tokenizer."""
        self._device = weights.device_of(self.settings.gpus)
        self._threads = ThreadPoolExecutor(BATCHES_AT_ONCE, thread_name_prefix="batch")
        self._loader = ThreadPoolExecutor(1, thread_name_prefix="load")
        loop = asyncio.get_running_loop()
        base = await loop.run_in_executor(self._loader, weights.load_base, self.ref.path, self.settings, self._device)
        self._models[None] = Loaded(base)
        self._tokenizers = await loop.run_in_executor(
            self._loader, prompts.Tokenizers, self.ref.path, self.settings.max_cached_adapters
        )
        context = self.ref.context_length or 2**20
        self._max_length = min(self.settings.max_length or context, context)
        self._vocabulary = int(base.get_input_embeddings().weight.shape[0])  # type: ignore[operator]
        self._grammars = Grammars(self._vocabulary)

    async def generate(self, ask: Ask) -> AsyncIterator[Piece]:
        """See `Engine.generate`."""
        tokenizer, grammar = await self._tokenizers.of(ask.version), await self._grammar(ask)
        tokens = await prompts.tokenised(ask, tokenizer, self._max_length, self._vocabulary)
        if ask.version is not None:
            await self.load(ask.version)  # nothing may be waited for from here until its users are counted
        pieces: asyncio.Queue[Piece | BaseException] = asyncio.Queue()
        loop = asyncio.get_running_loop()

        def emit(piece: Piece | BaseException) -> None:
            loop.call_soon_threadsafe(pieces.put_nowait, piece)

        rows = self._rows(ask, tokens, tokenizer, emit, grammar)
        loaded = self._loaded(ask.version)
        loaded.users += len(rows)
        try:
            self._waiting.extend(rows)
            self._next()
            left = len(rows)
            while left:
                piece = await pieces.get()
                if isinstance(piece, BaseException):
                    raise piece
                if piece.finish is not None:
                    left -= 1
                    row = rows[piece.index]
                    self.diary.answered(ask.version, row.tokens, row.drawn, row.tokenizer)
                yield piece
        finally:
            loaded.users -= len(rows)
            for row in rows:
                row.is_cancelled = True
            self._waiting = deque(row for row in self._waiting if not row.is_cancelled)
            self._trim()

    async def _grammar(self, ask: Ask) -> Grammar | None:
        if ask.sampling.schema is None:
            return None
        tokenizer = await self._tokenizers.of(ask.version)
        stops = prompts.stop_tokens(self.ref.path, ask.version, tokenizer)
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(None, self._grammars.compiled, ask.sampling.schema, tokenizer, stops)

    def _rows(
        self,
        ask: Ask,
        tokens: list[int],
        tokenizer: Any,
        emit: Callable[[Piece | BaseException], None],
        grammar: Grammar | None,
    ) -> list[Row]:
        room = self._max_length - len(tokens)
        wanted = ask.sampling.max_tokens
        stops = prompts.stop_tokens(self.ref.path, ask.version, tokenizer)
        return [
            Row(
                ask, index, tokens, room if wanted is None else min(room, wanted), stops, Drawer(ask.sampling, index),
                TextStream(tokenizer.backend_tokenizer, ask.sampling.stop), tokenizer, emit, grammar and grammar.copy(),
            )
            for index in range(ask.n)
        ]  # fmt: skip

    async def tokenize(self, ask: Ask) -> list[int]:
        """See `Engine.tokenize`."""
        tokenizer = await self._tokenizers.of(ask.version)
        return await prompts.tokenised(ask, tokenizer, self._max_length, self._vocabulary)

    async def encode(self, texts: list[str] | list[list[int]], version: Version | None) -> Encoded:
        """See `Engine.encode`; a causal language model writes text."""
        raise RequestError(f"{self.name} writes text; it gives neither embeddings nor classes", 404, param="model")

    async def load(self, version: Version) -> None:
        """See `Engine.load`. Two requests for one version load it once."""
        digest = version.digest
        while digest not in self._models:  # it may have left again before this wakes up
            if digest not in self._loading:
                self._loading[digest] = asyncio.create_task(self._load(version))
            await asyncio.shield(self._loading[digest])
        self._models.move_to_end(digest)

    async def news(self) -> News | None:
        """See `Engine.news`."""
        return self.diary.take()

    async def _load(self, version: Version) -> None:
        try:
            model = await asyncio.get_running_loop().run_in_executor(
                self._loader, weights.with_adapter, self._models[None].model, version, self._device
            )
            self._models[version.digest] = Loaded(model)
            self.diary.loaded(version.digest)
            self._trim(keep=version.digest)
        finally:
            del self._loading[version.digest]

    def _trim(self, keep: str | None = None) -> None:
        """Lets the least recently used versions go, but never one that is in use."""
        idle = [digest for digest, loaded in self._models.items() if digest not in (None, keep) and not loaded.users]
        for digest in idle[: max(0, len(self._models) - 1 - self.settings.max_cached_adapters)]:
            del self._models[digest]
            self.diary.evicted(str(digest))

    def _next(self) -> None:
        """Starts batches while there are threads for them: the oldest waiting row, and others of its version."""
        while self._waiting and self._running < BATCHES_AT_ONCE:
            first = next((row for row in self._waiting if not self._loaded(row.ask.version).is_busy), None)
            if first is None:
                return
            version, loaded = first.ask.version, self._loaded(first.ask.version)
            same = [
                row
                for row in self._waiting
                if row.ask.version == version and (not loaded.is_prompted or len(row.tokens) == len(first.tokens))
            ][: self.settings.max_batch]
            loaded.is_busy = loaded.is_prompted
            chosen = {id(row) for row in same}
            self._waiting = deque(row for row in self._waiting if id(row) not in chosen)
            self._running += 1
            done = asyncio.get_running_loop().run_in_executor(
                self._threads, run_batch, loaded.model, same, self._device
            )
            done.add_done_callback(partial(self._ended, loaded))

    def _loaded(self, version: Version | None) -> Loaded:
        return self._models[version.digest if version else None]

    def _ended(self, loaded: Loaded, batch: asyncio.Future[None]) -> None:
        self._running -= 1
        loaded.is_busy = False
        self._next()
        batch.result()


def run_batch(model: Any, rows: list[Row], device: torch.device) -> None:
    """Writes all answers of a batch to their ends. An error ends each of its rows with it."""
    try:
        with torch.inference_mode():
            of_prompts: dict[int, tuple[TokenLogprob, ...]] = {}
            for row in rows:
                if row.ask.sampling.prompt_logprobs is not None:
                    if id(row.ask) not in of_prompts:  # all answers to one prompt have the same
                        of_prompts[id(row.ask)] = prompt_logprobs(model, row, device)
                    row.first = of_prompts[id(row.ask)]
            for row in rows:
                if row.room <= 0:
                    row.end_without_answer()
            live = [row for row in rows if not row.is_over]
            if live:
                _generate(model, live, device)
    except Exception as error:  # noqa: BLE001 - whatever ends the batch ends its rows, which say so to their clients
        for row in rows:
            if not row.is_over:
                row.fail(error)


def _generate(model: Any, rows: list[Row], device: torch.device) -> None:
    longest = max(len(row.tokens) for row in rows)
    ids_BT = torch.zeros(len(rows), longest, dtype=torch.long)
    mask_BT = torch.zeros_like(ids_BT)
    for b, row in enumerate(rows):
        ids_BT[b, longest - len(row.tokens) :] = torch.tensor(row.tokens)
        mask_BT[b, longest - len(row.tokens) :] = 1
    model.generate(
        input_ids=ids_BT.to(device),
        attention_mask=mask_BT.to(device),
        max_new_tokens=max(row.room for row in rows),
        do_sample=False,
        num_beams=1,
        eos_token_id=None,
        pad_token_id=0,
        logits_processor=LogitsProcessorList([_Writer(rows)]),
        stopping_criteria=StoppingCriteriaList([_Over(rows)]),
    )


class _Writer(LogitsProcessor):
    """Draws each row's token by the row's own rules, and leaves `generate` no other choice."""

    def __init__(self, rows: list[Row]) -> None:
        self._rows = rows

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:  # type: ignore[override]
        only_BV = torch.full_like(scores, -torch.inf)
        for b, row in enumerate(self._rows):
            only_BV[b, 0 if row.is_over else row.take(scores[b].float())] = 0
        return only_BV


class _Over(StoppingCriteria):
    """Which rows have ended, or have lost their client."""

    def __init__(self, rows: list[Row]) -> None:
        self._rows = rows

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:  # type: ignore[override]
        return torch.tensor([row.is_over for row in self._rows], device=input_ids.device)


def prompt_logprobs(model: Any, row: Row, device: torch.device) -> tuple[TokenLogprob, ...]:
    """The prompt's tokens, each with its log-probability after those before it."""
    ids_T = torch.tensor(row.tokens, device=device)
    logits_TV = model(input_ids=ids_T[None]).logits[0, -len(row.tokens) :]
    wanted = row.ask.sampling.prompt_logprobs or 0
    text, raw = spelled(row.tokens[0], row.tokenizer)
    first = TokenLogprob(row.tokens[0], text, None, raw)
    return (
        first,
        *(
            logprob_of(token, logits_TV[t].float().log_softmax(-1), wanted, row.tokenizer)
            for t, token in enumerate(row.tokens[1:])
        ),
    )


def logprob_of(token: int, logprobs_V: Tensor, wanted: int, tokenizer: Any) -> TokenLogprob:
    """A token with its log-probability and the likeliest others."""

    def alone(id: int) -> TokenLogprob:
        text, raw = spelled(id, tokenizer)
        return TokenLogprob(id, text, float(logprobs_V[id]), raw)

    likeliest = logprobs_V.topk(wanted).indices.tolist() if wanted else []
    return replace(alone(token), top=tuple(map(alone, likeliest)))
