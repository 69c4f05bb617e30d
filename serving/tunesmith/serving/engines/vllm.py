"""The fast engine: vLLM, with the requests of many adapters in one batch. The only module that imports vllm.

Every version has an integer id and a name of its own, never used again: its weights never change under a running request
and its cached prefixes are never another's.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
from collections.abc import AsyncIterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NoReturn

from vllm import SamplingParams, TokensPrompt
from vllm.engine.arg_utils import AsyncEngineArgs
from vllm.exceptions import VLLMValidationError
from vllm.lora.request import LoRARequest
from vllm.outputs import RequestOutput
from vllm.sampling_params import RequestOutputKind, StructuredOutputsParams
from vllm.v1.engine.async_llm import AsyncLLM
from vllm.v1.engine.exceptions import EngineDeadError

from tunesmith.cluster.base import BaseRef
from tunesmith.cluster.errors import AdapterError, RequestError
from tunesmith.serving.config import Base
from tunesmith.serving.engines import prompts
from tunesmith.serving.engines.diary import Diary, News
from tunesmith.serving.engines.protocol import Ask, Encoded, Piece, TokenLogprob, Version
from tunesmith.serving.engines.text import spelled

RANKS = (8, 16, 32, 64, 128, 256, 320, 512)
"""Ranks that vLLM reserves room for."""
GREEDY = 1e-5
"""Temperatures below it are 0 to vLLM."""
DTYPES = {"auto": "auto", "fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}

_log = logging.getLogger(__name__)


@dataclass
class VllmEngine:
    """See the module; `await start()` starts vLLM, which works in a process of its own.

    Attributes:
        name: of the base, in messages.
    """

    name: str
    ref: BaseRef
    settings: Base
    diary: Diary = field(default_factory=Diary)
    _ids: dict[str, int] = field(default_factory=dict)
    _held: set[int] = field(default_factory=set)
    _last_id: int = 0
    _adding: asyncio.Lock = field(default_factory=asyncio.Lock)

    async def start(self) -> None:
        """Loads the base."""
        on_cpu = self.settings.gpus <= 0
        if on_cpu:  # vLLM reads these from the environment alone
            os.environ["VLLM_CPU_KVCACHE_SPACE"] = str(max(1, round(self.settings.memory_gib)))
            os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
            # the model beside the scheduler in one process: between two, both would spin while they wait for each other
            os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
        os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
        settings = self.settings
        dtype = "float32" if on_cpu and settings.dtype == "auto" else DTYPES[settings.dtype]
        arguments = AsyncEngineArgs(
            model=self.ref.path,
            dtype=dtype,  # type: ignore[arg-type]
            max_model_len=min(settings.max_length or 2**30, self.ref.context_length or 2**30),
            max_num_seqs=settings.max_batch,
            enable_lora=True,
            max_loras=settings.max_adapters,
            max_cpu_loras=max(settings.max_cached_adapters, settings.max_adapters),
            max_lora_rank=next(rank for rank in RANKS if rank >= min(settings.max_rank, RANKS[-1])),
            max_logprobs=20,
            logprobs_mode="raw_logprobs",
            distributed_executor_backend="uni",
            enforce_eager=on_cpu,
            generation_config="vllm",
            enable_log_requests=False,
        )
        self._engine = AsyncLLM.from_engine_args(arguments)
        self._tokenizers = prompts.Tokenizers(self.ref.path, settings.max_cached_adapters)
        self._max_length = int(self._engine.model_config.max_model_len)
        self._vocabulary = int(self._engine.model_config.get_vocab_size())

    async def generate(self, ask: Ask) -> AsyncIterator[Piece]:
        """See `Engine.generate`."""
        tokenizer = await self._tokenizers.of(ask.version)
        tokens = await prompts.tokenised(ask, tokenizer, self._max_length, self._vocabulary)
        if ask.sampling.max_tokens == 0 and ask.sampling.prompt_logprobs is None:
            for index in range(ask.n):
                yield Piece(index, "", 0, len(tokens), "length")
            return
        stops = prompts.stop_tokens(self.ref.path, ask.version, tokenizer)
        # vLLM draws the likeliest answer once alone: of n answers all are the same
        alike = range(ask.n) if ask.sampling.temperature < GREEDY else range(1)
        asked = replace(ask, n=ask.n // len(alike))
        try:
            adapter = await self._adapter(ask.version)
        except EngineDeadError:
            self._end()
        outputs = self._engine.generate(
            TokensPrompt(prompt_token_ids=tokens), _parameters(asked, stops), ask.id, lora_request=adapter
        )
        try:
            drawn: dict[int, list[int]] = {index: [] for index in range(asked.n)}
            async for output in outputs:
                for one in output.outputs if ask.sampling.max_tokens != 0 else ():
                    drawn[one.index] += one.token_ids
                    if one.finish_reason is not None:
                        self.diary.answered(ask.version, tokens, drawn[one.index], tokenizer)
                for piece in _pieces(output, asked, tokens, tokenizer):
                    for index in alike:
                        yield replace(piece, index=piece.index + index)
        except VLLMValidationError as error:
            raise RequestError(" ".join(str(error).split())[:400]) from error
        except EngineDeadError:
            self._end()
        finally:
            await outputs.aclose()  # gives the slot back at once when the client has left

    async def tokenize(self, ask: Ask) -> list[int]:
        """See `Engine.tokenize`."""
        tokenizer = await self._tokenizers.of(ask.version)
        return await prompts.tokenised(ask, tokenizer, self._max_length, self._vocabulary)

    async def encode(self, texts: list[str] | list[list[int]], version: Version | None) -> Encoded:
        """See `Engine.encode`; a causal language model writes text."""
        raise RequestError(f"{self.name} writes text; it gives neither embeddings nor classes", 404, param="model")

    async def load(self, version: Version) -> None:
        """See `Engine.load`."""
        await self._adapter(version)

    async def news(self) -> News | None:
        """See `Engine.news`."""
        async with self._adding:
            await self._note_moves()
        return self.diary.take()

    async def check_health(self) -> None:
        """Ends this replica when vLLM's process has died: what asked it for an adapter just then would wait for ever."""
        try:
            await self._engine.check_health()
        except EngineDeadError:
            self._end()

    def stop(self) -> None:
        """Ends vLLM's process."""
        self._engine.shutdown()

    def _end(self) -> NoReturn:
        """Ends the process of a replica whose vLLM has died.

        It would fail its requests faster than a living replica answers them, and so draw all of them until Serve asked
        after its health. Without its process the gateway asks another one, and Serve starts a new one at once.
        """
        _log.error("%s: vLLM has died, and this replica ends with it", self.name)
        os._exit(1)

    async def _note_moves(self) -> None:
        """vLLM by itself lets go of what is used least, and loads it again when it is asked for: it is asked what it holds."""
        held = set(await self._engine.list_loras())
        for digest, number in self._ids.items():
            if number in held - self._held:
                self.diary.loaded(digest)
            if number in self._held - held:
                self.diary.evicted(digest)
        self._held = held

    async def _adapter(self, version: Version | None) -> LoRARequest | None:
        if version is None:
            return None
        async with self._adding:  # an id is given to what vLLM has loaded alone: any other would end its process
            if version.digest not in self._ids:
                refuse_unsupported(version, self.settings.max_rank)
                self._last_id += 1
                try:
                    await self._engine.add_lora(LoRARequest(version.digest, self._last_id, version.folder))
                except EngineDeadError:
                    raise
                except Exception as error:
                    reason = " ".join(str(error).split())[:300]
                    raise AdapterError(f"version {version.digest[:12]}: vLLM cannot load it: {reason}") from error
                self._ids[version.digest] = self._last_id
                await self._note_moves()
        return LoRARequest(version.digest, self._ids[version.digest], version.folder)


def refuse_unsupported(version: Version, max_rank: int) -> None:
    """vLLM would find some of these only when a request is under way.

    Raises:
        AdapterError: naming what it does not serve.
    """
    config = json.loads((Path(version.folder) / "adapter_config.json").read_text(encoding="utf-8"))
    rank = max([int(config.get("r") or 0), *(config.get("rank_pattern") or {}).values()])
    wrong = {
        f"peft_type {config.get('peft_type')}": config.get("peft_type") != "LORA",
        "DoRA": config.get("use_dora"),
        "modules_to_save": config.get("modules_to_save"),
        "lora_bias": config.get("lora_bias"),
        f"bias {config.get('bias')}": config.get("bias", "none") != "none",
        f"rank {rank}, above max_rank {max_rank}": rank > max_rank,
    }
    if found := [name for name, is_there in wrong.items() if is_there]:
        raise AdapterError(
            f"version {version.digest[:12]}: the vllm engine does not serve {', '.join(found)}",
            "Serve this base with engine: transformers.",
        )


def _parameters(ask: Ask, stops: frozenset[int]) -> SamplingParams:
    sampling = ask.sampling
    schema = sampling.schema
    structured = None
    if schema is not None:
        structured = StructuredOutputsParams(json=schema) if schema else StructuredOutputsParams(json_object=True)
    try:
        return SamplingParams(
            n=ask.n,
            max_tokens=1 if sampling.max_tokens == 0 else sampling.max_tokens,
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            top_k=sampling.top_k,
            frequency_penalty=sampling.frequency_penalty,
            presence_penalty=sampling.presence_penalty,
            stop=list(sampling.stop),
            stop_token_ids=[] if sampling.ignore_eos else sorted(stops),
            ignore_eos=sampling.ignore_eos,
            seed=sampling.seed,
            logprobs=sampling.logprobs,
            prompt_logprobs=sampling.prompt_logprobs,
            structured_outputs=structured,
            output_kind=RequestOutputKind.DELTA if ask.stream else RequestOutputKind.FINAL_ONLY,
        )
    except (ValueError, VLLMValidationError) as error:
        raise RequestError(" ".join(str(error).split())[:400]) from error


def _pieces(output: RequestOutput, ask: Ask, tokens: list[int], tokenizer: Any) -> list[Piece]:
    prompt: tuple[TokenLogprob, ...] = ()
    if output.prompt_logprobs and ask.sampling.prompt_logprobs is not None:
        wanted = ask.sampling.prompt_logprobs
        prompt = tuple(_logprob(t, at, wanted, tokenizer) for t, at in zip(tokens, output.prompt_logprobs, strict=True))
    nothing = ask.sampling.max_tokens == 0
    pieces = []
    for one in output.outputs:
        if nothing:
            pieces.append(Piece(one.index, "", 0, len(tokens), "length", (), prompt))
            continue
        logprobs: tuple[TokenLogprob, ...] = ()
        if one.logprobs and ask.sampling.logprobs is not None:
            pairs = zip(one.token_ids, one.logprobs, strict=True)
            logprobs = tuple(_logprob(t, at, ask.sampling.logprobs, tokenizer) for t, at in pairs)
        finish = None if one.finish_reason is None else "length" if one.finish_reason == "length" else "stop"
        pieces.append(Piece(one.index, one.text, len(one.token_ids), len(tokens), finish, logprobs, prompt))
    return pieces


def _logprob(token: int, at: Any, wanted: int, tokenizer: Any) -> TokenLogprob:
    def alone(id: int) -> TokenLogprob:
        text, raw = spelled(id, tokenizer)
        return TokenLogprob(id, text, None if at is None else at[id].logprob, raw)

    ranked = [] if at is None else sorted((one.rank, id) for id, one in at.items() if one.rank <= wanted)
    return replace(alone(token), top=tuple(alone(id) for _, id in ranked))
