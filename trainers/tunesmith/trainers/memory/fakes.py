"""What fake tensors cannot do by themselves, for the code of others that was not written for them."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

ATTENTION = "tunesmith_planned"


@contextmanager
def pretending() -> Iterator[None]:
    """Within it models and adapters can be built and run on fake tensors; enter it inside a `FakeTensorMode`."""
    replaced: list[tuple[Any, str, Any]] = [
        (nn.Module, "_apply", _apply),
        (torch, "block_diag", _block_diagonal),
        (FakeTensorMode, "__deepcopy__", _itself),
    ]
    if (boft := sys.modules.get("peft.tuners.boft.layer")) is not None:
        replaced.append((boft.BOFTLayer, "perm2mat", _permutation_matrix))
    saved = [(owner, name, getattr(owner, name, None)) for owner, name, _ in replaced]
    for owner, name, stand_in in replaced:
        setattr(owner, name, stand_in)
    code_tables = _code_tables()
    before = dict(code_tables)
    try:
        with _AnyValue():
            yield
    finally:
        for owner, name, original in saved:
            if original is None:
                delattr(owner, name)
            else:
                setattr(owner, name, original)
        code_tables.clear()  # a fake one must not be found by a real model
        code_tables.update(before)


def _code_tables() -> dict[str, Any]:
    """Tensors that bitsandbytes makes once and keeps."""
    functional: Any = sys.modules.get("bitsandbytes.functional")
    return {} if functional is None else functional.name2qmap


def _itself(mode: FakeTensorMode, _memo: dict[int, Any]) -> FakeTensorMode:
    """A copy of a fake tensor (LN tuning copies layers) lives in the same mode."""
    return mode


class _AnyValue(TorchDispatchMode):
    """Answers `.item()`, which fake tensors refuse: yes, 0 or 0.5.

    Adapters ask for values while they initialise (permutations, masks), and models whether all positions follow each
    other, in which case they leave out a mask. No size depends on the answer.
    """

    def __torch_dispatch__(
        self, function: Any, types: Any, arguments: tuple[Any, ...] = (), options: dict[str, Any] | None = None
    ) -> Any:
        if function is torch.ops.aten._grouped_mm.default and arguments[0].dtype == torch.float32:
            return _grouped_mm_of_fp32(function, arguments, options or {})
        try:
            return function(*arguments, **(options or {}))
        except DataDependentOutputException:
            asked = arguments[0].dtype
            return True if asked == torch.bool else 0.5 if asked.is_floating_point else 0


def _grouped_mm_of_fp32(function: Any, arguments: tuple[Any, ...], options: dict[str, Any]) -> Any:
    """The product of routed experts, which real CPU tensors compute in fp32 and fake ones refuse in all but bf16."""
    narrow = [part.bfloat16() if isinstance(part, Tensor) and part.is_floating_point() else part for part in arguments]
    return function(*narrow, **options).float()


def _apply(module: nn.Module, change: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
    """`nn.Module._apply`, which cannot swap fake parameters that something refers to."""
    for child in module.children() if recurse else ():
        child._apply(change)
    for parameter in module._parameters.values():
        if parameter is not None:
            with torch.no_grad():
                changed = change(parameter)
            if changed is not parameter:
                parameter.data = changed
    for name, buffer in module._buffers.items():
        if buffer is not None:
            module._buffers[name] = change(buffer)
    return module


def _permutation_matrix(_layer: nn.Module, indices: Tensor) -> Tensor:
    """PEFT's `BOFTLayer.perm2mat` writes its ones one by one, which takes fake tensors a minute."""
    return torch.zeros(len(indices), len(indices))


def _block_diagonal(*blocks: Tensor) -> Tensor:
    """`torch.block_diag` of equal blocks in one operation: of thousands of blocks (BOFT) it would take a minute."""
    result: Tensor = _BlockDiagonal.apply(*blocks)  # pyright: ignore[reportAssignmentType]
    return result


class _BlockDiagonal(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *blocks: Tensor) -> Tensor:
        ctx.like = blocks[0].shape
        ctx.count = len(blocks)
        rows, columns = blocks[0].shape
        return blocks[0].new_zeros(rows * len(blocks), columns * len(blocks))

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, ...]:
        return grad_outputs[0].new_zeros(ctx.count, *ctx.like).unbind(0)
