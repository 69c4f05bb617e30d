"""Placement arithmetic: what workers get, and the message when machines do not have it."""

from __future__ import annotations

import pytest

from tunesmith.cluster.errors import ResourceError
from tunesmith.cluster.recipe.schema import Cluster
from tunesmith.cluster.resources import Need, Node, needs, require_resources, this_machine


@pytest.mark.parametrize(
    ("workers", "cores", "each"),
    [(1, 8, 8), (2, 8, 4), (3, 8, 2), (2, 2, 1), (4, 2, 1)],
)
def test_workers_share_the_cores_and_get_at_least_one(workers: int, cores: int, each: int):
    assert needs(Cluster(workers=workers), [Node(cores)]).cpus == each


def test_written_cpus_are_taken_as_written():
    assert needs(Cluster(workers=4, cpus_per_worker=0.5), [Node(2)]).cpus == 0.5


def test_workers_on_several_gpu_nodes_share_the_cores_of_their_own_node():
    need = needs(Cluster(workers=16), [Node(64, gpus=8), Node(64, gpus=8), Node(128)])
    assert need == Need(workers=16, cpus=8, gpus=1)


def test_a_gpu_worker_always_asks_for_cpus_too():
    assert Need(1, cpus=4, gpus=1, memory_gib=2).ray_resources() == {"CPU": 4, "GPU": 1, "memory": 2 * 2**30}


def test_too_few_cpus_are_refused_with_the_arithmetic_and_what_would_fit():
    with pytest.raises(ResourceError) as error:
        require_resources(Need(4, cpus=1), [Node(2)])
    assert error.value.what == "4 workers × 1 CPU = 4 CPUs; this machine has 2"
    assert "cluster.workers: 2" in error.value.fix
    assert "cluster.cpus_per_worker: 0.5" in error.value.fix
    assert error.value.exit_code == 2


def test_what_the_message_advises_fits():
    require_resources(Need(4, cpus=0.5), [Node(2)])
    require_resources(Need(2, cpus=1), [Node(2)])


def test_too_few_gpus_and_too_little_memory_are_refused_with_the_numbers():
    with pytest.raises(ResourceError, match="8 workers × 1 GPU = 8 GPUs; the cluster's 2 nodes have 4"):
        require_resources(Need(8, cpus=1, gpus=1), [Node(64, gpus=2), Node(64, gpus=2)])
    with pytest.raises(ResourceError, match=r"2 workers × 6 GiB of memory = 12 GiB of memory; this machine has 7\.5"):
        require_resources(Need(2, cpus=1, memory_gib=6), [Node(8, memory_gib=7.5)])


def test_a_worker_that_is_larger_than_any_node_is_refused_though_the_sum_would_do():
    with pytest.raises(ResourceError, match="a worker is whole on one node: only 2 fit"):
        require_resources(Need(3, cpus=4), [Node(6, name="a"), Node(6, name="b")])


def test_this_machine_has_something():
    machine = this_machine()
    assert machine.cpus >= 1
    assert machine.memory_gib > 0


def test_a_head_that_hosts_nothing_does_not_make_workers_small() -> None:
    assert needs(Cluster(workers=2, gpus_per_worker=0), [Node(0), Node(8), Node(8)]).cpus == 8
    assert needs(Cluster(workers=2, gpus_per_worker=0), [Node(0)]).cpus == 1
