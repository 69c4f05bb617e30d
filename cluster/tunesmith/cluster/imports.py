"""Imports of large libraries, without a search for garbage among what they make."""

from __future__ import annotations

import gc
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
