"""What one key may use, over minutes that the tests make pass."""

from __future__ import annotations

import contextlib
import random

import pytest

from tunesmith.cluster.errors import RequestError
from tunesmith.serving.config import Limits
from tunesmith.serving.limits import MOST_IDLE, Bucket, Meters, estimated_tokens

FREE = Limits(concurrency=None)


def refused(meters: Meters, limits: Limits, tokens: int, now: float) -> RequestError:
    with pytest.raises(RequestError) as caught:
        meters.enter("k", limits, tokens, now)
    assert caught.value.status == 429
    return caught.value


def test_requests_come_back_evenly_over_the_minute():
    meters, limits = Meters(), Limits(requests_per_minute=6, concurrency=None)
    for _ in range(6):
        meters.enter("k", limits, 1, 0.0)
    assert refused(meters, limits, 1, 0.0).retry_after == pytest.approx(10.0)
    assert refused(meters, limits, 1, 9.0).retry_after == pytest.approx(1.0)
    meters.enter("k", limits, 1, 10.0)
    refused(meters, limits, 1, 10.0)
    meters.enter("other", limits, 1, 10.0)


def test_tokens_are_taken_at_the_start_and_corrected_at_the_end():
    meters, limits = Meters(), Limits(tokens_per_minute=100, concurrency=None)
    lease = meters.enter("k", limits, 90, 0.0)
    assert refused(meters, limits, 50, 0.0).retry_after == pytest.approx(24.0)
    meters.leave(lease, 40, 0.0)
    meters.leave(lease, 40, 0.0)
    second = meters.enter("k", limits, 60, 0.0)
    meters.leave(second, 120, 0.0)  # more than was thought: a debt of 60
    assert refused(meters, limits, 1, 0.0).retry_after == pytest.approx(61 * 0.6)


def test_a_request_beyond_the_whole_minute_is_told_so_and_not_to_come_again():
    error = refused(Meters(), Limits(tokens_per_minute=100), 101, 0.0)
    assert (error.code, error.retry_after) == ("request_too_large", None)
    assert "101 tokens" in error.what
    assert "100 a minute" in error.what


def test_a_refusal_takes_nothing():
    meters, limits = Meters(), Limits(requests_per_minute=1, tokens_per_minute=10, concurrency=1)
    refused(meters, limits, 11, 0.0)
    lease = meters.enter("k", limits, 10, 0.0)
    assert "1 requests at work" in refused(meters, limits, 1, 0.0).what
    meters.leave(lease, 0, 0.0)
    assert meters.at_work("k") == 0


def test_concurrency_is_freed_once_however_often_a_request_ends():
    meters, limits = Meters(), Limits(concurrency=2)
    first, _ = meters.enter("k", limits, 1, 0.0), meters.enter("k", limits, 1, 0.0)
    for _ in range(3):
        meters.leave(first, 1, 0.0)
    meters.enter("k", limits, 1, 0.0)
    refused(meters, limits, 1, 0.0)


def test_over_any_time_no_more_is_used_than_the_rate_and_one_minute_on_top():
    dice = random.Random(3)
    bucket, now, taken = Bucket(600, 0.0), 0.0, 0.0
    for _ in range(5000):
        now += dice.expovariate(5)
        amount = dice.randrange(1, 100)
        if bucket.wait(amount, now) <= 0:
            bucket.take(amount, now)
            taken += amount
        assert taken <= 600 + now * 10 + 1e-6
    assert taken > 0.98 * (600 + now * 10), "and a client that always asks gets nearly all of it"


def test_after_the_wait_that_was_told_the_request_is_let_in():
    dice = random.Random(5)
    meters, limits, now = Meters(), Limits(tokens_per_minute=777, concurrency=None), 0.0
    for _ in range(500):
        amount = dice.randrange(1, 700)
        with contextlib.suppress(RequestError):
            meters.enter("k", limits, amount, now)
        told = refused(meters, limits, 700, now).retry_after
        assert told
        now += told
        meters.enter("k", limits, 700, now)


def test_a_clock_that_goes_back_gives_nothing():
    bucket = Bucket(60, 100.0)
    bucket.take(60, 100.0)
    assert bucket.level(50.0) == 0
    bucket.take(0, 50.0)
    assert bucket.level(101.0) == pytest.approx(1.0)


def test_idle_keys_are_forgotten_and_busy_or_indebted_ones_are_not():
    meters, limits = Meters(), Limits(tokens_per_minute=60)
    busy = meters.enter("busy", limits, 1, 0.0)
    for index in range(3 * MOST_IDLE):
        lease = meters.enter(f"k{index}", limits, 1, float(index))
        meters.leave(lease, 1, float(index))
    assert len(meters._meters) <= MOST_IDLE + 1
    assert meters.at_work("busy") == 1
    meters.leave(busy, 1, 0.0)


def test_limits_that_are_read_anew_for_every_request_are_the_same_limits():
    meters, written = Meters(), Limits(requests_per_minute=2).model_dump()
    for _ in range(2):
        meters.enter("k", Limits(**written), 1, 0.0)
    refused(meters, Limits(**written), 1, 0.0)


def test_new_limits_hold_at_once():
    meters = Meters()
    meters.enter("k", Limits(concurrency=1), 1, 0.0)
    meters.enter("k", Limits(concurrency=2), 1, 0.0)
    refused(meters, Limits(concurrency=2), 1, 0.0)


def test_prompts_are_estimated_rather_too_high():
    assert estimated_tokens([5, 6, 7]) == 3
    assert estimated_tokens("a" * 300) == 101
    assert estimated_tokens([{"role": "user", "content": "a" * 300}, {"role": "user", "content": ""}]) == 101 + 1 + 12
