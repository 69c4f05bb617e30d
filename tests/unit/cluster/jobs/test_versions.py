from __future__ import annotations

from pathlib import Path

from gathered_code import digest

from tunesmith.cluster.jobs.code import gather
from tunesmith.cluster.jobs.versions import CODE, differences, here


def test_a_machine_differs_from_itself_in_nothing() -> None:
    assert differences(here(), here()) == []
    assert here()["torch"].count("+") == 0


def test_every_difference_is_named_with_both_sides() -> None:
    theirs, ours = {"torch": "2.13.0", "ray": "2.60.0", "peft": "1"}, {"torch": "2.12.0", "ray": "2.60.0"}
    assert differences(theirs, ours) == [
        "torch: 2.13.0 where it was submitted, 2.12.0 on the cluster",
        "peft: 1 where it was submitted, not there on the cluster",
    ]


def test_gathered_code_is_the_same_code_and_a_changed_line_is_other_code(tmp_path: Path) -> None:
    package = gather(tmp_path)
    assert not list(package.rglob("__pycache__"))
    assert digest(tmp_path) == here()[CODE]
    errors = package / "cluster" / "errors.py"
    errors.write_text(errors.read_text() + "\n")
    assert digest(tmp_path) != here()[CODE]
