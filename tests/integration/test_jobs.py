"""Jobs on a cluster of two nodes on this machine, through the command line, as users meet them."""

from __future__ import annotations

import http.client
import json
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from urllib.parse import urlsplit

import cluster_here
import gathered_code
import psutil
import pytest
import small_runs
import sweeps
from cluster_here import jobs, node_ids, noted, small_job, told, tunesmith, wait_for_state, wait_until

from tunesmith.cluster.jobs import commands
from tunesmith.cluster.jobs.versions import CODE
from tunesmith.cluster.local import Local
from tunesmith.cluster.runs import RunFolder

SECRET = "not-for-anybody-0123456789"


@pytest.fixture(scope="module")
def here(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Local]:
    with cluster_here.cluster_here(tmp_path_factory.mktemp("state")) as known:
        yield known


@pytest.fixture
def bench(tmp_path: Path, tiny_base: Path) -> tuple[Path, Path]:
    return tmp_path, tiny_base


def test_fifty_submissions_with_one_key_are_one_run_that_is_followed_to_its_artifact(
    here: Local, bench: tuple[Path, Path], capfd: pytest.CaptureFixture[str]
) -> None:
    folder, base = bench
    recipe = small_job(folder, base, "fifty")
    (folder / "secret").write_text(SECRET)
    wish = commands.Wish(key="same", environment=[f"SOME_TOKEN=file:{folder / 'secret'}", "COLOUR=blue"])
    with ThreadPoolExecutor(50) as pool:
        list(pool.map(lambda _: commands.submit(recipe, [], wish, as_json=True), range(50)))
    answers = [json.loads(line) for line in capfd.readouterr().out.splitlines()]
    assert len(answers) == 50
    assert len({one["id"] for one in answers}) == 1
    assert Counter(one["new"] for one in answers) == {True: 1, False: 49}
    id = answers[0]["id"]
    assert [one for one in jobs() if one.startswith("fifty-")] == [id]

    followed = tunesmith("logs", "-f", "fifty")
    assert followed.returncode == 0, followed.stderr
    assert "has its workers" in followed.stdout
    assert "saved at" in followed.stdout
    assert f"job {id}: succeeded" in followed.stdout
    assert told("artifacts", id) | {"files": 0} == {
        "artifact": str(folder / "runs/fifty/artifact"),
        "whole": True,
        "files": 0,
    }
    described = told("describe", id)
    assert (described["state"], described["exit_code"], described["attempts"]) == ("succeeded", 0, 1)
    assert [event["text"].split(" ")[0] for event in described["events"]][:1] == ["submitted"]
    again = told("submit", str(recipe), "--key", "same")
    assert (again["id"], again["new"], again["state"]) == (id, False, "succeeded")
    other = tunesmith("submit", str(recipe), "--key", "same", "--set", "train.epochs=3")
    assert other.returncode == 2
    assert f"job {id} of the same key is succeeded with another recipe" in other.stderr

    shown = json.dumps(jobs()) + ask(here, "/api/jobs/", token(here))[1] + followed.stdout
    shown += "".join(path.read_text(errors="replace") for path in (folder / "runs").rglob("*") if path.is_file())
    shown += "".join(path.read_text(errors="replace") for path in Path(here.scratch).rglob("*.log") if path.is_file())
    assert "COLOUR" in shown
    assert "file:" in shown
    assert SECRET not in shown


def test_a_secret_in_the_open_is_refused_and_not_repeated(here: Local, bench: tuple[Path, Path]) -> None:
    folder, base = bench
    token = "hf_" + "a1" * 17
    refused = tunesmith("submit", str(small_job(folder, base, "bare")), "--set", f"model.revision={token}x/{token}")
    assert refused.returncode == 2
    assert "model.revision: looks like a Hugging Face token" in refused.stderr
    assert token not in refused.stderr
    refused = tunesmith("submit", str(small_job(folder, base, "bare")), "--env", f"WANDB_API_KEY={token}")
    assert refused.returncode == 2
    assert "--env WANDB_API_KEY=file:/path" in refused.stderr


def test_nothing_listens_but_on_loopback_and_nobody_is_answered_without_the_token(here: Local) -> None:
    listening = listeners(here)
    assert len(listening) >= 10, listening  # head, node, dashboard, agents
    assert [one for one in listening if one.rpartition(":")[0] not in ("127.0.0.1", "::ffff:127.0.0.1")] == []
    for path in ("/api/jobs/", "/api/version", "/nodes?view=summary", "/api/v0/actors", "/api/cluster_status", "/logs"):
        assert ask(here, path)[0] == 401, path
        assert ask(here, path, "0" * 64)[0] == 403, path
    assert ask(here, "/api/jobs/", body=json.dumps({"entrypoint": "true"}))[0] == 401
    assert ask(here, "/api/jobs/", token(here))[0] == 200
    assert here.token_file.stat().st_mode & 0o777 == 0o600
    for pid in (one.pid for one in here.members):
        assert token(here) not in Path(f"/proc/{pid}/cmdline").read_text()


def test_a_wrong_token_is_said_to_be(here: Local, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_AUTH_TOKEN", "0" * 64)
    listed = tunesmith("jobs")
    assert "does not take this token" in listed.stderr


@pytest.mark.matrix
def test_a_higher_priority_takes_the_workers_and_the_lower_goes_on_where_it_saved(
    here: Local, bench: tuple[Path, Path]
) -> None:
    folder, base = bench
    run = folder / "runs/low"
    low = told("submit", str(small_job(folder, base, "low", epochs=5)))["id"]
    wait_until(lambda: small_runs.last_step(run) >= 4, "step 4")
    with small_runs.frozen(run):
        high = told("submit", str(small_job(folder, base, "high")), "--priority", "5")["id"]
        wait_until(lambda: "0 of 2 workers of 1 CPU fit now" in noted(folder / "runs/high", high)["why"], "a reason")
        wait_until(lambda: noted(run, low)["state"] == "saving", "preemption")
    wait_for_state(high, "succeeded")
    assert wait_for_state(low, "succeeded")["exit_code"] == 0
    texts = " | ".join(event["text"] for event in told("describe", low)["events"])
    assert f"is told to save: it makes room for {high}" in texts
    assert "has saved, and waits again: the newest checkpoint is step" in texts
    assert RunFolder(run).current_attempt() == 2
    steps = [line[0] for line in small_runs.what_was_learned(run) if line[1] is not None]
    assert steps == list(range(1, len(steps) + 1))


@pytest.mark.matrix
def test_a_stopped_job_has_saved_and_submitted_again_goes_on(here: Local, bench: tuple[Path, Path]) -> None:
    folder, base = bench
    run = RunFolder(folder / "runs/halted")
    recipe = small_job(folder, base, "halted", epochs=5)
    first = told("submit", str(recipe))["id"]
    wait_until(lambda: small_runs.last_step(run.root) >= 4, "step 4")
    with ThreadPoolExecutor(1) as pool:
        with small_runs.frozen(run.root):
            stopping = pool.submit(told, "stop", first)
            wait_until(run.stop_file.exists, "request to stop")
        stopped = stopping.result()
    assert stopped["state"] == "stopped"
    saved = run.newest_step()
    assert saved == small_runs.last_step(run.root) >= 4
    again = told("submit", str(recipe))
    assert (again["number"], again["new"]) == (2, True)
    wait_for_state(again["id"], "succeeded")
    assert f"goes on from step {saved}" in tunesmith("logs", again["id"]).stdout


@pytest.mark.matrix
def test_other_versions_end_a_job_with_what_differs_and_shipped_code_is_what_runs(
    here: Local, bench: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, base = bench
    recipe = small_job(folder, base, "other")
    gather, real = commands.gather, commands.here
    monkeypatch.setattr(commands, "here", lambda: {**real(), CODE: "0" * 12, "torch": "1.0"})
    commands.submit(recipe, [], commands.Wish(), as_json=True)
    (id,) = (one for one in jobs() if one.startswith("other-"))
    failed = wait_for_state(id, "failed")
    assert failed["exit_code"] == 2
    said = tunesmith("logs", id).stdout
    assert "tunesmith's code: 000000000000 where it was submitted" in said
    assert "torch: 1.0 where it was submitted" in said

    def changed(folder: Path) -> Path:
        package = gather(folder)
        with (package / "trainers" / "loop.py").open("a") as module:
            module.write('\nprint("the code that was sent", flush=True)\n')
        return package

    code = gathered_code.digest(changed(folder / "sent").parent)
    assert code != real()[CODE]
    monkeypatch.setattr(commands, "gather", changed)
    monkeypatch.setattr(commands, "here", lambda: {**real(), CODE: code})
    commands.submit(recipe, ["train.max_steps=2", "train.epochs=null"], commands.Wish(ship_code=True), as_json=True)
    (second,) = (one for one in jobs() if one.startswith("other-") and one != id)
    wait_for_state(second, "succeeded")  # its driver has found the code that it was promised
    assert "the code that was sent" in (folder / "runs/other/log.txt").read_text()


@pytest.mark.matrix
def test_workers_are_on_the_nodes_that_the_queue_has_chosen(
    here: Local, bench: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, base = bench
    both = told("submit", str(small_job(folder, base, "both", epochs=20)))["id"]
    wait_until(lambda: small_runs.last_step(folder / "runs/both") >= 1, "step 1")
    with small_runs.frozen(folder / "runs/both"):
        below = [pid for one in here.members for pid in small_runs.processes_below(one.pid)]
        said = {word for pid in below for word in psutil.Process(pid).cmdline() if word.startswith("--place=")}
    assert said == {f"--place={id}=1" for id in node_ids(here)}
    told("stop", both)

    monkeypatch.setenv("RAY_ADDRESS", here.address)
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(here.token_file))
    for member, id in zip(here.members, node_ids(here), strict=True):
        name = f"on-{member.spec.name}"
        run = folder / "runs" / name
        command = small_runs.Command(small_job(folder, base, name, workers=1, epochs=100), f"--place={id}=1")
        command.wait_for_step(run, 1)
        with small_runs.frozen(run):
            assert small_runs.worker_pid(run, 0) in small_runs.processes_below(member.pid)
            command.process.terminate()
        assert command.finish()[0] == 75


@pytest.mark.matrix
def test_a_sweep_is_one_job_of_its_whole_size_that_makes_room_and_ends_with_its_winner(
    here: Local, bench: tuple[Path, Path]
) -> None:
    folder, base = bench
    tune = {"execution": "isolated", "trials": 2, "concurrent": 2, "reports": 4}
    written = sweeps.sweep_recipe(sweeps.with_base_and_rows(folder), "search", {"max_steps": 120}, **tune)
    recipe = small_runs.write_recipe(folder, written)
    search = told("submit", str(recipe))["id"]
    run = folder / "runs/search"
    wait_until(lambda: list(run.glob("trials/*/reports.jsonl")), "report of a trial")
    with small_runs.frozen(*(path.parent for path in run.glob("trials/*/run-*/control"))):
        high = told("submit", str(small_job(folder, base, "urgent", workers=1)), "--priority", "5")["id"]
        wait_until(lambda: noted(run, search)["state"] == "saving", "preemption")
    wait_for_state(high, "succeeded")
    assert wait_for_state(search, "succeeded")["exit_code"] == 0

    described = told("describe", search)
    assert (described["kind"], described["trials"], described["trials_ended"]) == ("sweep", 2, 2)
    texts = " | ".join(event["text"] for event in described["events"])
    assert "has its workers: 2 workers of 1 CPU" in texts
    assert f"is told to save: it makes room for {high}" in texts
    assert "has saved, and waits again: of its trials 2 were begun, and 0 of these have ended" in texts
    assert "going on with search: 2 trials with" in tunesmith("logs", search).stdout
    assert told("artifacts", "search")["whole"]
    assert {one["state"] for one in sweeps.results(folder, "search")["trials"]} == {"finished"}


@pytest.mark.matrix
def test_a_sweep_whose_trials_share_a_base_is_stopped_and_goes_on_and_one_that_cannot_begin_says_why(
    here: Local, tmp_path: Path
) -> None:
    written = sweeps.sweep_recipe(sweeps.with_base_and_rows(tmp_path), "shared", concurrent=2, trials=500)
    recipe = small_runs.write_recipe(tmp_path, written)
    wrong = told("submit", str(recipe), "--set", "tune.metric=accuracy", "--set", "name=wrong")["id"]
    first = told("submit", str(recipe))["id"]
    wait_until(lambda: RunFolder(tmp_path / "runs/shared").trials()[1], "trial that has ended")
    stopped = told("stop", first)
    assert (stopped["state"], stopped["exit_code"]) == ("stopped", 75)
    assert tunesmith("artifacts", first).returncode == 2
    again = told("submit", str(recipe))
    assert (again["number"], again["new"]) == (2, True)
    ended = told("describe", first)["trials_ended"]
    wait_until(lambda: RunFolder(tmp_path / "runs/shared").trials()[1] > ended, "further trials")
    told("stop", again["id"])
    assert "going on with shared" in tunesmith("logs", again["id"]).stdout
    assert "has its workers: 1 worker of 1 CPU" in tunesmith("logs", again["id"]).stdout

    assert wait_for_state(wrong, "failed")["exit_code"] == 2
    assert "no trial reports 'accuracy'" in tunesmith("logs", wrong).stdout


def token(here: Local) -> str:
    return here.token_file.read_text()


def ask(here: Local, path: str, token: str | None = None, body: str | None = None) -> tuple[int, str]:
    """Status and text of a plain request to the dashboard."""
    at = urlsplit(here.dashboard)
    connection = http.client.HTTPConnection(at.hostname or "", at.port, timeout=60)
    headers = {"Authorization": f"Bearer {token}"} if token else {}
    connection.request("POST" if body else "GET", path, body, headers)
    answer = connection.getresponse()
    return answer.status, answer.read().decode(errors="replace")


def listeners(here: Local) -> list[str]:
    """`address:port` of every socket on which a process of the cluster listens."""
    pids = [one.pid for one in here.members]
    pids += [pid for one in here.members for pid in small_runs.processes_below(one.pid)]
    found = []
    for pid in pids:
        for connection in psutil.Process(pid).net_connections("inet"):
            if connection.status == psutil.CONN_LISTEN:
                found.append(f"{connection.laddr.ip}:{connection.laddr.port}")
    return found
