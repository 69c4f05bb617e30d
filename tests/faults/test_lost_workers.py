"""Workers that die and commands that are stopped, from outside, as it happens to users."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest
import small_runs
from small_runs import Command

from tunesmith.cluster.runs import RunFolder
from tunesmith.trainers.stopping import ONE_STOP_S

KILLER = Path(__file__).with_name("mid_accumulation")
"""Kills a worker from within its process, where a signal from outside would come too early or too late."""


@dataclass
class Bench:
    """Where the runs of these tests lie; all of them train the same."""

    folder: Path
    base: Path

    def recipe(self, name: str, **train: object) -> Path:
        recipe = small_runs.small_recipe(name, self.base, self.folder / "rows.jsonl", self.folder / "runs")
        recipe["train"] |= train
        return small_runs.write_recipe(self.folder, recipe)

    def run(self, name: str) -> Path:
        return self.folder / "runs" / name


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory, tiny_base: Path) -> Bench:
    folder = tmp_path_factory.mktemp("faults")
    small_runs.write_rows(folder / "rows.jsonl")
    return Bench(folder, tiny_base)


@pytest.fixture(scope="module")
def unbroken(bench: Bench) -> Path:
    """The run as it goes when nothing happens to it."""
    code, out, said = Command(bench.recipe("unbroken")).finish()
    assert code == 0, said
    assert json.loads(out)["artifact"] == str(bench.run("unbroken") / "artifact")
    return bench.run("unbroken")


@pytest.fixture
def start() -> Iterator[Callable[..., Command]]:
    commands: list[Command] = []

    def begin(recipe: Path, *options: str, environment: dict[str, str] | None = None) -> Command:
        commands.append(Command(recipe, *options, environment=environment))
        return commands[-1]

    yield begin
    for command in commands:
        command.kill()


def assert_the_same_run(run: Path, unbroken: Path) -> None:
    assert small_runs.what_was_learned(run) == small_runs.what_was_learned(unbroken)
    assert small_runs.weights(run / "artifact") == small_runs.weights(unbroken / "artifact")


def actors(command: Command) -> list[str]:
    """What Ray runs for the command beside idle processes and its own agents, by the titles of processes."""
    titles = []
    for process in psutil.Process(command.process.pid).children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):  # an idle one, which Ray ends when it likes
            titles.append(" ".join(process.cmdline()))
    named = (re.match(r"ray::(?!IDLE|DashboardAgent|RuntimeEnvAgent)(\w+)", title) for title in titles)
    return [match[1] for match in named if match]


def test_after_every_lost_worker_the_run_goes_on_and_is_the_unbroken_one(
    bench: Bench, unbroken: Path, start: Callable[..., Command]
):
    run, total = bench.run("killed"), small_runs.last_step(unbroken)
    command = start(bench.recipe("killed"))
    began = []
    for rank, step in ((1, 4), (0, total // 2 + 2), (1, total - 2)):  # epoch 0, epoch 1, and the last interval
        command.wait_for_step(run, step)
        assert actors(command) == ["RayTrainWorker"] * 2, "each other one would cost an attempt a second"
        small_runs.kill_worker(run, rank)
        began.append(time.monotonic())
        reached = small_runs.last_step(run)
        attempt = RunFolder(run).current_attempt()
        command.wait_until(lambda attempt=attempt: RunFolder(run).current_attempt() > attempt, "a new attempt")
        assert (reached - newest_checkpoint(run)) <= 3 + 1, "more than one checkpoint interval is repeated"
    code, out, said = command.finish()
    assert code == 0, said
    assert said.count("warning: attempt") == 3, said
    assert "Traceback" not in said
    assert len(out.splitlines()) == 1
    assert_the_same_run(run, unbroken)


def test_a_worker_lost_between_the_micro_batches_of_a_step_changes_nothing(
    bench: Bench, unbroken: Path, start: Callable[..., Command]
):
    run, marker, step, micro = bench.run("mid-step"), bench.folder / "was-killed", 5, 2
    passes = step * small_runs.ACCUMULATION + micro
    path = os.pathsep.join(filter(None, [str(KILLER), os.environ.get("PYTHONPATH")]))
    environment = {"PYTHONPATH": path, "KILL_AFTER_BACKWARD": f"1:{passes}:{marker}"}
    code, _, said = start(bench.recipe("mid-step"), environment=environment).finish()
    assert code == 0, said
    assert marker.exists(), "no worker was killed"
    assert said.count("warning: attempt") == 1, said
    assert_the_same_run(run, unbroken)


def newest_checkpoint(run: Path) -> int:
    return max((int(path.name[5:]) for path in (run / "checkpoints").glob("step-????????")), default=0)


def test_sigterm_saves_one_step_on_all_workers_and_the_next_command_goes_on_exactly(
    bench: Bench, unbroken: Path, start: Callable[..., Command]
):
    run, recipe = bench.run("stopped"), bench.recipe("stopped")
    command = start(recipe)
    command.wait_for_step(run, 4)
    command.signal_group(signal.SIGTERM)
    code, out, said = command.finish()
    assert (code, out) == (75, ""), said
    assert "stopping: the workers save after this step; once more" in said
    assert f"saved step {newest_checkpoint(run)}" in said
    assert newest_checkpoint(run) == small_runs.last_step(run) >= 4
    code, out, said = start(recipe).finish()
    assert code == 0, said
    assert "goes on from step" in said
    assert_the_same_run(run, unbroken)


@pytest.mark.matrix
def test_a_damaged_checkpoint_is_named_to_the_user_and_the_run_is_the_unbroken_one(
    bench: Bench, unbroken: Path, start: Callable[..., Command]
):
    run, recipe = bench.run("damaged"), bench.recipe("damaged")
    command = start(recipe)
    command.wait_for_step(run, 5)
    command.signal_group(signal.SIGTERM)
    assert command.finish()[0] == 75
    before, newest = sorted(path.name for path in (run / "checkpoints").glob("step-????????"))[-2:]
    with next((run / "checkpoints" / newest).glob("*.pt")).open("r+b") as file:
        file.write(b"damage")
    code, _, said = start(recipe).finish()
    assert code == 0, said
    assert f"warning: checkpoint {newest} is damaged" in said
    assert f"{before} is used instead" in said
    assert_the_same_run(run, unbroken)


def test_sigterm_to_one_worker_has_all_of_them_save_the_same_step(
    bench: Bench, unbroken: Path, start: Callable[..., Command]
):
    run, recipe = bench.run("told"), bench.recipe("told")
    command = start(recipe)
    command.wait_for_step(run, 4)
    pid, reached = small_runs.worker_pid(run, 1), small_runs.last_step(run)
    os.kill(pid, signal.SIGTERM)
    code, out, said = command.finish()
    assert (code, out) == (75, ""), said
    assert f"because rank 1 (process {pid} on " in said
    assert newest_checkpoint(run) == small_runs.last_step(run) >= reached, "no step that was done is lost"
    index = run / ".ray" / "told-2" / "checkpoint_manager_snapshot.json"  # Ray's own, of the attempt that comes
    index.parent.mkdir(parents=True)
    index.write_text('{"checkpoint_results": [')
    code, _, said = start(recipe).finish()
    assert code == 0, said
    assert_the_same_run(run, unbroken)


@pytest.mark.parametrize("rank", [1, pytest.param(0, marks=pytest.mark.matrix)])
def test_a_worker_that_is_stopped_is_noticed_named_and_replaced(
    bench: Bench, unbroken: Path, start: Callable[..., Command], rank: int
):
    run, stall_s = bench.run(f"hung-{rank}"), 4.0
    command = start(bench.recipe(f"hung-{rank}"), "--set", f"cluster.stall_s={stall_s}")
    command.wait_for_step(run, 4)
    pid, attempt = small_runs.worker_pid(run, rank), RunFolder(run).current_attempt()
    os.kill(pid, signal.SIGSTOP)
    began = time.monotonic()
    command.wait_until(lambda: RunFolder(run).abort_file(attempt).exists(), "the hang to be noticed")
    assert stall_s <= time.monotonic() - began + 1 < 2 * stall_s + 1
    code, _, said = command.finish()
    assert code == 0, said
    assert f"warning: attempt {attempt} hangs: rank {rank} (process {pid} on " in said
    assert f"rank {1 - rank} waits in all_reduce" in said
    log = (run / "log.txt").read_text()
    assert "=== the attempt hangs" in log
    assert f"rank {1 - rank} (process" in log
    assert "is ended because the attempt is given up; its threads" in log
    assert log.count("loop.py") > 1, "both ranks' stacks"
    assert not small_runs.is_alive(pid)
    assert_the_same_run(run, unbroken)


def test_storage_that_fails_for_a_while_makes_the_run_wait_and_breaks_nothing(
    bench: Bench, unbroken: Path, start: Callable[..., Command]
):
    run, aside = bench.run("away"), bench.folder / "checkpoints-away"
    command = start(bench.recipe("away"))
    command.wait_for_step(run, 4)
    checkpoints = run / "checkpoints"
    checkpoints.rename(aside)
    checkpoints.symlink_to(bench.folder / "nowhere")  # as a mount that is gone
    warnings = RunFolder(run).warnings(1)
    command.wait_until(lambda: warnings.exists() and "tried again in 2 s" in warnings.read_text(), "a second try")
    checkpoints.unlink()
    aside.rename(checkpoints)
    code, _, said = command.finish()
    assert code == 0, said
    assert said.count("warning: storage fails: ") >= 2, said
    assert RunFolder(run).current_attempt() == 1
    assert_the_same_run(run, unbroken)


@pytest.mark.matrix
def test_a_worker_that_is_slower_than_the_others_is_named(bench: Bench, start: Callable[..., Command]):
    run = bench.run("slow")
    command = start(bench.recipe("slow", epochs=8))
    command.wait_for_step(run, 2)
    pid = small_runs.worker_pid(run, 1)
    while command.process.poll() is None and small_runs.is_alive(pid):
        with contextlib.suppress(ProcessLookupError):  # the run has ended meanwhile, and Ray the worker
            os.kill(pid, signal.SIGSTOP)
            time.sleep(0.03)
            os.kill(pid, signal.SIGCONT)
            time.sleep(0.01)
    code, _, said = command.finish()
    assert code == 0, said
    assert re.search(r"warning: rank 1 takes \d\.\d times as long for a token", said), said


@pytest.mark.matrix
def test_storage_that_does_not_come_back_ends_the_run_with_what_was_saved(bench: Bench, start: Callable[..., Command]):
    run, aside = bench.run("gone"), bench.folder / "checkpoints-gone"
    command = start(bench.recipe("gone", save_patience_s=2))
    command.wait_for_step(run, 4)
    (run / "checkpoints").rename(aside)
    (run / "checkpoints").symlink_to(bench.folder / "nowhere")
    code, out, said = command.finish()
    assert (code, out) == (1, ""), said
    assert f"{run / 'checkpoints'}" in said
    assert "Traceback" not in said
    (run / "checkpoints").unlink()
    aside.rename(run / "checkpoints")
    code, _, said = start(bench.recipe("gone", save_patience_s=2)).finish()
    assert code == 0, said
    assert "goes on from step" in said


def test_sigint_saves_too_and_exits_130(bench: Bench, start: Callable[..., Command]):
    run = bench.run("interrupted")
    command = start(bench.recipe("interrupted"))
    command.wait_for_step(run, 2)
    command.signal_group(signal.SIGINT)
    code, _, said = command.finish()
    assert code == 130, said
    assert newest_checkpoint(run) == small_runs.last_step(run) >= 2


@pytest.mark.parametrize(
    ("number", "exit_code"), [(signal.SIGTERM, 143), pytest.param(signal.SIGINT, 130, marks=pytest.mark.matrix)]
)
def test_a_second_signal_ends_at_once_and_leaves_no_process(
    bench: Bench, start: Callable[..., Command], number: signal.Signals, exit_code: int
):
    run = bench.run(f"twice-{exit_code}")
    command = start(bench.recipe(f"twice-{exit_code}", max_failures=0))
    command.wait_for_step(run, 2)
    pids = [small_runs.worker_pid(run, rank) for rank in (0, 1)]
    for pid in pids:
        os.kill(pid, signal.SIGSTOP)  # so that the first signal alone cannot end the run
    command.signal_group(number)
    time.sleep(ONE_STOP_S + 0.1)
    command.signal_group(number)
    code, out, said = command.finish()
    assert (code, out) == (exit_code, ""), said
    assert "at once, at the second signal" in said
    assert "Traceback" not in said
    small_runs.wait_for_end_of(pids)


def test_when_the_command_is_killed_ray_and_the_workers_end_too(bench: Bench, start: Callable[..., Command]):
    run = bench.run("shot")
    command = start(bench.recipe("shot"))
    command.wait_for_step(run, 2)
    begun = small_runs.processes_below(command.process.pid)
    assert set(begun) >= {small_runs.worker_pid(run, rank) for rank in (0, 1)}
    addresses = set(small_runs.listening(begun))
    assert addresses <= {"127.0.0.1", "::ffff:127.0.0.1"}, "nobody else may reach the run"
    assert addresses
    command.signal_group(signal.SIGKILL)
    command.finish()
    small_runs.wait_for_end_of(begun, patience_s=300)  # two agents of Ray's notice after a minute and a half


def test_without_restarts_left_the_lost_rank_is_named_and_what_was_saved_stays(
    bench: Bench, start: Callable[..., Command]
):
    run = bench.run("no-restarts")
    command = start(bench.recipe("no-restarts", max_failures=0))
    command.wait_for_step(run, 4)
    pid = small_runs.worker_pid(run, 1)
    small_runs.kill_worker(run, 1)
    code, out, said = command.finish()
    assert (code, out) == (1, ""), said
    assert f"rank 1 (process {pid}" in said
    assert "Traceback" not in said
    assert newest_checkpoint(run) >= 3


def test_a_second_command_on_a_run_is_refused_while_the_first_is_at_work(bench: Bench, start: Callable[..., Command]):
    folder = RunFolder(bench.run("busy"))
    folder.create()
    with folder.lock():
        code, out, said = start(bench.recipe("busy")).finish()
    assert (code, out) == (2, ""), said
    assert f"process {os.getpid()} on " in said


def test_more_workers_than_cores_are_refused_at_once_with_the_numbers(bench: Bench, start: Callable[..., Command]):
    workers = 2 * (os.cpu_count() or 1)
    began = time.monotonic()
    options = ("--set", f"cluster.workers={workers}", "--set", "cluster.cpus_per_worker=1")
    code, out, said = start(bench.recipe("crowd"), *options).finish()
    assert (code, out) == (2, ""), said
    assert f"{workers} workers × 1 CPU = {workers} CPUs; this machine has" in said
    assert time.monotonic() - began < 20
    assert not bench.run("crowd").exists()
