"""Watches every tensor storage live and die, real or fake, and remembers what was alive at the worst moment.

The same tracker runs on fake tensors, where it predicts, and on real ones, where it measures. It sees what PyTorch
operations return; memory that a kernel takes and gives back within one operation is not seen.
"""

from __future__ import annotations

import gc
import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

ACTIVATIONS = "activations"

_ASK_FOR_DEVICE = torch.ops.prim.device.default

Bytes = Counter[str]
"""Cause -> bytes."""


class MemoryTracker(TorchDispatchMode):
    """Within it, storages are counted from the operation that returns them until nothing refers to them.

    Args:
        recognise: the cause of a new tensor by its looks, or None.

    Attributes:
        live: bytes alive now, by cause.
        window: the current window of time.
        peaks: for each window of time the bytes by cause at the moment when most were alive in it.
    """

    def __init__(self, recognise: Callable[[Tensor], str | None] = lambda _tensor: None) -> None:
        super().__init__()
        self._recognise = recognise
        self.live: Bytes = Counter()
        self.peaks: dict[str, Bytes] = {}
        self.window = "start"
        self._cause = ACTIVATIONS
        self._total = 0
        self._highest: dict[str, int] = {}
        self._known: dict[int, tuple[weakref.ref[Any], str, int]] = {}

    @property
    def peak(self) -> Bytes:
        """What was alive at the worst moment of all windows."""
        return max(self.peaks.values(), key=lambda parts: parts.total(), default=Counter())

    def enter_window(self, name: str) -> None:
        """From now on peaks count for the window of this name, which may be entered again."""
        self.window = name
        self._note_peak()

    @contextmanager
    def causing(self, cause: str) -> Iterator[None]:
        """Within it new storages count for the cause."""
        before, self._cause = self._cause, cause
        try:
            yield
        finally:
            self._cause = before

    def claim(self, tensors: Iterable[Tensor], cause: str) -> None:
        """Counts the tensors' storages for the cause, whether they were known before or not."""
        for tensor in tensors:
            self._count(tensor, cause, is_claim=True)
        self._note_peak()

    def claim_everything_alive(self, cause: str) -> None:
        """Counts every tensor that Python can reach and that is not known yet for the cause."""
        for found in gc.get_objects():
            # `type`, not isinstance: asking a lazy module for its class would import it
            if issubclass(type(found), Tensor):
                self._count(found, cause)
                if found.is_leaf and found.grad is not None:
                    self._count(found.grad, cause)
        self._note_peak()

    def __torch_dispatch__(
        self, function: Any, types: Any, arguments: tuple[Any, ...] = (), options: dict[str, Any] | None = None
    ) -> Any:
        if function is _ASK_FOR_DEVICE:  # fake tensors ask many times an operation
            return arguments[0].fake_device
        result = function(*arguments, **(options or {}))
        for leaf in [result] if isinstance(result, Tensor) else tree_leaves(result):
            if isinstance(leaf, Tensor):
                self._count(leaf, self._cause if self._cause != ACTIVATIONS else self._recognise(leaf) or ACTIVATIONS)
        if self._total > self._highest.get(self.window, -1):
            self._note_peak()
        return result

    def _count(self, tensor: Tensor, cause: str, is_claim: bool = False) -> None:
        if tensor.device.type == "meta":  # a shape, without memory
            return
        try:
            storage = tensor.untyped_storage()
        except NotImplementedError:  # sparse and opaque tensors have none
            return
        key = storage._cdata
        known = self._known.get(key)
        size = storage.nbytes()
        if known is not None:
            if (known[1] == cause and known[2] == size) or (not is_claim and known[2] == size):
                return
            self._forget(key, known[0])
            cause = cause if is_claim else known[1]
        if not size:
            return
        reference = weakref.ref(storage, self._forgetter(key))
        self._known[key] = (reference, cause, size)
        self.live[cause] += size
        self._total += size

    def _forgetter(self, key: int) -> Callable[[weakref.ref[Any]], None]:
        return lambda reference: self._forget(key, reference)

    def _forget(self, key: int, reference: weakref.ref[Any]) -> None:
        known = self._known.get(key)
        if known is not None and known[0] is reference:
            del self._known[key]
            self.live[known[1]] -= known[2]
            self._total -= known[2]

    def _note_peak(self) -> None:
        if self._total > self._highest.get(self.window, -1):
            self._highest[self.window] = self._total
            self.peaks[self.window] = Counter({cause: size for cause, size in self.live.items() if size})
