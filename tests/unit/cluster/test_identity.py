from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tunesmith.cluster.errors import ChangedError
from tunesmith.cluster.identity import Identity, refuse_changes


def _identity(data: dict[str, str] | None = None, **changes: Any) -> Identity:
    recipe: dict[str, Any] = {
        "name": "bot",
        "model": {"base": "builtin:tiny"},
        "data": {"train": [{"path": "a.jsonl", "weight": None}]},
        "train": {"learning_rate": 2e-4, "save_steps": 100},
        "cluster": {"workers": 2, "zero": 2},
        "output": {"dir": "runs"},
    }
    for key, value in changes.items():
        section, _, name = key.partition("__")
        recipe[section][name] = value
    return Identity(recipe=recipe, data=data or {"a.jsonl": "1" * 64}, base="b" * 64)


def test_the_same_run_may_go_on(tmp_path: Path) -> None:
    saved = _identity()
    saved.save(tmp_path / "run.json")
    assert Identity.load(tmp_path / "run.json") == saved
    refuse_changes(Identity.load(tmp_path / "run.json"), _identity(), allow_change=False)


def test_keys_that_do_not_change_what_is_trained_may_change() -> None:
    refuse_changes(
        _identity(), _identity(train__save_steps=5, train__async_save=True, output__dir="elsewhere"), allow_change=False
    )


def test_every_changed_key_and_file_is_named_with_both_values() -> None:
    now = _identity({"a.jsonl": "2" * 64, "b.jsonl": "3" * 64}, train__learning_rate=1e-4, train__seed=7)
    with pytest.raises(ChangedError) as caught:
        refuse_changes(_identity(), now, allow_change=False)
    message = str(caught.value)
    assert "train.learning_rate: 0.0002 → 0.0001" in message
    assert "train.seed: (not there) → 7" in message
    assert "data file a.jsonl: sha256 111111111111… → sha256 222222222222…" in message
    assert "data file b.jsonl: (not there) → sha256 333333333333…" in message
    assert "--allow-change" in message


def test_a_key_in_a_list_of_sources_is_named() -> None:
    now = _identity(data__train=[{"path": "a.jsonl", "weight": 0.5}])
    with pytest.raises(ChangedError, match=r"data\.train\.0\.weight: None → 0\.5"):
        refuse_changes(_identity(), now, allow_change=False)


def test_another_base_model_is_a_change() -> None:
    now = _identity().model_copy(update={"base": "c" * 64})
    with pytest.raises(ChangedError, match="base model builtin:tiny: sha256 bbbbbbbbbbbb… → sha256 cccccccccccc…"):
        refuse_changes(_identity(), now, allow_change=False)


def test_who_insists_may_change_all_but_the_layout_of_the_shards() -> None:
    refuse_changes(_identity(), _identity(train__learning_rate=1e-4), allow_change=True)
    with pytest.raises(ChangedError, match=r"cannot change:\n  cluster\.workers: 2 → 4"):
        refuse_changes(_identity(), _identity(cluster__workers=4, train__learning_rate=1.0), allow_change=True)
    refuse_changes(_identity(), _identity(cluster__workers=4), allow_change=True, checkpoint_exists=False)


def test_the_workers_of_a_run_that_is_elastic_now_may_change() -> None:
    elastic = _identity(cluster__workers={"min": 1, "max": 2})
    refuse_changes(elastic, _identity(cluster__workers={"min": 2, "max": 2}), allow_change=False)
    with pytest.raises(ChangedError, match=r"cluster\.workers\.max: 2 → 4"):
        refuse_changes(elastic, _identity(cluster__workers={"min": 1, "max": 4}), allow_change=False)
    refuse_changes(_identity(), elastic, allow_change=True)
    with pytest.raises(ChangedError, match=r"cannot change:\n  cluster\.workers: \(not there\) → 2"):
        refuse_changes(elastic, _identity(), allow_change=True)
