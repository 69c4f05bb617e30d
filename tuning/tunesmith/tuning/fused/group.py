"""A frozen base and the trials that share it: one forward and backward for many of them.

The trials never mix: layers that every token passes through alone see one long row, attention sees a lane's own segments,
the adapters and the losses are a lane's own. So a trial's numbers do not depend on who its neighbours are.

Shape suffixes: N lanes, C tokens of a lane, D hidden, L labels of a lane, P weights of an adapter.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tunesmith.cluster.base import BaseRef
from tunesmith.cluster.recipe.schema import Recipe
from tunesmith.trainers import attention, head, models
from tunesmith.trainers.batch import Batch, Forest, collate
from tunesmith.trainers.data.prepare import Prepared
from tunesmith.trainers.data.tokens import TokenStore
from tunesmith.trainers.objectives import OBJECTIVES
from tunesmith.trainers.packing import pack
from tunesmith.tuning.fused.lanes import Bucket, Dropout, Lanes, install
from tunesmith.tuning.fused.prefix import SHARE, Prefix, free_bytes, frozen_depth
from tunesmith.tuning.fused.trial import Adapter, Trial, Unit

LABEL_ROWS = 8
"""Labels are scored in multiples of so many for each thread: products of fewer rows are summed in another order."""


@dataclass(frozen=True)
class Row:
    """Several lanes' batches in one row, filled up to equal length.

    Attributes:
        input_ids: int64 [N * C].
        position_ids: int64 [N * C].
        forest: the lanes' segments; what fills a lane is a segment of its own.
        batches: the lanes with something in them, from the first.
    """

    input_ids: Tensor
    position_ids: Tensor
    forest: Forest
    batches: list[Batch]


def lay_out(batches: Sequence[Batch], lanes: int, length: int) -> Row:
    """Puts each batch at the start of its lane; lanes without one hold nothing but filler."""
    input_ids = torch.zeros(lanes, length, dtype=torch.int64)
    segments: list[int] = []
    for lane in range(lanes):
        used = 0
        if lane < len(batches):
            used = len(batches[lane].input_ids)
            input_ids[lane, :used] = batches[lane].input_ids
            segments += batches[lane].forest.lengths
        if used < length:
            segments.append(length - used)
    forest = Forest.flat(segments)
    return Row(input_ids.flatten(), forest.position_ids(), forest, list(batches))


class Group:
    """One resident base on one device.

    Args:
        recipe: any of the trials'; of `model`, `objective`, `data` and the number format all have the same.
        base: the base they share.
        data: the data set they share.
        targets: every layer that any of the trials adapts.
        length: tokens of a lane.
        lanes: most lanes of a row.
        device: where all of it lies.
        dtype: format of the frozen weights and of the activations.
        spare: bytes beyond what the trials need; None where nobody can tell.
    """

    def __init__(
        self,
        recipe: Recipe,
        base: BaseRef,
        data: Prepared,
        targets: Sequence[str],
        length: int,
        lanes: int,
        device: torch.device,
        dtype: torch.dtype,
        spare: int | None = None,
    ) -> None:
        self.data, self.length, self.count, self.device, self.dtype = data, length, lanes, device, dtype
        self.model: Any = models.load_frozen(recipe, base, device, dtype)
        attention.install(self.model, attention.choose(recipe.model.attention, device, dtype))
        head.install(self.model.get_output_embeddings(), head.LogitTransform.of(self.model.config))
        if recipe.train.gradient_checkpointing:
            self.model.train()  # else Transformers keeps the activations all the same; nothing in these bases drops any
        self.lanes = Lanes(length)
        self.layout = install(self.model, targets, self.lanes)
        self.objective = OBJECTIVES[recipe.objective.kind]
        self.held_out = self._cut(data.validation, recipe.eval.max_rows)
        self.prefix: Prefix | None = None
        """The layers below every adapter; None when there are none, or when their numbers would depend on the row."""
        self.is_steady = lanes == 1 or self._probe(Adapter(self.layout, recipe, device))
        """Whether a lane's numbers are the same to the bit however many lanes the row has; if not, all rows have all lanes."""
        if self.is_steady:
            self.prefix = self._shared_prefix(targets, spare)

    def tick(self, trials: Sequence[Trial]) -> list[Trial]:
        """One forward and backward for the next units of these trials; returns those whose numbers are no longer finite.

        Each trial gets a lane; lanes that are left go to trials whose optimizer step has further units.
        """
        work = _assign(trials, self.count)
        batches = [collate(self.data.train, [unit.examples], unit.labels) for _, unit in work]
        dropouts = [trial.dropout(unit, self.device) for trial, unit in work]
        losses, gradients = self._forward_backward(batches, [trial.adapter for trial, _ in work], dropouts)
        values = losses.double().tolist()
        broken = {
            trial.key: trial
            for (trial, unit), loss, gradient_P in zip(work, values, gradients, strict=True)
            if not trial.take(unit, loss, gradient_P)
        }
        return list(broken.values())

    @torch.no_grad()
    def held_out_loss(self, adapter: Adapter | None) -> float:
        """Mean negative log-probability of the held-out labels, in nats a token; None asks the base alone."""
        total, weight = 0.0, 0.0
        for first in range(0, len(self.held_out), self.count):
            packs = self.held_out[first : first + self.count]
            batches = [collate(self.data.validation, [one], 1.0) for one in packs]
            row = self._row(batches)
            self._share_out([adapter] * len(batches) if adapter else [])
            for batch, logps_L in zip(row.batches, self._logps(row, self.data.validation), strict=True):
                total -= float(logps_L.double().sum())
                weight += len(batch.targets)
        self.lanes.buckets = []
        return total / weight

    @torch.no_grad()
    def logps_of(self, adapter: Adapter, store: TokenStore, rows: list[int]) -> list[np.ndarray]:
        """For each example the log-probabilities of its labels, float32 [L], in nats."""
        batches = [collate(store, [(row,)], 1.0) for row in rows]
        found: list[np.ndarray] = []
        for first in range(0, len(batches), self.count):
            some = batches[first : first + self.count]
            self._share_out([adapter] * len(some))
            found += [logps_L.float().cpu().numpy() for logps_L in self._logps(self._row(some), store)]
        self.lanes.buckets = []
        return found

    def bare(self) -> Any:
        """The base without lanes; the group can train nothing any more."""
        for name in self.layout.spans:
            parent, _, last = name.rpartition(".")
            owner = self.model.get_submodule(parent)
            setattr(owner, last, getattr(owner, last).base)
        return self.model

    def _forward_backward(
        self, batches: list[Batch], adapters: list[Adapter], dropouts: list[Dropout]
    ) -> tuple[Tensor, list[Tensor]]:
        """The loss of each lane [N], and the gradient of each lane's adapter, float32 [P]."""
        gradients = self._share_out(adapters, dropouts)
        row, losses = self._row(batches), []
        for batch, logps_L in zip(batches, self._logps(row, self.data.train), strict=True):
            loss, _ = self.objective(logps_L, batch.to(self.device))
            losses.append(loss)
        made = torch.stack(losses)
        made.sum().backward()
        self.lanes.buckets = []
        return made.detach(), gradients

    def _row(self, batches: list[Batch]) -> Row:
        return lay_out(batches, len(batches) if self.is_steady else self.count, self.length)

    def _probe(self, adapter: Adapter) -> bool:
        """Whether a lane alone gives the bits that it gives among others, at either end of a row."""
        self.is_steady = True
        with torch.no_grad():
            torch.nn.init.normal_(adapter.weights, std=0.02, generator=torch.Generator(self.device).manual_seed(0))
        store = self.data.train
        labelled = np.flatnonzero(store.trained_counts > 0)
        packs = pack(labelled[: 64 * self.count], store.lengths, self.length)
        packs[0] = (int(labelled[store.trained_counts[labelled].argmin()]),)  # as few rows as there can be
        batches = [collate(store, [packs[lane % len(packs)]], 1.0) for lane in range(self.count)]
        nothing = Dropout(0.0, torch.Generator(self.device), 0)

        def bits(some: list[Batch], lane: int) -> tuple[Tensor, Tensor]:
            losses, gradients = self._forward_backward(some, [adapter] * len(some), [nothing] * len(some))
            return losses[lane], gradients[lane]

        first, last = batches[0], batches[-1]
        alone = [bits([one], 0) for one in (first, last)]
        among = [bits(batches, 0), bits(batches, -1)]
        pairs = zip((x for pair in alone for x in pair), (x for pair in among for x in pair), strict=True)
        return all(torch.equal(one, other) for one, other in pairs)

    def _cut(self, store: TokenStore, most: int | None) -> list[tuple[int, ...]]:
        """The held-out examples, packed into lanes."""
        return pack(np.flatnonzero(store.trained_counts > 0)[:most], store.lengths, self.length)

    def _share_out(self, adapters: Sequence[Adapter], dropouts: Sequence[Dropout] | None = None) -> list[Tensor]:
        """Gives lane after lane its adapter; neighbours of one bucket are stacked.

        Returns:
            For each lane the vector float32 [P] in which the backward pass gathers its gradient; with `dropouts` only.
        """
        self.lanes.buckets, gradients = [], []
        first = 0
        for rank, members in groupby(adapters, key=lambda adapter: adapter.bucket):
            stack = list(members)
            last = first + len(stack)
            weights = torch.stack([adapter.weights.detach() for adapter in stack])
            gradients_NP = torch.zeros_like(weights) if dropouts is not None else None
            mine = list(dropouts[first:last]) if dropouts is not None else []
            self.lanes.buckets.append(
                Bucket(
                    first,
                    last,
                    rank,
                    weights.to(self.dtype),
                    gradients_NP,
                    torch.tensor([a.scale for a in stack], device=self.device)[:, None, None],
                    mine if any(one.share for one in mine) else None,
                )
            )
            if gradients_NP is not None:
                gradients += gradients_NP
            first = last
        return gradients

    def _logps(self, row: Row, store: TokenStore) -> list[Tensor]:
        """Float32 [L] for each batch of the row, whose examples are of the store."""
        hidden_TD = self._hidden(row, store)
        hidden_NCD = hidden_TD.view(-1, self.length, hidden_TD.shape[-1])
        found = [
            (hidden_CD.index_select(0, batch.label_positions.to(self.device)), batch.targets.to(self.device))
            for hidden_CD, batch in zip(hidden_NCD, row.batches, strict=False)
        ]
        if not self.is_steady:  # how labels are cut into chunks would depend on the neighbours
            return [self.model.get_output_embeddings()(hidden_LD, target_L) for hidden_LD, target_L in found]
        counts = [len(target_L) for _, target_L in found]
        filler = -sum(counts) % (LABEL_ROWS * torch.get_num_threads())
        last_LD, last_L = found[-1]
        found += [(last_LD[-1:].expand(filler, -1), last_L[-1:].expand(filler))]
        hidden_LD, target_L = (torch.cat(parts) for parts in zip(*found, strict=True))
        logps_L = self.model.get_output_embeddings()(hidden_LD, target_L)
        return list(logps_L.split([*counts, filler])[:-1])

    def _hidden(self, row: Row, store: TokenStore) -> Tensor:
        """The last hidden state of a row [N * C, D]."""
        where: dict[str, Any] = {
            "position_ids": row.position_ids[None].to(self.device),
            "use_cache": False,
            "forest": row.forest,
        }
        if self.prefix is None:
            return self.model.base_model(input_ids=row.input_ids[None].to(self.device), **where).last_hidden_state[0]
        parts = self.prefix.activations(store, [one for batch in row.batches for one in batch.examples])
        embeds_NCD = parts[0].new_zeros(len(row.input_ids) // self.length, self.length, parts[0].shape[-1])
        taken = iter(parts)
        for lane, batch in enumerate(row.batches):
            lane_TD = torch.cat([next(taken) for _ in batch.examples])
            embeds_NCD[lane, : len(lane_TD)] = lane_TD
        with self.prefix.above():
            return self.model.base_model(inputs_embeds=embeds_NCD.flatten(0, 1)[None], **where).last_hidden_state[0]

    def _shared_prefix(self, targets: Sequence[str], spare: int | None) -> Prefix | None:
        depth = frozen_depth(self.model, targets)
        if depth == 0:
            return None
        limit = int(SHARE * free_bytes(self.device))
        prefix = Prefix(self.model, depth, self.count * self.length, limit if spare is None else min(limit, spare))
        return prefix if prefix.is_sound(self.data.train, 0) else None


def _assign(trials: Sequence[Trial], lanes: int) -> list[tuple[Trial, Unit]]:
    """Which unit each lane computes: by bucket, and each trial's units in their order."""
    assert len(trials) <= lanes, f"{len(trials)} trials and {lanes} lanes"
    work = {trial.key: [trial.next_unit()] for trial in trials}
    free = lanes - len(trials)
    while free and (waiting := [trial for trial in trials if trial.units]):
        for trial in waiting[:free]:
            work[trial.key].append(trial.next_unit())
            free -= 1
    by_bucket = sorted(trials, key=lambda trial: trial.adapter.bucket)
    return [(trial, unit) for trial in by_bucket for unit in work[trial.key]]
