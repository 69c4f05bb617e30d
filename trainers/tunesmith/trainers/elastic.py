"""Runs whose number of workers changes: which numbers keep the global batch, and when it is worth having more. Pure.

A step has the same rows whatever the number of workers, cut into the same micro-batches; only who takes which one differs.
Their gradients are then summed in another order, so such a run is not bit-exact.
"""

from __future__ import annotations

from collections.abc import Sequence

from tunesmith.cluster.recipe.schema import Cluster, Recipe


def at(recipe: Recipe, world: int) -> Recipe:
    """The recipe as so many workers train it: each takes as many passes a step as keep the global batch.

    What is read of it counts as read of the recipe itself.
    """
    if not recipe.cluster.is_elastic:
        return recipe
    micro_batches = recipe.train.gradient_accumulation_steps * recipe.cluster.most_workers
    assert micro_batches % world == 0, f"{micro_batches} micro-batches a step do not go into {world} workers"
    cluster = recipe.cluster.model_copy(update={"workers": world})
    train = recipe.train.model_copy(update={"gradient_accumulation_steps": micro_batches // world})
    return recipe.model_copy(update={"cluster": cluster, "train": train})


def worlds(recipe: Recipe) -> list[int]:
    """Numbers of workers that the recipe may be trained with, ascending: of its range those that divide a step's micro-batches."""
    cluster: Cluster = recipe.cluster
    if isinstance(cluster.workers, int):
        return [cluster.workers]
    micro_batches = recipe.train.gradient_accumulation_steps * cluster.workers.max
    return [n for n in range(cluster.workers.min, cluster.workers.max + 1) if micro_batches % n == 0]


def largest(worlds: Sequence[int], room: int) -> int | None:
    """Most workers that there is room for; None when not even the fewest fit."""
    return max((world for world in worlds if world <= room), default=None)


def inexact(recipe: Recipe, world: int) -> str:
    """What the number of workers means for what is learned."""
    cluster, here = recipe.cluster, at(recipe, world)
    passes = here.train.gradient_accumulation_steps
    workers = f"{world} worker{'s' if world > 1 else ''} of at most {cluster.most_workers}"
    return (
        f"{workers}, each with {passes} pass{'es' if passes > 1 else ''} a step. A step has the same rows with any number of "
        "workers; a run whose number changes is equal to one whose number does not but for rounding, not bit for bit"
    )


class Growth:
    """Whether there has been room for more workers for long enough.

    Args:
        worlds: numbers of workers that may be.
        world: how many there are.
        after_s: how long there must be room for more.
    """

    def __init__(self, worlds: Sequence[int], world: int, after_s: float) -> None:
        self._worlds, self._world, self._after_s = worlds, world, after_s
        self._since: float | None = None

    @property
    def is_over(self) -> bool:
        """Whether there are as many as may be."""
        return self._world >= self._worlds[-1]

    def look(self, room: int, now: float) -> int | None:
        """How many workers to go on with instead; None while it is not time to change.

        Args:
            room: workers that would fit, those that there are included.
            now: seconds of a clock that only rises.
        """
        more = largest(self._worlds, room)
        if more is None or more <= self._world:
            self._since = None
            return None
        self._since = now if self._since is None else self._since
        return more if now - self._since >= self._after_s else None
