"""From a recipe, a model's shape and a fleet to what a worker will hold, how long a step takes and whether it fits."""

from __future__ import annotations

import gc
import os
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from multiprocessing import get_context
from typing import Any

import torch

from tunesmith.cluster.base import context_length
from tunesmith.cluster.errors import DataError, ResourceError
from tunesmith.cluster.fleet import GIB, Fleet
from tunesmith.cluster.recipe.schema import Full, Recipe
from tunesmith.trainers import head, zero
from tunesmith.trainers.memory import blank
from tunesmith.trainers.memory.geometry import Geometry
from tunesmith.trainers.memory.overhead import overhead
from tunesmith.trainers.memory.remembered import recall, remember
from tunesmith.trainers.memory.roofline import StepTime, Work, step_time
from tunesmith.trainers.memory.shard import ADAPTER, COPY, GATHERED, Engine, checkpoint_part, shard
from tunesmith.trainers.memory.simulate import (
    GRADIENTS,
    WEIGHTS,
    Keeping,
    ParameterKind,
    Shape,
    Simulation,
    add,
    difference,
    extrapolate,
    simulate_hf,
    simulate_policy,
)
from tunesmith.trainers.memory.tracker import ACTIVATIONS, Bytes

MOST_TOKENS = 2**31 - 1
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Prediction:
    """What one worker of a fleet will hold at its worst moment, in bytes, and how long a step takes.

    Attributes:
        windows: for each part of a step, bytes by cause at its worst moment.
        overhead: bytes beside PyTorch's allocations, by cause.
        capacity: bytes that the device has.
        workers: GPUs, or processes on CPUs.
        parameters, trainable, added: numbers in the model, in training, and brought by an adapter.
        host_copy: bytes of host memory beside a GPU that a save in the background takes.
    """

    windows: dict[str, Bytes]
    overhead: Bytes
    capacity: int
    workers: int
    parameters: int
    trainable: int
    added: int
    work: Work
    time: StepTime
    engine: Engine | None
    host_copy: int = 0
    checkpoint_mixed: bool = True
    whole_model: bool = True

    @property
    def worst(self) -> str:
        """The part of a step in which most is held."""
        return max(self.windows, key=lambda name: self.windows[name].total())

    @property
    def parts(self) -> Bytes:
        """Bytes by cause at the worst moment."""
        return Counter({cause: size for cause, size in self.windows[self.worst].items() if size > 0})

    @property
    def allocated(self) -> int:
        """Bytes of tensors at the worst moment."""
        return self.parts.total()

    @property
    def total(self) -> int:
        """Bytes that the device must have."""
        return self.allocated + self.overhead.total()

    @property
    def fits(self) -> bool:
        """Whether it fits the device."""
        return self.total <= self.capacity


@dataclass
class Planner:
    """Predicts variants of one recipe; what they have in common is simulated once.

    Args:
        model: the base's shape.
        fleet: the workers are its GPUs; on CPUs the recipe's own number.
        as_hf: whether the HF Trainer with PEFT does the work instead of our loop.
        max_length: tokens of a row, when the data has said something else than the recipe.
        alone: whether this process has no other threads, so that copies of it may work beside it.
    """

    model: Geometry
    fleet: Fleet
    as_hf: bool = False
    max_length: int | None = None
    alone: bool = False
    _simulations: dict[tuple[Any, ...], Simulation] = field(default_factory=dict)
    _label_differences: dict[tuple[Any, ...], Simulation] = field(default_factory=dict)
    _copies: Any = field(default=None, init=False)
    _begun: list[Any] = field(default_factory=list, init=False)

    def predict(self, recipe: Recipe, workers: int | None = None) -> Prediction:
        """What a worker will hold under this recipe, which says nothing by `auto` any more.

        Args:
            workers: instead of the fleet's.

        Raises:
            ModelError: no such model can be built, or the adaptation does not fit it.
        """
        on_gpu = not self.fleet.gpu.is_cpu
        workers = workers or self.workers(recipe)
        number_format = zero.precision(recipe, on_gpu)
        engine = engine_of(recipe, workers, on_gpu, self.as_hf)
        rows = recipe.train.rows
        length = self.length(recipe)
        if rows * length > MOST_TOKENS:
            raise ResourceError(
                f"{rows:,} rows of {length:,} tokens are {rows * length:,} at a time, more than the {MOST_TOKENS:,} that "
                "any kernel can count",
                "Lower train.per_device_train_batch_size.",
            )
        plain = self.as_hf and workers == 1 and recipe.cluster.zero in ("auto", 0)
        simulation = self._simulate(recipe, DTYPES[number_format], rows, length, None if plain else engine, on_gpu)
        windows = _unsharded(simulation) if plain else shard(simulation, engine)
        if self.as_hf and workers > 1 and engine.stage == 0:
            for parts in windows.values():  # the buckets of DistributedDataParallel are as large as the gradients
                parts[GRADIENTS] += simulation.trainable * engine.item
        copied = checkpoint_part(simulation.trainable, engine) if recipe.train.async_save and not self.as_hf else 0
        if copied and not on_gpu:
            for parts in windows.values():
                parts[COPY] += copied
        work = _work(recipe, simulation, self.model.config, engine, rows, length)
        fleet = self.fleet if workers == self.fleet.gpus or not on_gpu else _with(self.fleet, workers)
        worst = max(windows.values(), key=Counter.total)
        return Prediction(
            windows=windows,
            overhead=overhead(on_gpu, workers, worst[ACTIVATIONS], worst[GATHERED]),
            capacity=round(self.fleet.gpu.memory_gib * GIB),
            workers=workers,
            parameters=simulation.numbers(),
            trainable=simulation.trainable,
            added=simulation.numbers(lambda kind: kind.is_added),
            work=work,
            time=step_time(work, fleet),
            engine=None if plain else engine,
            host_copy=copied if on_gpu else 0,
            checkpoint_mixed=number_format != "fp32",
            whole_model=isinstance(recipe.adaptation, Full),
        )

    def begin(self, recipes: list[Recipe]) -> None:
        """Begins to simulate variants in copies of this process, if it is alone; `predict` then takes what they found.

        A variant that cannot be simulated is left for `predict` to say so.
        """
        if not self.alone or len(recipes) < 2:
            return
        blank.load_code(self.model.config)  # which the copies then have
        self._copies = self._copies or get_context("fork").Pool(os.cpu_count() or 1)
        self._begun += [self._copies.apply_async(_simulated_alone, (replace(self), recipe)) for recipe in recipes]

    def is_tight(self, recipe: Recipe) -> bool:
        """Whether weights, gradients and optimizer of all parameters alone fill half a device, by a rough count."""
        engine = engine_of(recipe, self.workers(recipe), not self.fleet.gpu.is_cpu, self.as_hf)
        shared = engine.workers if engine.stage == 3 else 1
        return 16 * blank.rough_parameters(self.model.config) / shared > 0.5 * self.fleet.gpu.memory_gib * GIB

    def end(self) -> None:
        """Ends what was begun and is not wanted any more."""
        if self._copies is not None:
            self._copies.terminate()
            self._copies = None
        self._begun.clear()

    def finish(self) -> None:
        """Waits for all that was begun."""
        for found in self._begun:
            found.wait()
            if found.successful():
                self._simulations |= found.get()
        self._begun.clear()

    def workers(self, recipe: Recipe) -> int:
        """Processes that train."""
        return recipe.cluster.most_workers if self.fleet.gpu.is_cpu else self.fleet.gpus

    def length(self, recipe: Recipe) -> int:
        """Tokens of a full row."""
        if self.max_length is not None:
            return self.max_length
        context, asked = context_length(dict(self.model.config)), recipe.data.max_length
        if context is None or asked <= context:
            return asked
        if "max_length" in recipe.data.model_fields_set:
            what = f"data.max_length: {asked:,} is more than the {context:,} tokens that {self.model.name} can take"
            raise DataError(what, f"Set it to {context} or less.")
        return context

    def _simulate(
        self, recipe: Recipe, dtype: torch.dtype, rows: int, length: int, engine: Engine | None, on_gpu: bool
    ) -> Simulation:
        keeping, passes = (engine.keeping, engine.passes) if engine else (None, 2)
        model, train = recipe.model, recipe.train
        key = (
            recipe.adaptation.model_dump_json(), recipe.objective.kind, model.quantization, model.attention,
            train.gradient_checkpointing, dtype, rows, length, keeping, passes,
        )  # fmt: skip
        if key in self._simulations:
            return self._simulations[key]
        config = dict(self.model.config)
        settings = [[str(part) for part in key], engine is None, self.as_hf, on_gpu, config]
        found = recall(settings)
        if found is None:

            def at(layers: int, labels: int) -> Simulation:
                shaped = blank.at_depth(config, layers)
                if self.as_hf:
                    return _of_hf(recipe, shaped, dtype, rows, length, keeping, engine)
                shape = Shape(Shape.full(rows, length).lengths, labels)
                return _of_ours(recipe, shaped, dtype, shape, engine, on_gpu)

            if not isinstance(recipe.adaptation, Full):
                import peft  # noqa: F401  # before fake tensors, which have stand-ins for parts of it
            from tunesmith.trainers import attention  # noqa: F401  # loads Transformers

            if not gc.isenabled():
                gc.freeze()  # what the imports made stays; looking through it takes a second
            gc.enable()  # storages in reference cycles must go as they do in a run
            depths, of_labels = (
                blank.sample_depths(config, recipe.adaptation),
                (type(recipe.adaptation), *key[1:4], *key[5:]),
            )
            labels = Shape.full(rows, length).labels
            found = self._any_size(at, blank.layers_of(config), depths, labels, of_labels)
            remember(settings, found)
        self._simulations[key] = found
        return found

    def _any_size(
        self,
        at: Callable[[int, int], Simulation],
        depth: int,
        depths: tuple[int, int] | None,
        labels: int,
        of_labels: tuple[Any, ...],
    ) -> Simulation:
        """The simulation of `depth` layers and so many labels, from ones of a few layers and two or three chunks of labels.

        Args:
            of_labels: what the memory of further labels depends on; it is simulated once for each.
        """
        first = depths[0] if depths else depth
        chunk = labels if self.as_hf else _chunk(self.model.config, labels)
        few = labels if labels <= 4 * chunk else 2 * chunk
        base = at(first, few)
        whole = base if depths is None else extrapolate(base, at(depths[1], few), depths, depth)
        if few == labels:
            return whole
        if of_labels not in self._label_differences:
            more = extrapolate(base, at(first, few + chunk), (few, few + chunk), labels)
            self._label_differences[of_labels] = difference(base, more)
        return add(whole, self._label_differences[of_labels])


def _simulated_alone(planner: Planner, recipe: Recipe) -> dict[tuple[Any, ...], Simulation]:
    planner.predict(recipe)
    return planner._simulations


def _chunk(config: Mapping[str, Any], labels: int) -> int:
    """Labels that the head scores at once."""
    return head.chunk_size(labels, blank.vocabulary_of(config))


def _of_ours(
    recipe: Recipe, config: dict[str, Any], dtype: torch.dtype, shape: Shape, engine: Engine | None, on_gpu: bool
) -> Simulation:
    from tunesmith.trainers.objectives import OBJECTIVES

    assert engine is not None, "our loop always runs on DeepSpeed"
    build = blank.our_policy(recipe, config, dtype, on_gpu)
    loss = OBJECTIVES[recipe.objective.kind]
    return simulate_policy(build, loss, shape, engine.keeping, engine.passes, blank.vocabulary_of(config))


def _of_hf(
    recipe: Recipe,
    config: dict[str, Any],
    dtype: torch.dtype,
    rows: int,
    length: int,
    keeping: Keeping | None,
    engine: Engine | None,
) -> Simulation:
    build = blank.hf_model(recipe, config, dtype, adapter_fp32=engine is None)
    return simulate_hf(build, rows, length, keeping, blank.vocabulary_of(config))


def _unsharded(simulation: Simulation) -> dict[str, Bytes]:
    """The windows of a model that one device holds whole."""
    added = simulation.bytes(lambda kind: kind.is_added)
    weights = Counter({WEIGHTS: simulation.bytes() - added + round(simulation.fixed_bytes), ADAPTER: added})
    return {name: parts + weights for name, parts in simulation.windows.items()}


def engine_of(recipe: Recipe, workers: int, on_gpu: bool, as_hf: bool = False) -> Engine:
    """How the recipe's engine holds weights, gradients and optimizer state."""
    number_format = zero.precision(recipe, on_gpu)
    cluster = recipe.cluster.model_copy(update={"workers": workers})
    stage = zero.stage(cluster) if as_hf else zero.engine_stage(cluster, number_format)
    assert cluster.offload != "auto", "the place of the optimizer is chosen before it is predicted"
    return Engine(
        stage=stage,
        workers=workers,
        item=4 if number_format == "fp32" else 2,
        optimizer=recipe.train.optimizer,
        offload=cluster.offload if on_gpu else "none",  # on a CPU, host memory is the device's own
        persistence_threshold=cluster.zero3_persistence_threshold,
        overlaps=on_gpu,
        accumulation=recipe.train.gradient_accumulation_steps,
        recomputes=bool(recipe.train.gradient_checkpointing),
    )


def _work(
    recipe: Recipe, simulation: Simulation, config: Mapping[str, Any], engine: Engine, rows: int, length: int
) -> Work:
    """What a step has to compute and move, for the roofline."""
    experts = next(
        (config[key] for key in ("num_local_experts", "num_experts", "n_routed_experts") if config.get(key)), 1
    )
    share = (config.get("num_experts_per_tok") or 1) / experts if experts > 1 else 1.0

    def active(kind: ParameterKind) -> float:
        return 0.0 if kind.role == "embedding" else share if kind.role == "expert" else 1.0

    counts = simulation.parameters.items()
    heads = int(config.get("num_attention_heads") or config.get("n_head") or 1)
    hidden = int(config.get("hidden_size") or config.get("n_embd") or 1)
    passes = recipe.train.gradient_accumulation_steps
    parameters = simulation.numbers()
    return Work(
        parameters=parameters,
        active=sum(kind.numbers * count * active(kind) for kind, count in counts),
        trainable=simulation.trainable,
        active_trainable=sum(kind.numbers * count * active(kind) for kind, count in counts if kind.is_trainable),
        layers=blank.layers_of(dict(config)),
        attention_width=heads * int(config.get("head_dim") or hidden // heads),
        context=length,
        tokens=rows * length * passes,
        passes=passes,
        zero_stage=engine.stage,
        gradient_checkpointing=bool(recipe.train.gradient_checkpointing),
        weight_bytes=simulation.bytes() / max(1, parameters),
        gradient_bytes=float(engine.item),
        offload_optimizer=engine.offload,
        offload_weights=engine.offload if engine.stage == 3 else "none",
    )


def _with(fleet: Fleet, workers: int) -> Fleet:
    """The fleet with another number of GPUs, in nodes as they are."""
    per_node = min(workers, fleet.gpus_per_node)
    return replace(fleet, nodes=max(1, -(-workers // per_node)), gpus_per_node=per_node)
