"""The tracker counts every storage once, from the operation that makes it until nothing refers to it."""

from __future__ import annotations

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from tunesmith.trainers.memory.tracker import ACTIVATIONS, MemoryTracker

KIB = 1024


def _kib(count: int = 1) -> torch.Tensor:
    return torch.empty(count * KIB, dtype=torch.uint8)


def test_a_storage_counts_once_however_many_views_it_has() -> None:
    with MemoryTracker() as tracker:
        whole = _kib()
        views = [whole[:10], whole.view(2, -1), whole.detach()]
        assert tracker.live == {ACTIVATIONS: KIB}
        del whole
        assert tracker.live == {ACTIVATIONS: KIB}, "its views keep it"
        del views
        assert tracker.live[ACTIVATIONS] == 0


def test_operations_in_place_make_nothing() -> None:
    with MemoryTracker() as tracker:
        whole = _kib()
        whole.add_(1).mul_(2)
        assert tracker.live == tracker.peak == {ACTIVATIONS: KIB}


def test_the_peak_remembers_what_is_gone() -> None:
    with MemoryTracker() as tracker:
        first = _kib(3)
        del first
        second = _kib(2)
        assert tracker.live.total() == 2 * KIB
        assert tracker.peak == {ACTIVATIONS: 3 * KIB}
        del second


def test_each_window_has_its_own_peak() -> None:
    with MemoryTracker() as tracker:
        tracker.enter_window("one")
        kept, gone = _kib(1), _kib(4)
        del gone
        tracker.enter_window("two")
        more = _kib(2)
        tracker.enter_window("one")
        assert {name: parts.total() // KIB for name, parts in tracker.peaks.items() if parts} == {"one": 5, "two": 3}
        assert tracker.peak.total() == 5 * KIB
        del kept, more


def test_what_is_made_counts_for_the_cause_at_that_time() -> None:
    with MemoryTracker() as tracker:
        with tracker.causing("weights"):
            weights = _kib(4)
        activations = _kib()
        assert tracker.live == {"weights": 4 * KIB, ACTIVATIONS: KIB}
        tracker.claim([activations], "gradients")
        assert tracker.live["gradients"] == KIB
        assert tracker.live[ACTIVATIONS] == 0
        del activations, weights
        assert tracker.live.total() == 0


def test_what_was_there_before_counts_once_it_is_claimed() -> None:
    before = torch.nn.Parameter(torch.zeros(KIB))
    before.grad = torch.zeros(KIB)
    tracker = MemoryTracker()
    tracker.claim([before], "weights")
    tracker.claim_everything_alive("found")
    assert tracker.live["weights"] == 4 * KIB, "what is claimed already keeps its cause"
    found = tracker.live["found"]
    assert found >= 4 * KIB, "its gradient"
    with tracker:
        before.grad = None
        assert tracker.live["found"] == found - 4 * KIB
        made = before * 2
        assert tracker.live[ACTIVATIONS] == 4 * KIB
        del made


def test_nothing_is_counted_outside() -> None:
    tracker = MemoryTracker()
    with tracker:
        inside = _kib()
    outside = _kib(5)
    assert tracker.live == {ACTIVATIONS: KIB}
    del inside, outside
    assert tracker.live.total() == 0


def test_a_storage_that_grows_counts_by_its_new_size() -> None:
    with MemoryTracker() as tracker:
        grown = _kib()
        grown.untyped_storage().resize_(3 * KIB)
        grown.resize_(3 * KIB)
        assert tracker.live.total() == 3 * KIB


def test_fake_tensors_count_like_real_ones() -> None:
    def run() -> MemoryTracker:
        with MemoryTracker() as tracker:
            x = torch.ones(8, 16, requires_grad=True)
            (x @ x.T).relu().sum().backward()
        return tracker

    real = run()
    with FakeTensorMode():
        fake = run()
    assert fake.peaks == real.peaks
