from __future__ import annotations

from pathlib import Path

import pytest

from tunesmith.cluster.errors import UsageError
from tunesmith.cluster.jobs import secrets

SHOWN = {
    "Hugging Face": "hf_" + "aB3" * 11,
    "AWS": "AKIA" + "ABCD1234" * 2,
    "GitHub": "ghp_" + "a1B2c3" * 6,
    "API key": "sk-" + "proj-0aZ" * 4,
    "web token": "eyJhbGciOiJIUzI1" + ".eyJzdWIiOiIx." + "abcdefgh",
    "private key": "-----BEGIN RSA PRIVATE KEY-----",
    "password in an address": "postgresql://ann:" + "hunter2" + "@db/runs",
    "hexadecimal": "0123456789abcdef" * 3,
}


@pytest.mark.parametrize("what", SHOWN)
def test_what_looks_like_a_secret_is_refused_wherever_it_stands_and_not_repeated(what: str) -> None:
    for attempt in (
        lambda: secrets.refuse_in_recipe({"data": {"train": [{"path": f"x {SHOWN[what]}"}]}}),
        lambda: secrets.split([f"PLAIN={SHOWN[what]}"]),
    ):
        with pytest.raises(UsageError, match=what) as refused:
            attempt()
        assert SHOWN[what] not in str(refused.value)
        assert "env:" in str(refused.value)


def test_where_in_the_recipe_it_stands_is_said() -> None:
    with pytest.raises(UsageError, match=r"^data\.train\.0\.path: looks like"):
        secrets.refuse_in_recipe({"data": {"train": [{"path": SHOWN["AWS"]}]}})


def test_what_recipes_hold_is_no_secret() -> None:
    commit = "0123456789abcdef0123456789abcdef01234567"
    recipe = {
        "model": {"base": "meta-llama/Llama-3.1-8B", "revision": commit},
        "data": {"train": "s3://bucket/rows.jsonl"},
    }
    secrets.refuse_in_recipe(recipe)


def test_plain_values_and_references_are_told_apart() -> None:
    plain, references = secrets.split(["COLOUR=blue", "HF_TOKEN=env:HF_TOKEN", "KEY=file:/etc/key=1"])
    assert plain == {"COLOUR": "blue"}
    assert references == {"HF_TOKEN": "env:HF_TOKEN", "KEY": "file:/etc/key=1"}


@pytest.mark.parametrize("name", ["HF_TOKEN", "db_password", "AWS_SECRET", "OPENAI_API_KEY"])
def test_a_name_that_tells_of_a_secret_takes_references_only(name: str) -> None:
    with pytest.raises(UsageError, match=f"--env {name}: looks like a secret, by its name"):
        secrets.split([f"{name}=x"])


@pytest.mark.parametrize("entry", ["NAME", "=x", "1X=y", "A B=c"])
def test_what_is_no_variable_is_refused(entry: str) -> None:
    with pytest.raises(UsageError, match="not of the form NAME=VALUE"):
        secrets.split([entry])


@pytest.mark.parametrize("entry", ["FOO=env:", "FOO=file:"])
def test_a_reference_to_nothing_is_refused(entry: str) -> None:
    with pytest.raises(UsageError, match=f"--env {entry}: does not say of which"):
        secrets.split([entry])


@pytest.mark.parametrize("name", ["PATH", "PYTHONPATH", "PYTHONHOME", "LD_PRELOAD", "RAY_ADDRESS"])
def test_what_the_nodes_need_themselves_is_refused(name: str) -> None:
    with pytest.raises(UsageError, match=f"--env {name}: with another one the cluster's nodes could not start the job"):
        secrets.split([f"{name}=/nonexistent"])


def test_references_are_resolved_where_the_job_runs_and_hidden_in_what_it_says(tmp_path: Path) -> None:
    (tmp_path / "key").write_text("from-file\n")
    found = secrets.resolve({"A": "env:B", "C": f"file:{tmp_path / 'key'}"}, {"B": "from-env"})
    assert found == {"A": "from-env", "C": "from-file"}
    assert secrets.hide("a from-env, a from-file", found) == f"a {secrets.HIDDEN}, a {secrets.HIDDEN}"


def test_a_secret_of_several_lines_is_hidden_line_by_line() -> None:
    key = {"KEY": "-----BEGIN KEY-----\n  MIIEvQ+IBAD\nab\n-----END KEY-----"}
    printed = ["loading -----BEGIN KEY-----", "MIIEvQ+IBAD", "a tab", "-----END KEY-----"]
    hidden = [f"loading {secrets.HIDDEN}", secrets.HIDDEN, "a tab", secrets.HIDDEN]
    assert [secrets.hide(line, key) for line in printed] == hidden


def test_a_reference_that_leads_nowhere_is_named(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="A: the cluster's environment has no B"):
        secrets.resolve({"A": "env:B"}, {})
    with pytest.raises(UsageError, match=r"C: .*/key: No such file"):
        secrets.resolve({"C": f"file:{tmp_path / 'key'}"}, {})
