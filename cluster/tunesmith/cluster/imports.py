"""Imports of large libraries, without what only costs time in them."""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def uncollected() -> Iterator[None]:
    """Put it around imports: the million objects that PyTorch and Transformers make all stay.

    Python looks through them again and again meanwhile, which is a fifth of the time that the imports take, and would in every
    full collection afterwards; what is there at the end of the block is left out of those.
    """
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        if was_enabled:
            gc.enable()


def switch_off_compiler() -> None:
    """Of PyTorch, in this process, unless its user has decided; call before PyTorch is imported.

    DeepSpeed's Muon and bitsandbytes compile functions when they are imported, which loads a compiler for a second or two.
    """
    os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")
