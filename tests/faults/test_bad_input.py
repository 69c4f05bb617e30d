"""What people get wrong: exit code 2, a message that says what and where, no run left behind, and no wait for Ray."""

from __future__ import annotations

import copy
import json
import re
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import small_runs
import yaml
from small_runs import Command

from tunesmith.cluster import main as command_line
from tunesmith.cluster.recipe.load import load_recipe
from tunesmith.cluster.runs import RunFolder
from tunesmith.cluster.session import RaySession
from tunesmith.trainers import launch

Recipe = dict[str, Any]
GOOD = '{"prompt": "What is 1 plus 1?", "completion": " It is 2."}\n'
CHAT = '{"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]}\n'
FILES: dict[str, bytes | str] = {
    "empty.jsonl": "",
    "blank.jsonl": "\n  \n",
    "no-answers.jsonl": '{"prompt": "a", "completion": ""}\n' * 3,
    "broken.jsonl": GOOD * 200 + '{"prompt": "x", \n' + GOOD,
    "latin-1.jsonl": (GOOD * 200).encode() + '{"prompt": "é", "completion": "y"}\n'.encode("latin-1"),
    "no-assistant.jsonl": CHAT * 20 + '{"messages": [{"role": "user", "content": "hi"}]}\n',
    "long.jsonl": GOOD * 9 + json.dumps({"prompt": "a" * 20, "completion": "b" * 300}) + "\n",
    "text.jsonl": '{"text": "some words"}\n' * 20,
    "columns.csv": "question,reply\na,b\n",
    "header.csv": "prompt,completion\n",
    "rows.xlsx": "x",
    "cut.json": '[{"prompt": "a", ',
    "plain": "a file",
}


@dataclass
class Case:
    """A mistake in an otherwise good recipe, and what the message has to say."""

    name: str
    says: list[str]
    changes: dict[str, Any] = field(default_factory=dict)
    """Recipe keys, dotted. `{here}` stands for the folder of files and models."""
    options: tuple[str, ...] = ()


def data(name: str, file: str, *says: str, **keys: Any) -> Case:
    path = "{here}/" + file
    return Case(name, [path, *says], {"data.train": path, **{f"data.{key}": value for key, value in keys.items()}})


def peft(name: str, *says: str, zero: int = 2, **config: Any) -> Case:
    return Case(name, [*says], {"adaptation": {"kind": "peft", "config": config}, "cluster.zero": zero})


IN_THE_RECIPE = [
    Case("misspelt key", ["bad.yaml:", "train.lerning_rate", "learning_rate?"], {"train.lerning_rate": 1}),
    Case("misspelt section", ["trian", "did you mean train?"], {"trian": {"epochs": 1}}),
    Case("wrong type", ["train.learning_rate", "number", "'fast'"], {"train.learning_rate": "fast"}),
    Case("infinite number", ["train.learning_rate", "finite"], {"train.learning_rate": float("inf")}),
    Case("empty section", ["train", "nothing stands under it", "learning_rate"], {"train": None}),
    Case("truth for a number", ["epochs: true is not a number"], {"train.epochs": True}),
    Case("no section", ["train.early_stopping", "patience"], {"train.early_stopping": True}),
    Case("unknown choice", ["objective", "'stf'", "did you mean sft?"], {"objective": "stf"}),
    Case("name", ["name", "'Bad Run'", "lower-case"], {"name": "Bad Run"}),
    Case("two lengths", ["epochs and max_steps are both given"], {"train.epochs": 1, "train.max_steps": 5}),
    Case(
        "nf4 under full",
        ["model.quantization", "use adaptation: lora"],
        {"model.quantization": "nf4", "adaptation": "full"},
    ),
    Case(
        "int8 under ZeRO-3",
        ["model.quantization: int8 gains nothing from cluster.zero: 3", "zero: 2"],
        {"model.quantization": "int8", "cluster.zero": 3},
    ),
    Case(
        "8-bit moments off the GPU",
        ["train.optimizer: adamw_8bit", "cluster.offload: cpu"],
        {"train.optimizer": "adamw_8bit", "cluster.zero": 2, "cluster.offload": "cpu"},
    ),
    Case(
        "shards on a disk in the background",
        ["train.async_save: true does not go with cluster.offload: nvme", "offload: cpu"],
        {"train.async_save": True, "cluster.zero": 3, "cluster.offload": "nvme", "cluster.nvme_path": "disk"},
    ),
    peft("no type of PEFT", "bad.yaml:", "adaptation.config", "peft_type is missing", r=4),
    Case("a weight for one of two", ["1 of 2 sources"], {"data.train": [{"path": "a.jsonl", "weight": 1}, "b.jsonl"]}),
    Case("no target", ["target_modules", "at least one"], {"adaptation": {"kind": "lora", "target_modules": []}}),
    Case("unknown --set", ["--set train.lr=1", "did you mean learning_rate"], options=("--set", "train.lr=1")),
    Case("ill-typed --set", ["--set train.max_steps=abc", "integer"], options=("--set", "train.max_steps=abc")),
    Case("--set of nothing", ["section.key=value"], options=("--set", "train.max_steps")),
    Case("--set in a list", ["data.train is", "has no 1"], options=("--set", "data.train.1.path=x")),
]
BEFORE_THE_DATA = [
    Case("missing model", ["{here}/bsae", "did you mean {here}/base?"], {"model.base": "{here}/bsae"}),
    Case("no model", ["config.json", "{here}/nothing"], {"model.base": "{here}/nothing"}),
    Case("model without tokenizer", ["no tokenizer in {here}/mute", "tokenizer.json"], {"model.base": "{here}/mute"}),
    Case("hub id offline", ["nobody/nothing", "network"], {"model.base": "nobody/nothing"}),
    Case("run that is none", ["no run 'nope'", "{here}/runs"], {"model.base": "run:nope"}),
    Case("revision of a folder", ["model.revision", "only a hub id"], {"model.revision": "main"}),
    Case("target", ["'q_porj'", "q_proj"], {"adaptation": {"kind": "lora", "target_modules": ["q_porj"]}}),
    Case("text as target", ["write a list: [q_proj]"], {"adaptation": {"kind": "lora", "target_modules": "q_proj"}}),
    peft("unknown type of PEFT", "'BOFFT'", "Nearest: BOFT", peft_type="BOFFT"),
    peft("unknown key of PEFT", "boft_blocksize", "boft_block_size", peft_type="BOFT", boft_blocksize=4),
    peft("ill-typed key of PEFT", "config.r: 'four'", "LoraConfig", "integer", peft_type="LORA", r="four"),
    peft("block that does not divide", "PEFT cannot build BOFT", "divisible", peft_type="BOFT", boft_block_size=5),
    peft("target of PEFT", "'q_porj'", "q_proj", peft_type="IA3", target_modules=["q_porj"], feedforward_modules=[]),
    peft("virtual tokens", "packed row", "Types that train:", peft_type="PROMPT_TUNING", num_virtual_tokens=8),
    peft("key of ours", "config.task_type", "CAUSAL_LM", peft_type="LORA", task_type="SEQ_CLS"),
    peft("whole weights under ZeRO-3", "OSF", "ZeRO-3", "cluster.zero to 2", zero=3, peft_type="OSF"),
    Case(
        "workers",
        ["4096 workers × 1 CPU = 4096 CPUs; this machine has", "cluster.workers: "],
        {"cluster.workers": 4096, "cluster.cpus_per_worker": 1},
    ),
    Case("memory", ["× 50000 GiB", "memory_gib_per_worker"], {"cluster.memory_gib_per_worker": 50_000}),
    Case("output below a file", ["{here}/plain is a file", "output.dir"], {"output.dir": "{here}/plain/runs"}),
    Case("output that is read-only", ["/proc/runs", "cannot be written", "output.dir"], {"output.dir": "/proc/runs"}),
    Case("report to nowhere", ["wandb", "not installed", "pip install"], {"output.report_to": ["wandb"]}),
    Case("experts of a dense model", ["router_aux_loss_coef", "no mixture"], {"model.router_aux_loss_coef": 0.1}),
    Case(
        "threshold without ZeRO-3",
        ["zero3_persistence_threshold", "stage is 2"],
        {"cluster.zero": 2, "cluster.zero3_persistence_threshold": 0},
    ),
    Case("disk without offload", ["cluster.nvme_path", "not nvme"], {"cluster.nvme_path": "disk"}),
    Case("fp16 without GPUs", ["fp16 needs GPUs"], {"train.precision": "fp16", "cluster.gpus_per_worker": 0}),
    data("missing file", "brokn.jsonl", "does not exist", "broken.jsonl"),
    data("missing folder", "nowhere/a.jsonl", "does not exist either"),
    data("no match", "*.foo", "matches no file"),
    data("empty file", "empty.jsonl", "empty: it has no rows"),
    data("blank lines", "blank.jsonl", "empty: it has no rows"),
    data("header alone", "header.csv", "empty: it has no rows"),
    data("unknown columns", "columns.csv", "question, reply", "prompt, completion"),
    data("unknown suffix", "rows.xlsx", ".jsonl"),
    data("cut JSON", "cut.json", "cannot be read"),
]
IN_THE_DATA = [
    data("no usable row", "no-answers.jsonl", ":1: `completion` is empty", "3 of 3 rows"),
    data("JSON mid-file", "broken.jsonl", ":201: invalid JSON at character", "max_bad_rows"),
    data("UTF-8 mid-file", "latin-1.jsonl", ":201: invalid UTF-8 at byte 13", "max_bad_rows"),
    data("no assistant", "no-assistant.jsonl", ":21: no assistant turn"),
    data("text for sft", "text.jsonl", "plain text", "objective: cpt"),
    data("nothing left", "rows.jsonl", "longer than 5 (long_rows: drop)", max_length=5, long_rows="drop"),
    Case("longer than the context", ["100,000", "256 tokens", "Set it to 256"], {"data.max_length": 100_000}),
    Case("hub data offline", ["nobody/nothing"], {"data.train": "nobody/nothing"}),
    Case("template of no chat", ["data.template", "no row is a conversation"], {"data.template": "chatml"}),
    Case(
        "evaluation of nothing",
        ["train.eval_steps", "no rows are held out"],
        {"data.split.validation": 0, "train.eval_steps": 2},
    ),
]


@pytest.fixture(scope="module")
def here(tmp_path_factory: pytest.TempPathFactory, tiny_base: Path) -> Path:
    """Good and bad files and models."""
    here = tmp_path_factory.mktemp("bad")
    shutil.copytree(tiny_base, here / "base")
    (here / "nothing").mkdir()
    (here / "mute").mkdir()
    for name in ("config.json", "model.safetensors"):
        shutil.copyfile(tiny_base / name, here / "mute" / name)
    for name, content in FILES.items():
        (here / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    small_runs.write_rows(here / "rows.jsonl", 60)
    return here


@pytest.fixture
def good(here: Path) -> Iterator[Recipe]:
    """A recipe without a mistake; what it leaves is removed."""
    recipe = small_runs.small_recipe("bad", here / "base", here / "rows.jsonl", here / "runs")
    del recipe["train"]["epochs"]
    yield recipe | {"adaptation": "lora"}
    shutil.rmtree(here / "runs", ignore_errors=True)


@pytest.fixture
def starts_of_ray(monkeypatch: pytest.MonkeyPatch) -> list[RaySession]:
    """Sessions that would have begun to start Ray. None is started: these mistakes end before it is needed."""
    started: list[RaySession] = []
    monkeypatch.setattr(RaySession, "start", lambda session: started.append(session))
    monkeypatch.setattr(RaySession, "nodes", lambda _: pytest.fail("no mistake was found"))
    return started


@pytest.fixture
def train(
    here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., tuple[int, str]]:
    """`tunesmith train RECIPE --json` in this process: exit code and standard error; standard output stays empty."""

    def run(recipe: Recipe | str, *options: str) -> tuple[int, str]:
        path = here / "bad.yaml"
        path.write_text(recipe if isinstance(recipe, str) else yaml.safe_dump(recipe))
        monkeypatch.setattr("sys.argv", ["tunesmith", "train", str(path), "--json", *options])
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            command_line.main()
        out, said = capsys.readouterr()
        assert out == ""
        assert "Traceback" not in said
        assert isinstance(ended.value.code, int)
        return ended.value.code, said

    return run


def with_changes(recipe: Recipe, changes: dict[str, Any], here: Path) -> Recipe:
    changed = copy.deepcopy(recipe)
    for key, value in changes.items():
        *sections, last = key.split(".")
        node = changed
        for section in sections:
            node = node.setdefault(section, {})
        node[last] = value.format(here=here) if isinstance(value, str) else value
    return changed


def check(case: Case, good: Recipe, here: Path, train: Callable[..., tuple[int, str]]) -> None:
    code, said = train(with_changes(good, case.changes, here), *case.options)
    assert code == 2, said
    assert said.startswith("error: ")
    for part in case.says:
        assert part.format(here=here) in said, said
    left = {path.name for path in (here / "runs").glob("*")}
    assert left <= {".cache"}, "a run was left behind"


@pytest.mark.parametrize("case", [*IN_THE_RECIPE, *BEFORE_THE_DATA], ids=lambda case: case.name)
def test_a_mistake_is_named_before_ray_is_started(
    case: Case, good: Recipe, here: Path, train: Callable[..., tuple[int, str]], starts_of_ray: list[RaySession]
):
    check(case, good, here, train)
    assert starts_of_ray == []


@pytest.mark.parametrize("case", IN_THE_DATA, ids=lambda case: case.name)
def test_a_mistake_deep_in_the_data_is_named_and_leaves_no_run(
    case: Case, good: Recipe, here: Path, train: Callable[..., tuple[int, str]], starts_of_ray: list[RaySession]
):
    check(case, good, here, train)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "a recipe is a mapping"),
        ("- a\n- b\n", "a recipe is a mapping"),
        ("name: [a\nmodel: b\n", "bad.yaml:2: not valid YAML"),
        ("name: a\n\tmodel: b\n", "bad.yaml:2: not valid YAML"),
        ("name: a\nname: b\n", "bad.yaml:2: name is written twice, first on line 1"),
    ],
)
def test_what_is_no_recipe_is_refused_with_its_line(text: str, says: str, train: Callable[..., tuple[int, str]]):
    code, said = train(text)
    assert code == 2
    assert says in said


@pytest.mark.parametrize(("rule", "count"), [("truncate", "truncated"), ("drop", "dropped"), ("split", "split")])
def test_a_row_longer_than_the_context_goes_by_the_rule_and_is_counted(rule: str, count: str, good: Recipe, here: Path):
    changes = {"data.train": "{here}/long.jsonl", "data.max_length": 256, "data.long_rows": rule}
    path = small_runs.write_recipe(here, with_changes(good, changes, here))
    report = launch.plan(load_recipe(path))["data"]["sources"][0]
    assert (report["rows"], report[count]) == (10, 1)


def test_a_stopped_run_refuses_another_recipe_other_data_and_another_base(
    good: Recipe, here: Path, train: Callable[..., tuple[int, str]], starts_of_ray: list[RaySession]
):
    run = stopped_run(good, here)
    code, said = train(with_changes(good, {"train.learning_rate": 0.5, "train.save_steps": 9}, here))
    assert (code, "train.learning_rate: 0.001 → 0.5" in said, "save_steps" in said) == (2, True, False), said
    assert "--allow-change" in said
    rows = (here / "rows.jsonl").read_text()
    weights = (here / "base" / "model.safetensors").read_bytes()
    try:
        (here / "rows.jsonl").write_text(rows + GOOD)
        (here / "base" / "model.safetensors").write_bytes(weights[:-4] + b"\0\0\0\0")
        code, said = train(good)
    finally:
        (here / "rows.jsonl").write_text(rows)
        (here / "base" / "model.safetensors").write_bytes(weights)
    assert code == 2
    assert f"data file {here / 'rows.jsonl'}: sha256" in said
    assert f"base model {here / 'base'}: sha256" in said
    code, said = train(with_changes(good, {"cluster.zero": 3}, here), "--allow-change")
    assert (
        code,
        "which --allow-change cannot change" in said,
        re.search(r"cluster\.zero: \d → 3", said) is not None,
    ) == (2, True, True)
    assert run.has_checkpoint(), "a refused command must not touch the run"


def stopped_run(recipe: Recipe, here: Path) -> RunFolder:
    """A run as a stop leaves it, as far as a driver looks: what it began with, and a checkpoint."""
    loaded = load_recipe(small_runs.write_recipe(here, recipe))
    with RaySession() as session:
        inputs = launch.check(loaded, session)
    inputs.folder.create()
    inputs.identity.save(inputs.folder.identity)
    (inputs.folder.checkpoints / "step-00000003").mkdir()
    return inputs.folder


def test_a_run_that_trained_nothing_may_begin_anew_with_another_recipe(
    good: Recipe, here: Path, train: Callable[..., tuple[int, str]]
):
    run = stopped_run(good, here)
    (run.checkpoints / "step-00000003").rmdir()
    loaded = load_recipe(small_runs.write_recipe(here, with_changes(good, {"train.learning_rate": 0.5}, here)))
    with RaySession() as session:
        inputs = launch.check(loaded, session)
    assert launch._finished(inputs, False, lambda _: None) is None


def test_what_only_a_worker_can_see_ends_the_run_too_and_leaves_none(good: Recipe, here: Path):
    odd = here / "odd"
    shutil.copytree(here / "base", odd)
    about = json.loads((odd / "config.json").read_text())
    (odd / "config.json").write_text(json.dumps(about | {"note": "trained by experts"}))
    changes = {"model.base": "{here}/odd", "model.router_aux_loss_coef": 0.1}
    code, out, said = Command(small_runs.write_recipe(here, with_changes(good, changes, here))).finish()
    assert (code, out) == (2, ""), said
    assert "model.router_aux_loss_coef" in said
    assert "Traceback" not in said
    assert said.count("attempt") == 0, "a mistake was tried again"
    assert not (here / "runs" / "bad").exists()


@pytest.mark.matrix
def test_a_second_command_is_refused_while_the_first_trains(good: Recipe, here: Path):
    recipe = small_runs.write_recipe(here, with_changes(good, {"train.max_steps": 2000}, here))
    first = Command(recipe)
    try:
        first.wait_for_step(here / "runs" / "bad", 1)
        code, out, said = Command(recipe).finish()
        assert (code, out) == (2, ""), said
        assert f"process {first.process.pid} on " in said
        assert "choose another name" in said
        assert first.process.poll() is None
    finally:
        first.process.terminate()
        code, _, said = first.finish()
    assert code == 75, said
    assert RunFolder(here / "runs" / "bad").has_checkpoint()
