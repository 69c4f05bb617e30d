"""How much of a cluster a sweep takes: what its job asks the queue for."""

from __future__ import annotations

from typing import Any, cast

import pytest
from sweep_recipes import sweep_recipe

from tunesmith.cluster.resources import Need, Node
from tunesmith.tuning.sweep import Ground

NODES = [Node(cpus=16, gpus=4, name=name) for name in "ab"]
GRID = {"train.learning_rate": {"grid": [1e-4, 1e-3, 1e-2]}}


def ground(need: Need, why_isolated: str | None = "the recipe says so", **tune: Any) -> Ground:
    recipe = sweep_recipe(**tune)
    assert recipe.tune is not None
    unused = cast(Any, None)
    return Ground(recipe, recipe.tune, unused, unused, unused, unused, NODES, need, False, why_isolated)


@pytest.mark.parametrize(
    ("workers", "tune", "places", "in_all"),
    [
        (1, {}, 8, 8),  # all that fit
        (3, {}, 2, 6),  # 8 GPUs take two runs of three
        (1, {"concurrent": 3}, 3, 3),
        (2, {"concurrent": 3}, 3, 6),
        (1, {"trials": 5}, 5, 5),  # no more than there are
        (1, {"space": GRID, "searcher": "grid"}, 3, 3),
        (1, {"seeds": 3}, 2, 6),
        (2, {"seeds": 3}, 1, 6),
        (4, {"seeds": 3}, 1, 8),  # its seeds take turns
    ],
)
def test_trials_with_workers_of_their_own(workers: int, tune: dict[str, Any], places: int, in_all: int) -> None:
    made = ground(Need(workers, cpus=2, gpus=1), **tune)
    assert made.places == places
    assert made.whole == Need(in_all, cpus=2, gpus=1)


@pytest.mark.parametrize(
    ("workers", "tune", "in_all"), [(1, {}, 1), (4, {}, 4), (4, {"trials": 3}, 3), (2, {"concurrent": 8}, 2)]
)
def test_trials_that_share_a_base_take_its_workers_however_many_they_are(
    workers: int, tune: dict[str, Any], in_all: int
) -> None:
    assert ground(Need(workers, cpus=2, gpus=1), None, **tune).whole == Need(in_all, cpus=2, gpus=1)
