"""A training step on fake tensors: every allocation of the real one, in its order, without weights or a device.

The model is the one the run would build, at a few layers; what was alive at the worst moment of each part of the step is
a straight line in the number of layers, so a few of them give any number exactly (see `extrapolate`).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from tunesmith.cluster.errors import ModelError
from tunesmith.trainers.batch import Batch, Forest
from tunesmith.trainers.memory.fakes import pretending
from tunesmith.trainers.memory.tracker import ACTIVATIONS, Bytes, MemoryTracker
from tunesmith.trainers.moe import moe_blocks

Keeping = Literal["kept", "freed"]
"""What the engine does with a gradient that backward has made: keeps it, or moves it to a buffer at once."""

WEIGHTS, GRADIENTS, OPTIMIZER, LOGITS = "weights", "gradients", "optimizer state", "logits"
AFTER = "after backward"
"""The window in which the loss is still there and activations are not."""


MOST_SEGMENTS = 32
"""Of a simulated micro-batch."""


@dataclass(frozen=True)
class Shape:
    """Of one micro-batch.

    Attributes:
        lengths: tokens of each segment in the packed row.
        labels: labelled tokens.
    """

    lengths: tuple[int, ...]
    labels: int

    @property
    def tokens(self) -> int:
        return sum(self.lengths)

    @staticmethod
    def full(rows: int, length: int) -> Shape:
        """The largest micro-batch there can be: every row full, every token but the first of a row a label.

        Of very many rows some lie together in one segment: they take the same memory, and a loop over segments less time.
        """
        together = -(-rows // MOST_SEGMENTS)
        lengths = (length * together,) * (rows // together)
        rest = (length * (rows % together),) if rows % together else ()
        return Shape(lengths + rest, rows * (length - 1))


class ParameterKind(NamedTuple):
    """What parameters of one size have in common."""

    elements: int
    """Elements of each as they are stored."""
    numbers: int
    """Numbers that each stands for: four 4-bit ones fit an element of 16 bits."""
    item: int
    """Bytes of an element."""
    is_trainable: bool
    is_added: bool
    """Whether an adapter has brought it."""
    is_matrix: bool
    """Whether it has two dimensions or more: weight decay, and so a group of its own, is for these."""
    role: str
    """`embedding` or `head` for one that nothing else uses, `expert`, else `body`."""


@dataclass
class Simulation:
    """What a step of a model of some depth allocates on one device, before anything is sharded.

    Attributes:
        windows: for each part of the step, bytes by cause when most were alive; weights left out.
        parameters: how many there are of each kind, shared ones once.
        fixed_bytes: of what is no parameter: buffers, and the scales of quantised weights.
        largest: elements of the largest parameter, or of all experts of a block, which ZeRO-3 gathers as one.
    """

    windows: dict[str, Bytes] = field(default_factory=dict)
    parameters: dict[ParameterKind, float] = field(default_factory=dict)
    fixed_bytes: float = 0
    largest: int = 0

    def elements(self, chosen: Callable[[ParameterKind], bool] = lambda _kind: True) -> int:
        """Elements of the parameters of the chosen kinds."""
        return round(sum(kind.elements * count for kind, count in self.parameters.items() if chosen(kind)))

    def bytes(self, chosen: Callable[[ParameterKind], bool] = lambda _kind: True) -> int:
        """Bytes of the parameters of the chosen kinds."""
        return round(sum(kind.elements * kind.item * count for kind, count in self.parameters.items() if chosen(kind)))

    @property
    def trainable(self) -> int:
        """Elements that are trained."""
        return self.elements(lambda kind: kind.is_trainable)

    def numbers(self, chosen: Callable[[ParameterKind], bool] = lambda _kind: True) -> int:
        """Parameters as papers count them, of the chosen kinds."""
        return round(sum(kind.numbers * count for kind, count in self.parameters.items() if chosen(kind)))


def extrapolate(near: Simulation, far: Simulation, at: tuple[int, int], to: int) -> Simulation:
    """The simulation of another size, on the straight line through two.

    Of layers: in a window every moment's memory is linear in the depth with one slope, so its worst moment is the same at
    any depth and the line through its peaks is exact; windows of middle layers lie between those of the first and last.
    Of labels, likewise: the head scores them in chunks of one size, and keeps as much for each.
    """
    factor = (to - at[0]) / (at[1] - at[0])
    return _combine(_with_last_layer(near, far), far, lambda low, high: low + (high - low) * factor)


def _with_last_layer(near: Simulation, far: Simulation) -> Simulation:
    """Of one layer, which counts as the first: what the last would hold, which grows with the depth as the head does."""
    windows = dict(near.windows)
    for part in ("forward", "backward"):
        last, head = f"{part} last layer", f"{part} head"
        if last in far.windows and last not in windows:
            windows[last] = Counter(far.windows[last])
            windows[last].subtract(far.windows[head])
            windows[last].update(near.windows[head])
    return replace(near, windows=windows)


def difference(one: Simulation, other: Simulation) -> Simulation:
    """What the second has more than the first, of labels: the first layer and the last hold the same of them."""
    more = _combine(one, other, lambda low, high: high - low)
    for part in ("forward", "backward"):
        if (first := more.windows.get(f"{part} first layer")) is not None:
            more.windows.setdefault(f"{part} last layer", first)
    return more


def add(simulation: Simulation, more: Simulation) -> Simulation:
    """A simulation and a difference."""
    return _combine(simulation, more, lambda one, other: one + other)


def _combine(one: Simulation, other: Simulation, how: Callable[[float, float], float]) -> Simulation:
    def each(left: Mapping[Any, float], right: Mapping[Any, float]) -> dict[Any, float]:
        return {key: how(left.get(key, 0), right.get(key, 0)) for key in left.keys() | right.keys()}

    windows = {
        name: Counter({cause: round(size) for cause, size in each(one.windows[name], other.windows[name]).items()})
        for name in one.windows.keys() & other.windows.keys()
    }
    return Simulation(
        windows,
        each(one.parameters, other.parameters),
        how(one.fixed_bytes, other.fixed_bytes),
        max(one.largest, other.largest),
    )


def simulate_policy(
    build: Callable[[], nn.Module],
    loss: Callable[[Tensor, Batch], tuple[Tensor, Any]],
    shape: Shape,
    keeping: Keeping,
    passes: int = 2,
    vocabulary: int = 0,
) -> Simulation:
    """Micro-batches of our own loop: the label-only head, packed rows, gradients as the engine keeps them.

    Args:
        build: makes the policy; called with fake tensors switched on.
        loss: the objective.
        passes: micro-batches before the gradients are used up; a second one finds those of the first.
        vocabulary: width of the logits, to tell them from other activations.
    """
    from tunesmith.trainers.policy import score

    with _tracked(vocabulary) as tracker:
        with tracker.causing(WEIGHTS):
            policy = build()
        policy.train()
        batch = _batch(shape)
        _watch_gradients(policy, tracker, keeping)
        windows = _Windows(tracker, policy)
        for _ in range(passes):
            windows.forward()
            logps, aux_loss = score(policy, batch)
            total, _metrics = loss(logps, batch)
            total = total if aux_loss is None else total + aux_loss
            windows.backward()
            total.backward()
            tracker.enter_window(AFTER)
            del logps, aux_loss, _metrics, total  # not before: the loop holds them too
        return _result(policy, tracker)


def simulate_hf(
    build: Callable[[], nn.Module], rows: int, length: int, keeping: Keeping | None, vocabulary: int = 0
) -> Simulation:
    """Two steps of the HF Trainer: padded rows, whole logits, and AdamW over every parameter at once.

    Args:
        keeping: what DeepSpeed does with gradients; None without it: then the optimizer's own step is simulated too.
    """
    with _tracked(vocabulary) as tracker:
        with tracker.causing(WEIGHTS):
            model: Any = build()
        model.train()
        tokens = torch.ones(rows, length, dtype=torch.long)
        _watch_gradients(model, tracker, keeping or "kept")
        windows = _Windows(tracker, model)
        trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
        optimizer = torch.optim.AdamW(trainable, lr=1e-4, foreach=True) if keeping is None else None
        for _ in range(2):
            windows.forward()
            outputs = model(input_ids=tokens, labels=tokens, use_cache=False)
            windows.backward()
            outputs.loss.backward()  # the logits stay alive with the outputs, as in most training loops
            del outputs
            if optimizer is not None:
                tracker.enter_window("step")
                with tracker.causing(OPTIMIZER):
                    optimizer.step()
                optimizer.zero_grad()
        return _result(model, tracker)


@contextmanager
def _tracked(vocabulary: int) -> Iterator[MemoryTracker]:
    def recognise(tensor: Tensor) -> str | None:
        return LOGITS if tensor.ndim > 1 and tensor.shape[-1] == vocabulary else None

    tracker = MemoryTracker(recognise)
    with ExitStack() as stack:
        stack.enter_context(FakeTensorMode(allow_non_fake_inputs=True))  # tables that bitsandbytes keeps
        stack.enter_context(pretending())
        stack.enter_context(tracker)
        yield tracker


class _Windows:
    """Opens the tracker's windows at the borders of a step's parts."""

    def __init__(self, tracker: MemoryTracker, model: nn.Module) -> None:
        self._tracker = tracker
        self._is_forward = True
        layers = decoder_layers(model)
        last = len(layers) - 1
        for index, layer in enumerate(layers):
            name = "first layer" if index == 0 else "last layer" if index == last else "middle layers"
            layer.register_forward_pre_hook(self._opener(f"forward {name}"))
            layer.register_forward_hook(self._at_end(name, is_last=index == last))
        _causal_lm(model).get_output_embeddings().register_forward_pre_hook(self._opener("forward logits"))

    def forward(self) -> None:
        self._is_forward = True
        self._tracker.enter_window("forward embedding")

    def backward(self) -> None:
        self._is_forward = False
        self._tracker.enter_window("backward head")

    def _opener(self, name: str) -> Callable[..., None]:
        def enter(*_: Any) -> None:
            if self._is_forward:  # a checkpointed layer runs again in the backward pass
                self._tracker.enter_window(name)

        return enter

    def _at_end(self, name: str, is_last: bool) -> Callable[..., None]:
        def enter(_module: nn.Module, _inputs: Any, output: Any) -> None:
            if not self._is_forward:
                return
            hidden = output[0] if isinstance(output, tuple) else output
            if hidden.requires_grad:
                hidden.register_hook(lambda _gradient: self._tracker.enter_window(f"backward {name}"))
            if is_last:
                self._tracker.enter_window("forward head")

        return enter


def decoder_layers(model: nn.Module) -> nn.ModuleList:
    """The model's layers: its longest list of modules with parameters, experts aside."""
    lists = [module for module in model.modules() if isinstance(module, nn.ModuleList) and len(module)]
    named = [module for module in lists if hasattr(module[0], "self_attn") or hasattr(module[0], "attn")]
    if not named:
        kind = type(_causal_lm(model)).__name__
        raise ModelError(f"model.base: {kind} has no list of layers with attention", "Choose a causal language model.")
    return max(named, key=len)


def _watch_gradients(model: nn.Module, tracker: MemoryTracker, keeping: Keeping) -> None:
    """Does with each gradient what the engine does, as soon as it is whole."""

    def arrived(parameter: Tensor) -> None:
        gradient = parameter.grad
        assert gradient is not None, "a hook on gradients ran without one"
        if tracker.window == "backward head":
            tracker.enter_window("reduce head")
        if keeping == "freed":
            parameter.grad = None
        else:
            tracker.claim([gradient], GRADIENTS)

    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.register_post_accumulate_grad_hook(arrived)


def _batch(shape: Shape) -> Batch:
    forest = Forest.flat(list(shape.lengths))
    return Batch(
        input_ids=torch.ones(shape.tokens, dtype=torch.long),
        position_ids=torch.ones(shape.tokens, dtype=torch.long),
        forest=forest,
        label_positions=torch.ones(shape.labels, dtype=torch.long),
        targets=torch.ones(shape.labels, dtype=torch.long),
        weights=torch.ones(shape.labels),
        normalizer=1.0,
        examples=(),
    )


def _result(model: nn.Module, tracker: MemoryTracker) -> Simulation:
    named = {p.untyped_storage()._cdata: (name, p) for name, p in model.named_parameters()}
    roles = _roles(model)
    kinds = Counter(_kind(name, p, roles.get(key, "body")) for key, (name, p) in named.items())
    held = tracker.live[WEIGHTS]
    windows = {}
    for name, parts in tracker.peaks.items():
        if name not in ("start", "forward middle layers", "backward middle layers"):
            windows[name] = Counter({cause: size for cause, size in parts.items() if cause != WEIGHTS})
            windows[name][ACTIVATIONS] += parts[WEIGHTS] - held
    own = sum(p.untyped_storage().nbytes() for _, p in named.values())
    blocks = [sum(p.numel() for p in block.parameters()) for block in moe_blocks(model)]
    return Simulation(windows, dict(kinds), held - own, max([p.numel() for _, p in named.values()] + blocks))


def _kind(name: str, parameter: Tensor, role: str) -> ParameterKind:
    is_packed = getattr(parameter, "quant_state", None) is not None
    size = parameter.element_size()
    numbers = parameter.numel() * size * 2 if is_packed else parameter.numel()
    is_matrix = parameter.ndim >= 2
    return ParameterKind(parameter.numel(), numbers, size, parameter.requires_grad, _is_added(name), is_matrix, role)


def _roles(model: Any) -> dict[int, str]:
    """Storage -> `embedding` or `head`, for weights that only one of the two uses."""
    causal_lm = _causal_lm(model)
    embedding, head = (
        {p.untyped_storage()._cdata for p in module.parameters()} if isinstance(module, nn.Module) else set()
        for module in (causal_lm.get_input_embeddings(), causal_lm.get_output_embeddings())
    )
    experts = {
        p.untyped_storage()._cdata: "expert"
        for block in moe_blocks(model)
        for name, p in block.named_parameters()
        if "expert" in name
    }
    return experts | {key: "embedding" for key in embedding - head} | {key: "head" for key in head - embedding}


def _causal_lm(model: Any) -> Any:
    """The Transformers model inside a policy, or inside PEFT's wrapper."""
    inner = getattr(model, "causal_lm", model)
    return inner.get_base_model() if hasattr(inner, "get_base_model") else inner


def _is_added(name: str) -> bool:
    """Whether a parameter's name is one that PEFT gives; its wrappers of the base's own parameters keep theirs."""
    return "base_layer" not in name and (".default" in name or "prompt_encoder" in name or "word_embeddings" in name)
