"""What fake tensors cannot do by themselves, for the code of others that was not written for them."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
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
        (torch, "sparse_coo_tensor", _sparse),
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
    """Answers what fake tensors refuse because it depends on numbers: `.item()` and `nonzero`.

    Adapters ask while they initialise (permutations, masks) and check themselves, and models ask whether all positions
    follow each other, in which case they leave out a mask. All is true, nothing exceptional is anywhere, a number is 0 or
    0.5. A mask has as many ones as were scattered into it (SHiRA), and is full otherwise.
    """

    def __init__(self) -> None:
        super().__init__()
        self._scattered: dict[int, int] = {}

    def __torch_dispatch__(
        self, function: Any, types: Any, arguments: tuple[Any, ...] = (), options: dict[str, Any] | None = None
    ) -> Any:
        aten = torch.ops.aten
        if function is aten.nonzero.default:
            return self._places(arguments[0])
        if function is aten.index.Tensor:
            arguments = (arguments[0], self._without_masks(arguments[1]), *arguments[2:])
        if function in (aten.scatter_.src, aten.scatter_.value, aten.scatter.src, aten.scatter.value):
            self._scattered[arguments[0].numel()] = arguments[2].numel()
        try:
            result = function(*arguments, **(options or {}))
        except DataDependentOutputException:
            asked = arguments[0]
            if asked.dtype == torch.bool:
                return not hasattr(asked, "is_of_exceptions")
            return 0.5 if asked.dtype.is_floating_point else 0
        if function in (aten.any.default, aten.any.dim, aten.any.dims):
            result.is_of_exceptions = True
        return result

    def _places(self, mask: Tensor) -> Tensor:
        """Indices [N, dimensions] of the mask's ones."""
        count = self._scattered.get(mask.numel(), mask.numel())
        return mask.new_empty(count, mask.ndim, dtype=torch.int64)

    def _without_masks(self, indices: Sequence[Tensor | None]) -> list[Tensor | None]:
        """Boolean masks as the indices that they stand for."""
        plain: list[Tensor | None] = []
        for index in indices:
            is_mask = index is not None and index.dtype == torch.bool
            plain += self._places(index).unbind(1) if is_mask and index is not None else (index,)
        return plain


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


def _sparse(_indices: Tensor, values: Tensor, size: Any, **_: Any) -> Tensor:
    """`torch.sparse_coo_tensor` (SHiRA) as a dense tensor without memory; sparse fake ones have no gradient."""
    result: Tensor = _Sparse.apply(values, tuple(size))  # pyright: ignore[reportAssignmentType]
    return result


class _Sparse(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: Tensor, size: tuple[int, ...]) -> Tensor:
        ctx.like = values.shape
        return values.new_zeros(1).expand(size)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        return grad_outputs[0].new_zeros(ctx.like), None


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
