"""Which numbers of workers keep the global batch, and when a run grows."""

from __future__ import annotations

import signal
from typing import Any

import pytest

from tunesmith.cluster.errors import ResourceError, StoppedError, WorkerError
from tunesmith.cluster.events import Note
from tunesmith.cluster.recipe.schema import Recipe
from tunesmith.cluster.resources import Need, Node
from tunesmith.trainers.elastic import Growth, at, inexact, largest, worlds
from tunesmith.trainers.machines import Machines, still_good
from tunesmith.trainers.stopping import StopSignals


def recipe(workers: Any, accumulation: int = 1, **cluster: Any) -> Recipe:
    return Recipe.model_validate(
        {
            "name": "x",
            "model": {"base": "builtin:tiny"},
            "data": {"train": "a.jsonl"},
            "objective": "sft",
            "adaptation": "full",
            "train": {"gradient_accumulation_steps": accumulation},
            "cluster": {"workers": workers, **cluster},
        }
    )


@pytest.mark.parametrize(
    ("low", "high", "accumulation", "expected"),
    [(1, 2, 1, [1, 2]), (1, 8, 1, [1, 2, 4, 8]), (3, 8, 1, [4, 8]), (2, 8, 3, [2, 3, 4, 6, 8]), (5, 7, 1, [7])],
)
def test_only_numbers_that_divide_a_steps_micro_batches_are_used(
    low: int, high: int, accumulation: int, expected: list[int]
):
    elastic = recipe({"min": low, "max": high}, accumulation)
    assert worlds(elastic) == expected
    for world in expected:
        here = at(elastic, world)
        assert here.cluster.workers == world
        assert here.train.gradient_accumulation_steps * world == accumulation * high


def test_a_fixed_number_stays_as_it_is():
    fixed = recipe(3, 2)
    assert worlds(fixed) == [3]
    assert at(fixed, 3) is fixed


def test_what_is_read_of_the_recipe_at_a_size_is_read_of_the_recipe():
    elastic = recipe({"min": 1, "max": 2}, 4)
    elastic.forget_reads()
    here = at(elastic, 1)
    assert "train.seed" not in elastic.read_keys()
    assert here.train.seed == 42
    assert "train.seed" in elastic.read_keys()


def test_it_is_said_that_a_run_of_changing_size_is_not_bit_exact():
    said = inexact(recipe({"min": 1, "max": 2}, 4), 1)
    assert "1 worker of at most 2, each with 8 passes a step" in said
    assert "not bit for bit" in said


def test_the_largest_number_that_fits():
    assert [largest([2, 4, 8], room) for room in (1, 2, 3, 7, 8, 100)] == [None, 2, 2, 4, 8, 8]


def test_room_that_comes_and_goes_changes_nothing_and_room_that_stays_is_used():
    growth = Growth([1, 2, 4], 1, after_s=10)
    assert not growth.is_over
    looks = [(0, 1), (5, 2), (9, 2), (12, 1), (13, 3), (22, 2), (23, 4)]
    assert [growth.look(room, now) for now, room in looks] == [None] * 6 + [4]
    assert Growth([1, 2, 4], 4, after_s=10).is_over


class Cluster:
    """What a session says of the nodes that stay, which change from look to look; the last look stays."""

    def __init__(self, *looks: tuple[list[Node], list[Node]]) -> None:
        self.looks = list(looks)

    def staying_nodes(self) -> list[Node]:
        return self.looks[0][0]

    def free_nodes(self) -> list[Node]:
        return self.looks.pop(0)[1] if len(self.looks) > 1 else self.looks[0][1]


def of(cluster: Any, sizes: list[int], wait_s: float = 60) -> Machines:
    return Machines(Need(sizes[-1], cpus=1), sizes, cluster, wait_s, 60, StopSignals("run"), places={})


def wait(cluster: Any, sizes: list[int], wait_s: float = 60, said: list[Any] | None = None) -> int:
    return of(cluster, sizes, wait_s).wait(said.append if said is not None else lambda _: None).workers


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tunesmith.trainers.machines.POLL_S", 0.001)
    monkeypatch.setattr("tunesmith.trainers.machines.RELEASE_S", 0.05)
    monkeypatch.setattr("tunesmith.trainers.machines.SOON_POLL_S", 0.001)
    monkeypatch.setattr("tunesmith.trainers.machines.RETRY_S", 0.05)


ONE, TWO, THREE = [Node(1)], [Node(1)] * 2, [Node(1)] * 3


def test_an_attempt_begins_at_once_with_as_many_as_fit():
    assert wait(Cluster((TWO, TWO)), [1, 2]) == 2
    assert wait(Cluster((ONE, ONE)), [1, 2]) == 1


def test_what_the_last_attempt_still_holds_is_waited_for_but_not_what_others_hold():
    assert wait(Cluster((TWO, ONE), (TWO, TWO)), [1, 2]) == 2
    assert wait(Cluster((TWO, ONE)), [1, 2]) == 1


def test_a_fixed_number_is_asked_for_when_the_last_attempt_has_let_go_or_others_keep_the_room():
    cluster = Cluster((TWO, []), (TWO, ONE), (TWO, TWO))
    assert wait(cluster, [2]) == 2
    assert cluster.looks == [(TWO, TWO)], "asked for while Ray would have found no room"
    assert wait(Cluster((TWO, ONE)), [2]) == 2
    assert wait(Cluster((TWO, ONE)), [2], wait_s=0) == 2
    with pytest.raises(WorkerError, match="2 workers × 1 CPU = 2 CPUs; this machine has 1"):
        wait(Cluster((ONE, ONE)), [2], wait_s=0.02)


def test_room_that_cannot_be_used_is_told():
    said: list[Any] = []
    assert wait(Cluster((THREE, THREE)), [1, 2, 4], said=said) == 2
    assert [type(event) for event in said] == [Note]
    assert "room for 3 workers, and 2 are used" in said[0].text


def test_too_little_for_the_fewest_is_waited_for_and_then_an_error_with_the_numbers():
    assert wait(Cluster((ONE, ONE), (TWO, TWO)), [2, 4]) == 2
    with pytest.raises(WorkerError, match="2 workers × 1 CPU = 2 CPUs; this machine has 1"):
        wait(Cluster((ONE, ONE)), [2, 4], wait_s=0.02)
    with pytest.raises(WorkerError, match="room for 1 workers, and the run needs 2; others use the rest"):
        wait(Cluster((TWO, ONE)), [2, 4], wait_s=0.02)


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"cluster": {"workers": {"min": 2, "max": 2}}}, "write `workers: 2`"),
        (
            {"cluster": {"workers": {"min": 1, "max": 2}, "zero": 2, "offload": "cpu"}},
            "does not go with cluster.offload: cpu",
        ),
        ({"cluster": {"workers": {"min": 1, "max": 2}}, "train": {"optimizer": "adamw_8bit"}}, "adamw_8bit"),
    ],
)
def test_what_cannot_be_elastic_is_refused(changed: dict[str, Any], said: str):
    whole = recipe(1).model_dump(exclude_unset=True)
    with pytest.raises(ValueError, match=said):
        Recipe.model_validate(whole | changed)


def test_a_signal_ends_the_wait_for_machines():
    machines = of(Cluster((ONE, ONE)), [2, 4])
    machines.signals.received = signal.SIGTERM
    with pytest.raises(StoppedError, match="it was waiting for machines, and no worker was at work"):
        machines.wait(lambda _: None)


class LostCluster:
    """A session whose cluster can be joined at the last of so many tries."""

    local = False

    def __init__(self, tries: int) -> None:
        self.tries, self.closed = tries, 0

    def nodes(self) -> list[Node]:
        self.tries -= 1
        if self.tries:
            raise ResourceError("no Ray cluster could be joined at head:6379: nothing answers there")
        return ONE

    def close(self) -> None:
        self.closed += 1


def test_a_cluster_that_is_lost_is_left_and_waited_for():
    cluster, said = LostCluster(tries=3), []
    machines = of(cluster, [1])
    machines.places = {"gone": 1}
    machines.rejoin(said.append)
    assert machines.nodes_for(machines.need) == [], "Ray chooses after a loss"
    assert cluster.closed == 3, "left, and not joined by halves"
    assert [event.text for event in said] == [
        "waiting up to 60 s for the cluster: no Ray cluster could be joined at head:6379: nothing answers there"
    ]


def test_a_cluster_that_does_not_come_back_is_an_error_with_what_to_do():
    with pytest.raises(WorkerError, match="after 0 s no Ray cluster could be joined at head:6379") as error:
        of(LostCluster(tries=10**9), [1], wait_s=0.02).rejoin(lambda _: None)
    assert "the same command goes on" in error.value.fix


def test_workers_stay_where_they_were_placed_while_all_of_their_nodes_are_there():
    places = {"a": 2, "b": 1}
    assert still_good(places, 3, {"a", "b", "c"}) == ["a", "a", "b"]
    assert still_good(places, 3, {"a", "c"}) == []
    assert still_good(places, 2, {"a", "b", "c"}) == []
