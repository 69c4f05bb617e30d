"""The dashboard and the page ask for metrics and labels that there are."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest
import yaml
from imports import REPOSITORY
from prometheus_client import Histogram
from prometheus_client.metrics import MetricWrapperBase

from tunesmith.serving.metrics import Metrics

DASHBOARD = json.loads((REPOSITORY / "k8s" / "monitoring" / "grafana" / "tunesmith-serving.json").read_text())
PAGE = (REPOSITORY / "docs" / "serving-metrics.md").read_text(encoding="utf-8")
QUERIES = [target["expr"] for panel in DASHBOARD["panels"] for target in panel["targets"]]


def there() -> dict[str, set[str]]:
    """Labels by every sample name that /metrics can have."""
    metrics: list[Any] = [one for one in vars(Metrics()).values() if isinstance(one, MetricWrapperBase)]
    names = {}
    for one in metrics:
        for family in one.describe():
            labels = set(one._labelnames)
            if isinstance(one, Histogram):
                names |= {f"{family.name}_bucket": labels | {"le"}}
                names |= {f"{family.name}_{part}": labels for part in ("sum", "count")}
            else:
                names[family.name + ("_total" if family.type == "counter" else "")] = labels
    return names


@pytest.mark.parametrize("query", [*QUERIES, *re.findall(r"```promql\n(.*?)```", PAGE, re.DOTALL)])
def test_a_query_names_metrics_and_labels_that_exist(query: str) -> None:
    known = there()
    asked = re.findall(r"(tunesmith_\w+)(?:\{([^}]*)\})?", query)
    assert asked
    for name, selector in asked:
        assert name in known
        assert set(re.findall(r"(\w+)\s*[=!]", selector)) <= known[name], name
    grouped = {one.strip() for names in re.findall(r"by \(([^)]*)\)", query) for one in names.split(",")}
    assert grouped <= set.union(*(known[name] for name, _ in asked))
    assert query.count("(") == query.count(")")


def test_every_metric_is_on_the_dashboard_and_on_the_page() -> None:
    shown = " ".join(QUERIES)
    families = {re.sub(r"_(bucket|sum|count)$", "", name) for name in there()}
    assert {name for name in families if name not in shown} == set()
    assert {name for name in families if f"`{name}`" not in PAGE} == set()


def test_panels_do_not_overlap_and_have_ids_of_their_own() -> None:
    places = [(one["gridPos"]["x"], one["gridPos"]["y"]) for one in DASHBOARD["panels"]]
    assert len(set(places)) == len(places) == len({one["id"] for one in DASHBOARD["panels"]})
    assert all(one["gridPos"]["x"] + one["gridPos"]["w"] <= 24 for one in DASHBOARD["panels"])


def test_legends_name_labels_that_the_query_keeps() -> None:
    for panel in DASHBOARD["panels"]:
        for target in panel["targets"]:
            kept = set(re.findall(r"\w+", " ".join(re.findall(r"by \(([^)]*)\)", target["expr"]))))
            named = set(re.findall(r"\{\{(\w+)\}\}", target["legendFormat"]))
            assert named <= (kept or {"base", "adapter", "version", "feature", "against"}), panel["title"]


def test_the_scrape_example_is_yaml_with_a_key() -> None:
    (shown,) = re.findall(r"```yaml\n(.*?)```", PAGE, re.DOTALL)
    (job,) = yaml.safe_load(shown)["scrape_configs"]
    assert job["authorization"]["credentials_file"]
