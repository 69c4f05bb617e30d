"""Names, what they lead to, and what is said of those that do not exist."""

from __future__ import annotations

import math

import pytest

from tunesmith.cluster.errors import RegistryError
from tunesmith.serving.catalog import Catalog, Version, as_state

ONE, TWO, NEAR = "1" * 64, "2" * 64, "1" * 63 + "f"


def version(digest: str) -> Version:
    return Version(digest=digest, added="2026-01-01", base_digest=None, peft_type="LORA", rank=4, size=1)


@pytest.fixture
def catalog() -> Catalog:
    made = Catalog().with_version("support", version(ONE), None, None)
    return made.with_version("support", version(TWO), None, "canary").with_version("sales", version(ONE), "acme", None)


def digest(catalog: Catalog, model: str) -> str:
    return catalog.resolve(7, model, "ann", "r1").digest


def test_a_name_means_prod_an_alias_or_a_version(catalog: Catalog) -> None:
    assert [digest(catalog, f"support{tag}") for tag in ("", "@prod", "@canary", f"@{TWO}", f"@{TWO[:12]}")] == [
        ONE,
        ONE,
        TWO,
        TWO,
        TWO,
    ]
    pinned = catalog.resolve(7, f"support@{TWO}", None, "r1")
    assert (pinned.alias, pinned.shadow, pinned.generation) == (None, None, 7)


@pytest.mark.parametrize(
    ("model", "words"),
    [
        ("suport", "there is no adapter 'suport'\nDid you mean support?"),
        ("", "there is no adapter ''\nThere are: support, sales."),
        ("support@", "there is no alias of support ''"),
        ("support@prodd", "there is no alias of support 'prodd'\nDid you mean prod?"),
        (f"support@{TWO[:11]}", "there is no alias of support '22222222222'"),
        (
            "support@333333333333",
            "there is no version of support '333333333333'\nThere are: 111111111111, 222222222222.",
        ),
        ("support@prod@prod", "there is no alias of support 'prod@prod'"),
        ("x" * 5000, "there is no adapter 'xxx"),
    ],
)
def test_what_does_not_exist_is_answered_with_what_is_near(catalog: Catalog, model: str, words: str) -> None:
    with pytest.raises(RegistryError) as refusal:
        digest(catalog, model)
    assert str(refusal.value).startswith(words)
    assert len(str(refusal.value)) < 300


def test_another_tenants_adapter_does_not_exist_and_is_not_suggested(catalog: Catalog) -> None:
    assert list(catalog.visible_to("acme").adapters) == ["support", "sales"]
    for tenant in ("globex", None):
        with pytest.raises(RegistryError) as refusal:
            digest(catalog.visible_to(tenant), "sale")
        assert "sales" not in str(refusal.value)


def test_a_pin_that_fits_two_versions_asks_for_more_digits(catalog: Catalog) -> None:
    both = catalog.with_version("support", version(NEAR), None, None)
    with pytest.raises(RegistryError, match=r"2 versions of support begin with 111111111111.*\nGive more digits"):
        digest(both, "support@111111111111")
    assert digest(both, f"support@{NEAR}") == NEAR


def test_rolling_back_goes_one_step_each_time_and_restores_shares_and_shadow(catalog: Catalog) -> None:
    split = catalog.split("support", "prod", {ONE[:4]: 90, TWO[:4]: 10}, shadow=TWO)
    moved = split.moved("support", "prod", TWO)
    back = moved.rolled_back("support", "prod").alias("support", "prod")
    assert (back.routes, back.shadow) == (split.alias("support", "prod").routes, TWO)
    assert digest(moved.rolled_back("support", "prod").rolled_back("support", "prod"), "support") == ONE
    assert digest(catalog, "support") == ONE, "a catalog is never altered"


def test_moving_to_where_it_leads_already_is_no_step_to_roll_back(catalog: Catalog) -> None:
    assert catalog.moved("support", "prod", ONE) == catalog


@pytest.mark.parametrize("weight", [0, -1, math.nan, math.inf])
def test_a_weight_is_above_nothing(catalog: Catalog, weight: float) -> None:
    with pytest.raises(RegistryError, match="a weight is above 0"):
        catalog.split("support", "prod", {ONE: 1, TWO: weight})


def test_one_version_is_not_split_with_itself(catalog: Catalog) -> None:
    with pytest.raises(RegistryError, match="one version is named twice"):
        catalog.split("support", "prod", {ONE: 1, ONE[:8]: 1})


def test_a_version_in_the_shadow_is_in_use(catalog: Catalog) -> None:
    shadowed = catalog.split("support", "canary", {ONE: 1}, shadow=TWO)
    with pytest.raises(RegistryError, match="version 222222222222 is where canary leads"):
        shadowed.without("support", TWO)


def test_what_led_to_a_removed_version_cannot_be_rolled_back_to(catalog: Catalog) -> None:
    gone = catalog.moved("support", "canary", ONE).without("support", TWO)
    with pytest.raises(RegistryError, match="has led nowhere else"):
        gone.rolled_back("support", "canary")


def test_a_name_goes_with_its_last_version(catalog: Catalog) -> None:
    assert list(catalog.without("sales", "prod").without("sales", ONE[:8]).adapters) == ["support"]


def test_of_former_targets_twenty_are_kept(catalog: Catalog) -> None:
    for n in range(50):
        catalog = catalog.moved("support", "prod", (ONE, TWO)[n % 2])
    assert len(catalog.alias("support", "prod").previous) == 20


def test_a_state_is_read_back_as_it_was(catalog: Catalog) -> None:
    assert Catalog.model_validate(as_state(catalog)) == catalog
