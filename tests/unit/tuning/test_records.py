"""What a sweep leaves on disk, and what a later start of it reads there."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
from sweep_recipes import reported

from tunesmith.cluster.errors import StorageError
from tunesmith.tuning.records import Ended, Lineage, Report, SweepFolder, TrialFolder

FIRST = {"train.learning_rate": 0.1, "adaptation.rank": 4}
TAKEN = {"train.learning_rate": 0.8, "adaptation.rank": 8}
TAKEN_AGAIN = {"train.learning_rate": 0.6, "adaptation.rank": 8}
EXCHANGES = [
    Lineage(source=2, segment=0, report=2, step=20, values=TAKEN, changed={"train.learning_rate": [1.0, 0.8]}),
    Lineage(source=3, segment=1, report=4, step=40, values=TAKEN_AGAIN, changed={"train.learning_rate": [0.5, 0.6]}),
]


@pytest.fixture
def trial(tmp_path: Path) -> TrialFolder:
    record = SweepFolder(tmp_path).trial(7)
    record.begin(FIRST)
    return record


def test_a_trial_is_read_as_it_was_written(trial: TrialFolder):
    full = Report(1, 5, 640, 1.5, 2.25, 0.125, {"eval_loss": 2.25, "loss": 2.5}, 33.0)
    trial.report(full)
    trial.report(reported(2, 1.0))
    read = TrialFolder(trial.root)
    assert read.number == 7
    assert read.values() == FIRST
    assert read.reports() == [full, reported(2, 1.0)]
    assert read.ended() is None
    assert read.lineage() == []


def test_a_trial_that_was_not_begun_has_nothing(tmp_path: Path):
    record = SweepFolder(tmp_path).trial(1)
    assert (record.reports(), record.lineage(), record.ended()) == ([], [], None)
    assert SweepFolder(tmp_path).trials() == []


def test_of_a_report_that_was_made_twice_the_later_one_counts(trial: TrialFolder):
    for number, value in ((1, 3.0), (2, 2.0), (1, 2.9)):
        trial.report(reported(number, value))
    assert [(one.report, one.value) for one in trial.reports()] == [(1, 2.9), (2, 2.0)]


def test_a_report_that_a_crash_tore_is_left_out_and_written_over(trial: TrialFolder):
    trial.report(reported(1, 3.0))
    trial.report(reported(2, 2.0))
    path = trial.root / "reports.jsonl"
    path.write_bytes(path.read_bytes()[:-9])
    assert [one.report for one in trial.reports()] == [1]
    TrialFolder(trial.root).report(reported(2, 1.5))
    assert [one.value for one in trial.reports()] == [3.0, 1.5]


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_value_that_is_not_finite_is_read_as_such(value: float, trial: TrialFolder):
    trial.report(reported(1, value, figures={"eval_loss": value, "loss": 2.0}))
    (read,) = trial.reports()
    assert math.isnan(read.value)
    assert read.figures == {"loss": 2.0}


def test_a_trial_ends_once(trial: TrialFolder):
    trial.end("stopped", "by asha after report 2")
    trial.end("finished")
    assert trial.ended() == Ended("stopped", "by asha after report 2")


def test_an_end_that_cannot_be_read_is_no_end_by_silence(trial: TrialFolder):
    (trial.root / "ended.json").write_text('{"state": "fin')
    with pytest.raises(StorageError, match=r"ended\.json: cannot be read"):
        trial.ended()


def test_the_configuration_follows_the_exchanges(trial: TrialFolder):
    for exchange in EXCHANGES:
        trial.descend(exchange)
    assert trial.lineage() == EXCHANGES
    assert trial.values() == FIRST
    assert [trial.values_after(segment) for segment in (0, 1, 2, None)] == [FIRST, TAKEN, TAKEN_AGAIN, TAKEN_AGAIN]


def five_reports(trial: TrialFolder) -> None:
    for number in range(1, 6):
        trial.report(reported(number, 1 / number))
    for exchange in EXCHANGES:
        trial.descend(exchange)
    trial.end("finished")
    for segment in range(3):
        for seed in range(2):
            trial.run(segment, seed).mkdir()


def test_what_lies_beyond_another_course_is_forgotten(trial: TrialFolder):
    five_reports(trial)
    trial.forget_after(3, 1)
    assert [one.report for one in trial.reports()] == [1, 2, 3]
    assert trial.lineage() == EXCHANGES[:1]
    assert trial.ended() is None
    assert sorted(path.name for path in trial.root.glob("run-*")) == ["run-0-0", "run-0-1", "run-1-0", "run-1-1"]
    assert trial.values() == FIRST
    trial.report(reported(4, 9.0))
    assert [one.value for one in trial.reports()] == [1.0, 1 / 2, 1 / 3, 9.0]


def test_everything_can_be_forgotten_but_the_configuration(trial: TrialFolder):
    five_reports(trial)
    trial.forget_after(0, 0)
    assert (trial.reports(), trial.lineage(), trial.ended()) == ([], [], None)
    assert trial.values_after() == FIRST


def test_nothing_is_forgotten_where_nothing_lies_beyond(trial: TrialFolder):
    trial.report(reported(1, 1.0, std=0.5))
    trial.forget_after(4, 2)
    assert trial.reports() == [reported(1, 1.0, std=0.5)]


def test_trials_are_in_the_order_of_their_numbers(tmp_path: Path):
    folder = SweepFolder(tmp_path)
    for number in (10001, 9999, 2, 11):
        folder.trial(number).begin(FIRST)
    (tmp_path / "trials" / "0003").mkdir()  # killed before its configuration was written
    assert [trial.number for trial in folder.trials()] == [2, 11, 9999, 10001]


def test_each_training_of_a_trial_has_its_own_folder(trial: TrialFolder):
    folders = {trial.run(segment, seed) for segment in range(2) for seed in range(2)}
    assert len(folders) == 4
    assert trial.run(1, 0) == trial.root / "run-1-0"


def test_a_report_that_cannot_be_read_is_named_with_its_file(tmp_path: Path) -> None:
    record = SweepFolder(tmp_path).trial(1)
    record.root.mkdir(parents=True)
    (record.root / "reports.jsonl").write_text('{"report": 1, "step": 3, "tokens": 5, "seconds": 0.1, "value": "x"}\n')
    with pytest.raises(StorageError, match=r"reports\.jsonl: report 1 cannot be read"):
        record.reports()
