"""One trial among others on a shared base: its own order of the data, schedule, dropout, optimizer and progress.

Nothing of it depends on its neighbours. Its steps are those of the training loop (`tunesmith.trainers.loop`): the same
examples, normaliser, learning rate and clipping, cut into units of one lane instead of micro-batches.

Shape suffix: P weights of the adapter, padded to its bucket's rank.
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from tunesmith.cluster.recipe.schema import Lora, Recipe
from tunesmith.trainers.data.prepare import Prepared
from tunesmith.trainers.packing import BatchPlan, Pack
from tunesmith.trainers.schedule import Schedule, dropout_seed
from tunesmith.tuning.fused.lanes import Dropout, Layout, bucket_of


@dataclass(frozen=True)
class Unit:
    """What a trial puts into one lane.

    Attributes:
        examples: indices of the training set.
        labels: labels of the whole optimizer step, which the loss is divided by.
        seed: of its dropout.
        is_last: whether the optimizer step ends with it.
    """

    examples: Pack
    labels: float
    seed: int
    is_last: bool


class Adapter:
    """The weights of a trial as one vector, and AdamW on it.

    Args:
        layout: which layers it adapts.
        recipe: the trial's.
        device: where it lies; float32 whatever the base is in.
    """

    def __init__(self, layout: Layout, recipe: Recipe, device: torch.device) -> None:
        spec, train = recipe.adaptation, recipe.train
        assert isinstance(spec, Lora), f"{spec.kind} is not trained side by side"
        self.layout, self.rank, self.bucket = layout, spec.rank, bucket_of(spec.rank)
        self.scale = spec.lora_alpha / spec.rank
        self.dropout = spec.lora_dropout
        self.weights = nn.Parameter(torch.zeros(layout.size * self.bucket, device=device))
        self.gradient: Tensor | None = None
        self.max_norm = train.max_grad_norm
        self.optimizer = torch.optim.AdamW(
            [self.weights],
            lr=train.learning_rate,
            betas=(train.adam_beta1, train.adam_beta2),
            eps=train.adam_epsilon,
            weight_decay=train.weight_decay,
            fused=True,
        )

    def matrices(self, name: str) -> tuple[Tensor, Tensor]:
        """A layer's A [R, D] and B [O, R] as PEFT has them: views of the weights."""
        a_DR, b_RO = self.layout.spans[name].matrices(self.weights.detach(), self.bucket)
        return a_DR[:, : self.rank].mT, b_RO[: self.rank].mT

    def gather(self, gradient_P: Tensor) -> None:
        """Adds to the gradient of the current optimizer step; the vector is the adapter's from here on."""
        self.gradient = gradient_P if self.gradient is None else self.gradient.add_(gradient_P)

    def update(self, learning_rate: float) -> float:
        """One optimizer step with the gathered gradient, which is let go; returns its norm before clipping."""
        assert self.gradient is not None, "no unit has brought a gradient"
        norm = self.gradient.norm()
        if self.max_norm:
            self.gradient *= (self.max_norm / (norm + 1e-6)).clamp(max=1.0)
        self.optimizer.param_groups[0]["lr"] = learning_rate
        self.weights.grad = self.gradient
        self.optimizer.step()
        self.weights.grad = self.gradient = None
        return float(norm)

    def state(self) -> dict[str, Tensor]:
        """What goes into a checkpoint: copies on the CPU, float32 [P] each, and the number of updates."""
        moments = self.optimizer.state.get(self.weights, {})
        zeros = torch.zeros(())
        found = {
            "weights": self.weights.detach(),
            "exp_avg": moments.get("exp_avg", torch.zeros_like(self.weights.detach())),
            "exp_avg_sq": moments.get("exp_avg_sq", torch.zeros_like(self.weights.detach())),
            "updates": moments.get("step", zeros),
        }
        return {name: value.to("cpu", copy=True) for name, value in found.items()}

    def restore(self, state: dict[str, Tensor]) -> None:
        """Takes over what `state` gave."""
        with torch.no_grad():
            self.weights.copy_(state["weights"])
        device = self.weights.device
        self.optimizer.state[self.weights] = {
            "step": state["updates"].clone(),
            "exp_avg": state["exp_avg"].to(device, copy=True),
            "exp_avg_sq": state["exp_avg_sq"].to(device, copy=True),
        }


@dataclass
class StepSums:
    """What the units of the current optimizer step have brought so far."""

    loss: float = 0.0
    tokens: int = 0


@dataclass
class Trial:
    """A trial in a group.

    Attributes:
        key: what the group calls it.
        lane_length: most tokens of a unit.
        step: optimizer steps done.
        lines: metrics of the steps since they were last taken.
    """

    key: str
    recipe: Recipe
    data: Prepared
    adapter: Adapter
    lane_length: int
    step: int = 0
    lines: list[dict[str, Any]] = field(default_factory=list)

    def __post_init__(self) -> None:
        train = self.recipe.train
        self.plan = BatchPlan.of(self.recipe, self.data, 1)
        self.total_steps = self.plan.total_steps(train.epochs, train.max_steps)
        self.schedule = Schedule.of(train, self.total_steps)
        self.sums = StepSums()
        self.began = time.perf_counter()
        self.units: list[Unit] = []

    def next_unit(self) -> Unit:
        """The next piece of work; the caller computes it before it asks again."""
        if not self.units:
            self.units = self._units_of_step()
            self.sums, self.began = StepSums(), time.perf_counter()
        return self.units.pop(0)

    def dropout(self, unit: Unit, device: torch.device) -> Dropout:
        """The unit's dropout, drawn from a stream of its own."""
        generator = torch.Generator(device).manual_seed(unit.seed)
        tokens = int(self.data.train.lengths[list(unit.examples)].sum())
        return Dropout(self.adapter.dropout, generator, tokens)

    def take(self, unit: Unit, loss: float, gradient_P: Tensor) -> bool:
        """Takes in what a unit has brought, and ends the optimizer step with its last; returns whether all was finite."""
        self.adapter.gather(gradient_P)
        self.sums.loss += loss
        self.sums.tokens += int(self.data.train.lengths[list(unit.examples)].sum())
        if not math.isfinite(loss):
            return False
        return self._end_step(unit) if unit.is_last else True

    def _end_step(self, unit: Unit) -> bool:
        assert self.adapter.gradient is not None
        if not bool(torch.isfinite(self.adapter.gradient.sum())):
            return False
        rate = self.schedule.learning_rate(self.step)
        epoch = self.plan.step(self.step).epoch
        norm = self.adapter.update(rate)
        self.step += 1
        seconds = time.perf_counter() - self.began
        self.lines.append(
            {
                "step": self.step,
                "epoch": epoch,
                "loss": self.sums.loss,
                "learning_rate": rate,
                "grad_norm": norm,
                "tokens": self.sums.tokens,
                "labels": int(unit.labels),
                "tokens_per_second": self.sums.tokens / seconds,
                "step_seconds": seconds,
                "total_steps": self.total_steps,
            }
        )
        return True

    def _units_of_step(self) -> list[Unit]:
        """The examples of the next optimizer step, pack after pack, as many in a lane as it holds."""
        lengths, packs = self.data.train.lengths, self.plan.step(self.step).packs
        labels = max(1, int(self.data.train.trained_counts[[index for pack in packs for index in pack]].sum()))
        filled: list[list[int]] = []
        room = 0
        for pack in packs:
            size = int(lengths[list(pack)].sum())
            assert size <= self.lane_length, f"a pack of {size} tokens and lanes of {self.lane_length}"
            if size > room:
                filled.append([])
                room = self.lane_length
            filled[-1] += pack
            room -= size
        seed = self.recipe.train.seed
        return [
            Unit(tuple(examples), float(labels), dropout_seed(seed, self.step, number, 0), number == len(filled) - 1)
            for number, examples in enumerate(filled)
        ]
