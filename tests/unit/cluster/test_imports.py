"""Imports that no search for garbage interrupts."""

from __future__ import annotations

import gc

from tunesmith.cluster.imports import uncollected


def test_garbage_is_left_alone_within_and_looked_for_again_afterwards() -> None:
    assert gc.isenabled()
    try:
        with uncollected():
            assert not gc.isenabled()
        assert gc.isenabled()
        assert gc.get_freeze_count() > 1000, "what is there is left out of later searches"
    finally:
        gc.unfreeze()


def test_who_looks_for_none_goes_on_so() -> None:
    gc.disable()
    try:
        with uncollected():
            pass
        assert not gc.isenabled()
    finally:
        gc.enable()
        gc.unfreeze()
