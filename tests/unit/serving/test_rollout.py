"""Shares are what was asked for, users stay where they are, and a changed weight moves only whom it must."""

from __future__ import annotations

import pytest

from tunesmith.serving.rollout import Route, choose, sticky_key

OLD, NEW, THIRD = "a" * 64, "b" * 64, "c" * 64
USERS = [sticky_key(f"user-{n}", "") for n in range(20_000)]


def _chosen(*routes: Route, alias: str = "prod") -> list[str]:
    return [choose(routes, "support", alias, user) for user in USERS]


@pytest.mark.parametrize("weights", [(90, 10), (50, 50), (0.999, 0.001), (1, 2, 7)])
def test_each_route_gets_its_share(weights: tuple[float, ...]) -> None:
    routes = [Route(digest, weight) for digest, weight in zip((OLD, NEW, THIRD), weights, strict=False)]
    chosen = _chosen(*routes)
    for route in routes:
        share = route.weight / sum(weights)
        spread = 4 * (share * (1 - share) / len(USERS)) ** 0.5
        assert abs(chosen.count(route.digest) / len(USERS) - share) < spread


def test_the_same_user_gets_the_same_version_whatever_the_order_of_routes() -> None:
    assert _chosen(Route(OLD, 90), Route(NEW, 10)) == _chosen(Route(NEW, 10), Route(OLD, 90))


def test_only_the_ratio_of_weights_counts() -> None:
    assert _chosen(Route(OLD, 90), Route(NEW, 10)) == _chosen(Route(OLD, 0.9), Route(NEW, 0.1))


def test_a_growing_share_takes_users_and_gives_none_back() -> None:
    before = _chosen(Route(OLD, 90), Route(NEW, 10))
    after = _chosen(Route(OLD, 70), Route(NEW, 30))
    moved = [(was, now) for was, now in zip(before, after, strict=True) if was != now]
    assert set(moved) == {(OLD, NEW)}
    assert abs(len(moved) / len(USERS) - 0.2) < 0.015


def test_a_third_version_takes_from_both_and_moves_nobody_between_them() -> None:
    before = _chosen(Route(OLD, 60), Route(NEW, 40))
    after = _chosen(Route(OLD, 60), Route(NEW, 40), Route(THIRD, 25))
    assert {now for was, now in zip(before, after, strict=True) if was != now} == {THIRD}


def test_a_version_that_leaves_moves_only_its_own_users() -> None:
    before = _chosen(Route(OLD, 60), Route(NEW, 40), Route(THIRD, 25))
    after = _chosen(Route(OLD, 60), Route(NEW, 40))
    assert {was for was, now in zip(before, after, strict=True) if was != now} == {THIRD}


def test_who_is_in_one_aliass_canary_is_independent_of_anothers() -> None:
    one = _chosen(Route(OLD, 50), Route(NEW, 50))
    other = _chosen(Route(OLD, 50), Route(NEW, 50), alias="beta")
    assert abs(sum(a == b for a, b in zip(one, other, strict=True)) / len(USERS) - 0.5) < 0.02


def test_without_a_user_each_request_draws_its_own() -> None:
    assert sticky_key("ann", "r1") == sticky_key("ann", "r2")
    assert sticky_key(None, "r1") != sticky_key(None, "r2")
    assert sticky_key("r1", "x") != sticky_key(None, "r1"), "a user is never taken for a request"
    assert sticky_key("", "r1") == sticky_key(None, "r1")
