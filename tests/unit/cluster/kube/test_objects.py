"""Names and quantities as Kubernetes reads them."""

from __future__ import annotations

from decimal import Decimal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tunesmith.cluster.errors import UsageError
from tunesmith.cluster.kube.objects import DNS_1035, is_quantity, qualified_name, quantity, version
from tunesmith.cluster.kube.pods import NAME_LIMIT, object_name, on_claim

RUN_NAMES = st.from_regex(r"[a-z0-9]([a-z0-9._-]{0,61}[a-z0-9])?", fullmatch=True)


@given(RUN_NAMES)
def test_every_run_has_a_name_that_kuberay_takes(name: str) -> None:
    found = object_name(name)
    assert DNS_1035.fullmatch(found)
    assert len(found) <= NAME_LIMIT


@given(RUN_NAMES, RUN_NAMES)
def test_two_runs_never_have_one_name(first: str, second: str) -> None:
    assert (object_name(first) == object_name(second)) == (first == second)


def test_runs_that_differ_in_what_kubernetes_does_not_take_have_two_names() -> None:
    names = [object_name(name) for name in ("a.b", "a_b", "a-b", "a" * 63, "a" * 62 + "b")]
    assert len(set(names)) == len(names)
    assert names[2] == "a-b"


@pytest.mark.parametrize(
    ("text", "number"),
    [("500m", "0.5"), ("2Gi", 2 * 2**30), ("1k", 1000), (3, 3), ("1e3", 1000), ("1.5Ki", 1536), ("100n", "0.0000001")],
)
def test_quantities(text: str | int, number: str | int) -> None:
    assert quantity(text) == Decimal(number)


@pytest.mark.parametrize("text", ["8 GB", "Gi", "1.2.3", "", "1Xi", "1e", "."])
def test_what_is_no_quantity(text: str) -> None:
    assert not is_quantity(text)
    with pytest.raises(ValueError, match="is no quantity"):
        quantity(text)


def test_versions() -> None:
    assert version("2.60.0") == (2, 60, 0)
    assert version("2.52.0rc1") == (2, 52, 0)
    assert version("nightly") is None


def test_label_keys() -> None:
    assert qualified_name("kueue.x-k8s.io/queue-name")
    assert not qualified_name("-a")
    assert not qualified_name("Not_A_Domain/a")
    assert not qualified_name("a" * 64)


def test_paths_are_those_of_the_claim() -> None:
    assert on_claim("data", "rows.jsonl") == "/shared/rows.jsonl"
    assert on_claim("data", "/shared/rows.jsonl") == "/shared/rows.jsonl"
    assert on_claim("data", "s3://bucket/rows.jsonl") == "s3://bucket/rows.jsonl"
    for path in ("/data/rows.jsonl", "~/rows.jsonl", "/sharedx/rows"):
        with pytest.raises(UsageError, match="/shared"):
            on_claim("data", path)
