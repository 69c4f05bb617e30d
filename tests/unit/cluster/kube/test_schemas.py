"""The shipped schemas are those of the operators and of Kubernetes, and say what those say."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from imports import REPOSITORY
from manifests import job, of

from tunesmith.cluster.errors import UsageError
from tunesmith.cluster.kube import check, commands, schemas

DEFINITIONS = REPOSITORY.parent / "shared" / "crds"
"""The custom resource definitions that the schemas were made from, where this checkout lies beside them."""


def definitions() -> list[dict[str, Any]]:
    if not DEFINITIONS.is_dir():
        pytest.skip(f"no custom resource definitions at {DEFINITIONS.name} beside this checkout")
    return [json.loads(path.read_text()) for path in sorted(DEFINITIONS.glob("*.json"))]


def whole(node: Any) -> Any:
    """A shipped schema without references."""
    if isinstance(node, dict):
        if node.keys() == {"$ref"}:
            return whole(schemas.shipped()["$defs"][node["$ref"].rpartition("/")[2]])
        return {key: whole(value) for key, value in node.items()}
    return [whole(item) for item in node] if isinstance(node, list) else node


def cel_rules(node: Any) -> set[str]:
    if isinstance(node, dict):
        own = {" ".join(rule["rule"].split()) for rule in node.get("x-kubernetes-validations", [])}
        return own.union(*map(cel_rules, node.values()))
    return set().union(*map(cel_rules, node)) if isinstance(node, list) else set()


def test_nothing_of_a_definition_is_lost() -> None:
    for definition in definitions():
        name = f"{definition['group']}/{definition['version']}/{definition['kind']}"
        assert whole(schemas.shipped()["kinds"][name]) == definition["schema"], name


def test_every_rule_in_the_schemas_own_language_is_known() -> None:
    now = {rule for rule in cel_rules(schemas.shipped()) if "oldSelf" not in rule}
    assert now == set(schemas.CEL)
    assert schemas.unchecked_rules(schemas.shipped()) == []


@pytest.mark.parametrize("name", sorted({*schemas.shipped()["kinds"], *json.loads(schemas.SUBSET.read_text())}))
def test_a_misspelt_key_at_the_top_is_refused_for_every_kind(name: str) -> None:
    api, _, kind = name.rpartition("/")
    found = schemas.check(of(api, kind, spce={}))
    assert any(finding.rule == "schema.unknown" and finding.path == ("spce",) for finding in found)


def test_schemas_from_a_folder_join_ours(tmp_path: Path) -> None:
    crd = {"group": "example.org", "kind": "Thing", "version": "v1"}
    parts = {"spec": {"type": "object", "properties": {"size": {"type": "integer"}}}, "metadata": {"type": "object"}}
    schema = {"type": "object", "properties": {"apiVersion": {}, "kind": {}, **parts}}
    (tmp_path / "thing.json").write_text(json.dumps({**crd, "schema": schema}))
    extra = schemas.load_folder(tmp_path)
    thing = of("example.org/v1", "Thing", spec={"size": 3})
    assert schemas.check(thing)[0].rule == "schema.kind"
    assert schemas.check(thing, extra) == []
    assert schemas.check({**thing, "spec": {"sise": 3}}, extra)[0].fix == "Did you mean size?"


def test_rules_that_a_folder_brings_in_their_own_language_are_counted_not_checked(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rules = [
        {"rule": "self.size < 10", "message": "too large"},
        {"rule": "self in ['ray.io/kuberay-operator', 'kueue.x-k8s.io/multikueue']", "message": "not ours"},
    ]
    spec = {"type": "string", "x-kubernetes-validations": rules}
    schema = {"type": "object", "properties": {"apiVersion": {}, "kind": {}, "metadata": {}, "spec": spec}}
    crd = {"group": "example.org", "kind": "Thing", "version": "v1", "schema": schema}
    (tmp_path / "thing.json").write_text(json.dumps(crd))
    extra = schemas.load_folder(tmp_path)
    assert [finding.what for finding in schemas.check(of("example.org/v1", "Thing", spec="x"), extra)] == ["not ours"]
    assert schemas.unchecked_rules(extra["example.org/v1/Thing"]) == ["self.size < 10"]
    thing = tmp_path / "thing.yaml"
    thing.write_text(json.dumps(of("example.org/v1", "Thing", spec="ray.io/kuberay-operator")))
    commands.validate([thing], schemas=tmp_path, gates=None)
    assert "warning: example.org/v1/Thing: 1 of its rules (CEL) are not checked" in capsys.readouterr().err


def test_the_definitions_themselves_accept_what_we_render() -> None:
    definitions()
    extra = schemas.load_folder(DEFINITIONS)
    assert check.check_documents([("it", job())], extra) == []


def test_a_folder_without_schemas_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"no \*\.json"):
        schemas.load_folder(tmp_path)
    (tmp_path / "a.json").write_text("[]")
    with pytest.raises(UsageError, match=r"a\.json cannot be read as a schema"):
        schemas.load_folder(tmp_path)


def test_numbers_that_the_api_server_cannot_hold_are_refused() -> None:
    large = job(retries=2**31)
    assert [finding.rule for finding in schemas.check(large)] == ["schema.value"]
