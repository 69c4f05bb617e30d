"""The engine for models that give a vector for each text: an encoder's embeddings, or a classifier's probabilities.

A model's own files say how token vectors become one and whether it ends at unit length, as sentence-transformers writes
them (`modules.json`, `1_Pooling/config.json`); without them it is their mean, as there. B prompts, T tokens, D hidden, C
classes.
"""

from __future__ import annotations

import asyncio
import json
from collections import OrderedDict
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tunesmith.cluster.base import BaseRef
from tunesmith.cluster.errors import ModelError, RequestError
from tunesmith.serving.config import Base
from tunesmith.serving.engines import prompts, weights
from tunesmith.serving.engines.diary import Diary, News
from tunesmith.serving.engines.protocol import Ask, Encoded, Piece, Sampling, Version

CLASSES = "ForSequenceClassification"
POOLINGS = {"cls_token": "cls", "mean_tokens": "mean", "max_tokens": "max", "lasttoken": "last"}
"""sentence-transformers' names, each after `pooling_mode_`."""


@dataclass
class EncoderEngine:
    """See the module; `await start()` loads the base.

    Attributes:
        name: of the base, in messages.
    """

    name: str
    ref: BaseRef
    settings: Base
    diary: Diary = field(default_factory=Diary)
    _models: OrderedDict[str | None, nn.Module] = field(default_factory=OrderedDict)
    _loading: dict[str, asyncio.Task[None]] = field(default_factory=dict)

    async def start(self) -> None:
        """Loads the base and its tokenizer.

        Raises:
            ModelError: its vectors are made in a way that this engine does not know.
        """
        folder = Path(self.ref.path)
        self._device = weights.device_of(self.settings.gpus)
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="encode")
        named = _read(folder / "config.json").get("architectures") or []
        self._classifies = any(name.endswith(CLASSES) for name in named)
        self._pooling = "" if self._classifies else pooling_of(folder)
        self._is_unit = any(kind == "Normalize" for kind in _modules(folder))
        kind = "AutoModelForSequenceClassification" if self._classifies else "AutoModel"
        loop = asyncio.get_running_loop()
        model = await loop.run_in_executor(
            self._thread, weights.load_base, self.ref.path, self.settings, self._device, kind
        )
        self._models[None] = model
        self._tokenizers = await loop.run_in_executor(
            self._thread, prompts.Tokenizers, self.ref.path, self.settings.max_cached_adapters
        )
        context = self.ref.context_length or 2**20
        self._max_length = min(self.settings.max_length or context, context)
        self._vocabulary = int(model.get_input_embeddings().weight.shape[0])  # type: ignore[operator]
        self._labels = tuple(map(str, model.config.id2label.values())) if self._classifies else ()  # type: ignore[union-attr]

    async def generate(self, ask: Ask) -> AsyncIterator[Piece]:
        """See `Engine.generate`; nothing here writes."""
        what, route = ("classes", "/classify") if self._classifies else ("embeddings", "/v1/embeddings")
        raise RequestError(f"{self.name} gives {what}, no text: ask {route}", param="model")
        yield  # an iterator like the others

    async def tokenize(self, ask: Ask) -> list[int]:
        """See `Engine.tokenize`."""
        tokenizer = await self._tokenizers.of(ask.version)
        return await prompts.tokenised(ask, tokenizer, self._max_length, self._vocabulary)

    async def encode(self, texts: list[str] | list[list[int]], version: Version | None) -> Encoded:
        """See `Engine.encode`."""
        tokenizer, loop = await self._tokenizers.of(version), asyncio.get_running_loop()

        def tokenized() -> list[list[int]]:
            asks = [Ask("", text, sampling=Sampling(max_tokens=0)) for text in texts]
            return [prompts.tokens_of(ask, tokenizer, self._max_length, self._vocabulary) for ask in asks]

        try:
            rows = await loop.run_in_executor(self._thread, tokenized)
        except RequestError as error:
            raise RequestError(error.what, error.status, "input", error.code) from error
        if version is not None:
            await self.load(version)
        model = self._models[version.digest if version else None]
        vectors = await loop.run_in_executor(self._thread, self._encoded, model, rows)
        return Encoded(vectors, sum(map(len, rows)), self._labels)

    def _encoded(self, model: nn.Module, rows: list[list[int]]) -> list[list[float]]:
        """Prompts of like length share a batch; vectors come in the prompts' order."""
        padding: int | None = model.config.get_text_config().pad_token_id  # type: ignore[union-attr,operator]
        size = 1 if self._classifies and padding is None else self.settings.max_batch
        order = sorted(range(len(rows)), key=lambda index: len(rows[index]))
        vectors: list[list[float]] = [[] for _ in rows]
        for at in range(0, len(order), size):
            chosen = order[at : at + size]
            longest = len(rows[chosen[-1]])
            ids_BT = torch.full((len(chosen), longest), padding or 0)
            mask_BT = torch.zeros_like(ids_BT)
            for b, index in enumerate(chosen):
                ids_BT[b, : len(rows[index])] = torch.tensor(rows[index])
                mask_BT[b, : len(rows[index])] = 1
            with torch.inference_mode():
                ids_BT, mask_BT = ids_BT.to(self._device), mask_BT.to(self._device)
                found = model(input_ids=ids_BT, attention_mask=mask_BT)
                made = self._probabilities(found.logits) if self._classifies else self._pooled(found[0], mask_BT)
            for index, vector in zip(chosen, made.tolist(), strict=True):
                vectors[index] = vector
        return vectors

    def _probabilities(self, logits_BC: Tensor) -> Tensor:
        """Classes exclude each other unless the model says otherwise; one class alone is there or not."""
        many = self._models[None].config.problem_type == "multi_label_classification"  # type: ignore[union-attr]
        logits_BC = logits_BC.float()
        return logits_BC.sigmoid() if many or logits_BC.shape[-1] == 1 else logits_BC.softmax(-1)

    def _pooled(self, hidden_BTD: Tensor, mask_BT: Tensor) -> Tensor:
        pooled_BD = pool(hidden_BTD.float(), mask_BT, self._pooling)
        return nn.functional.normalize(pooled_BD, dim=-1) if self._is_unit else pooled_BD

    async def load(self, version: Version) -> None:
        """See `Engine.load`."""
        while version.digest not in self._models:
            if version.digest not in self._loading:
                self._loading[version.digest] = asyncio.create_task(self._load(version))
            await asyncio.shield(self._loading[version.digest])
        self._models.move_to_end(version.digest)

    async def news(self) -> News | None:
        """See `Engine.news`."""
        return self.diary.take()

    async def _load(self, version: Version) -> None:
        try:
            self._models[version.digest] = await asyncio.get_running_loop().run_in_executor(
                self._thread, weights.with_adapter, self._models[None], version, self._device
            )
            self.diary.loaded(version.digest)
            held = [digest for digest in self._models if digest is not None]
            for digest in held[: -self.settings.max_cached_adapters]:  # who computes with one keeps it to the end
                del self._models[digest]
                self.diary.evicted(digest)
        finally:
            del self._loading[version.digest]


def pool(hidden_BTD: Tensor, mask_BT: Tensor, how: str) -> Tensor:
    """One vector [B, D] of the vectors of each prompt's tokens; padding is on the right."""
    mask_BT1 = mask_BT[..., None].to(hidden_BTD.dtype)
    if how == "cls":
        return hidden_BTD[:, 0]
    if how == "max":
        return hidden_BTD.masked_fill(mask_BT1 == 0, -torch.inf).amax(1)
    if how == "last":
        return hidden_BTD[torch.arange(len(hidden_BTD)), mask_BT.sum(1) - 1]
    return (hidden_BTD * mask_BT1).sum(1) / mask_BT1.sum(1)


def pooling_of(folder: Path) -> str:
    """How a model's token vectors become one: `mean`, `cls`, `max` or `last`.

    Raises:
        ModelError: in another way, or by several at once.
    """
    unknown = [kind for kind in _modules(folder) if kind not in ("Transformer", "Pooling", "Normalize")]
    if unknown:
        raise ModelError(f"{folder / 'modules.json'} has a {unknown[0]} module, which this engine does not apply")
    file = folder / "1_Pooling" / "config.json"
    if not file.is_file():
        return "mean"
    config = _read(file)
    chosen = [
        key.removeprefix("pooling_mode_") for key, is_on in config.items() if key.startswith("pooling_mode_") and is_on
    ]
    if len(chosen) != 1 or chosen[0] not in POOLINGS:
        raise ModelError(
            f"{file} pools by {' and '.join(chosen) or 'nothing'}; this engine knows one of {', '.join(POOLINGS)}"
        )
    return POOLINGS[chosen[0]]


def _modules(folder: Path) -> list[str]:
    """Names of sentence-transformers' modules, such as `Pooling`."""
    file = folder / "modules.json"
    return [str(one["type"]).rsplit(".", 1)[-1] for one in _read(file)] if file.is_file() else []


def _read(file: Path) -> Any:
    return json.loads(file.read_text(encoding="utf-8"))
