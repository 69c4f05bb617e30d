"""Imports without what only costs time in them."""

from __future__ import annotations

import gc
import os

import pytest

from tunesmith.cluster.imports import switch_off_compiler, uncollected


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


def test_the_compiler_is_off_unless_its_user_has_decided(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCHDYNAMO_DISABLE", "0")
    switch_off_compiler()
    assert os.environ["TORCHDYNAMO_DISABLE"] == "0"
    monkeypatch.delenv("TORCHDYNAMO_DISABLE")
    switch_off_compiler()
    assert os.environ["TORCHDYNAMO_DISABLE"] == "1"
