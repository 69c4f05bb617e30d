"""Eight LoRA trials on one base: side by side against one after another, step for step.

The peer holds eight PEFT adapters on one base and trains them in turn with our own packed, label-only forward, so that what
is compared is the fusing alone. Both take the same batches and make the same losses. Then adapters in the top quarter of
the layers, whose frozen activations the trials share; and the memory of eight trials against the base.
"""

from __future__ import annotations

import argparse
import gc
import json
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import workload
from measure import assert_close, comparison, in_turn, now, save, spread

workload.quiet()

TRIALS = 8
LENGTHS = (64, 512)
LAYERS = 16
ALL = "all-linear"
ATTENTION = r".*\.(q_proj|v_proj)"
TOP = r"model\.layers\.(12|13|14|15)\..*_proj"
ROWS = 400
LARGE = {"hidden_size": 1536, "intermediate_size": 4096, "num_attention_heads": 12}
"""The base of which memory is measured, of 1.7 GB: beside a smaller one an adapter is larger than it ever is in practice."""


def main() -> None:
    import torch

    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--rounds", type=int, default=5)
    options.add_argument("--steps", type=int, default=4)
    options.add_argument("--threads", type=int, default=1)
    options.add_argument("--memory", type=Path, help=argparse.SUPPRESS)
    options.add_argument("--targets", help=argparse.SUPPRESS)
    options.add_argument("--checkpointing", action="store_true", help=argparse.SUPPRESS)
    chosen = options.parse_args()
    torch.set_num_threads(chosen.threads)
    if chosen.memory:
        print(json.dumps(held_and_base(chosen.memory, chosen.targets, chosen.checkpointing)))
        return
    lines = []
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        workload.write_model(folder / "model", num_hidden_layers=LAYERS)
        for length in LENGTHS:
            what, aim = f"8 trials, {length} tokens each", "≥ 1.5" if length == 64 else "≥ 0.95"
            lines.append(measured(folder, length, ALL, what, aim, chosen.rounds, chosen.steps))
        what = "8 trials, top quarter of the layers, 64 tokens each"
        lines.append(measured(folder, 64, TOP, what, "≥ 3", chosen.rounds, chosen.steps))
        workload.write_rows(folder / "rows.jsonl", 60, 64)
        (folder / "large").mkdir()
        workload.write_model(folder / "large" / "model", num_hidden_layers=LAYERS, **LARGE)
        workload.write_rows(folder / "large" / "rows.jsonl", 60, 64)
        lines += [
            memory(folder, targets, again) for targets, again in ((ALL, False), (ATTENTION, False), (ATTENTION, True))
        ]
    setting = (
        f"a Llama of {LAYERS} layers and {workload.MODEL['hidden_size']} wide with {workload.VOCABULARY:,} words, fp32; LoRA of "
        f"ranks 4, 8 and 16; {chosen.threads} thread{'s' if chosen.threads > 1 else ''}; seconds of {chosen.steps} optimizer "
        "steps of every trial; frozen activations are kept from epoch to epoch, and the epoch that is timed is not the first; memory beside "
        "a base 1536 wide"
    )
    save("fused_steps", setting, {"losses": "equal to 1e-5 for every trial and step before timing"}, lines)


def recipes(folder: Path, length: int, targets: str, **train_keys: Any) -> list[Any]:
    """Eight trials of different ranks and rates over the same rows."""
    from tunesmith.cluster.recipe.schema import Recipe

    made = []
    for index in range(TRIALS):
        adaptation = {"kind": "lora", "rank": (4, 8, 16)[index % 3], "target_modules": targets}
        train = {"learning_rate": 1e-4 * (index + 1), "max_steps": 10_000, "precision": "fp32", "seed": index}
        train |= train_keys
        written = workload.recipe(folder, f"t{index}", adaptation=adaptation, train=train)
        written["data"]["max_length"] = length
        made.append(Recipe.model_validate(written))
    return made


def measured(folder: Path, length: int, targets: str, what: str, aim: str, rounds: int, steps: int) -> dict[str, Any]:
    """Seconds of so many steps of all trials, by round, once their losses are equal."""
    workload.write_rows(folder / "rows.jsonl", ROWS if length > 64 else 60, length)
    made = recipes(folder, length, targets)
    fused, apart = Fused(folder, made, targets), OneAfterAnother(folder, made)
    for step in range(3):
        for index, (ours, theirs) in enumerate(zip(fused.step(), apart.step(), strict=True)):
            assert_close(f"{what}, trial {index}, step {step + 1}", ours, theirs, 1e-5)
    while fused.trials[0].plan.step(fused.trials[0].step).epoch == 0 and targets == TOP:
        fused.step()
        apart.step()

    def timed(one: Fused | OneAfterAnother) -> Callable[[int], float]:
        def run(_round: int) -> float:
            began = now()
            for _ in range(steps):
                one.step()
            return now() - began

        return run

    figures = in_turn({"fused": timed(fused), "apart": timed(apart)}, rounds)
    return comparison(
        what, "one after another, PEFT", "s", figures["fused"], figures["apart"], ratio="peer/ours", aim=aim
    )


class Fused:
    """Our group."""

    def __init__(self, folder: Path, recipes: list[Any], targets: str) -> None:
        import torch

        from tunesmith.trainers.adaptations.lora import matches
        from tunesmith.trainers.data.prepare import prepare
        from tunesmith.trainers.models import resolve_base, skeleton
        from tunesmith.tuning.eligible import lanes_for
        from tunesmith.tuning.fused.begin import begin
        from tunesmith.tuning.fused.group import Group
        from tunesmith.tuning.fused.trial import Trial

        base = resolve_base(recipes[0].model.base, None, folder)
        data = prepare(recipes[0], base, folder / "cache")
        device = torch.device("cpu")
        names = matches(skeleton(base), targets)
        self.lanes = lanes_for(data.max_length, TRIALS, 1, None)
        self.group = Group(recipes[0], base, data, names, data.max_length, self.lanes, device, torch.float32)
        self.trials = [Trial(one.name, one, data, begin(self.group, one, base), self.group.length) for one in recipes]

    def step(self) -> list[float]:
        """One optimizer step of each trial; their losses."""
        for first in range(0, TRIALS, self.lanes):
            assert self.group.tick(self.trials[first : first + self.lanes]) == []
        losses = [trial.lines[-1]["loss"] for trial in self.trials]
        for trial in self.trials:
            trial.lines.clear()
        return losses


class OneAfterAnother:
    """Eight adapters of one PEFT model, trained in turn."""

    def __init__(self, folder: Path, recipes: list[Any]) -> None:
        import torch

        from tunesmith.trainers import attention, models
        from tunesmith.trainers.data.prepare import prepare
        from tunesmith.trainers.models import resolve_base
        from tunesmith.trainers.packing import BatchPlan
        from tunesmith.trainers.policy import Policy
        from tunesmith.trainers.schedule import Schedule

        base = resolve_base(recipes[0].model.base, None, folder)
        self.data = prepare(recipes[0], base, folder / "cache")
        self.plans = [BatchPlan.of(one, self.data, 1) for one in recipes]
        self.schedules = [Schedule.of(one.train, one.train.max_steps) for one in recipes]
        models_alone = [
            models.build(one, base, device="cpu", dtype=torch.float32, zero3=False) for one in recipes
        ]  # each for its first weights
        self.model: Any = models_alone[0]
        for index, (one, alone) in enumerate(zip(recipes[1:], models_alone[1:], strict=True), start=1):
            self.model.add_adapter(f"a{index}", alone.peft_config["default"])  # type: ignore[union-attr]
            weights = dict(self.model.named_parameters())
            with torch.no_grad():
                for name, weight in alone.named_parameters():
                    if ".default." in name:
                        weights[name.replace(".default.", f".a{index}.")].copy_(weight)
            del one
        self.names = ["default", *(f"a{index}" for index in range(1, TRIALS))]
        self.policy = Policy(self.model, attention.choose("auto", torch.device("cpu"), torch.float32))
        self.parameters = [
            [weight for name, weight in self.model.named_parameters() if f".{adapter}." in name]
            for adapter in self.names
        ]
        self.optimizers = [torch.optim.AdamW(some, weight_decay=0.0, fused=True) for some in self.parameters]
        self.done = 0
        del models_alone
        gc.collect()

    def step(self) -> list[float]:
        """One optimizer step of each trial; their losses."""
        import torch

        from tunesmith.trainers.batch import collate
        from tunesmith.trainers.objectives import OBJECTIVES
        from tunesmith.trainers.policy import score

        losses = []
        for index, adapter in enumerate(self.names):
            self.model.set_adapter(adapter)
            packs = self.plans[index].step(self.done).packs
            labels = sum(int(self.data.train.trained_counts[list(pack)].sum()) for pack in packs)
            batch = collate(self.data.train, packs, float(labels))
            loss, _ = OBJECTIVES["sft"](score(self.policy, batch).logps, batch)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(self.parameters[index], 1.0)
            self.optimizers[index].param_groups[0]["lr"] = self.schedules[index].learning_rate(self.done)
            self.optimizers[index].step()
            self.optimizers[index].zero_grad()
            losses.append(float(loss))
        self.done += 1
        return losses


def memory(folder: Path, targets: str, checkpointing: bool) -> dict[str, Any]:
    """What eight trials hold in bases, in a process of their own."""
    command = [sys.executable, __file__, "--memory", str(folder), "--targets", targets]
    command += ["--checkpointing"] if checkpointing else []
    said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    held, base = json.loads(said.strip().splitlines()[-1])
    how = f"{'all linear layers' if targets == ALL else 'query and value'}, activations "
    how += "computed again" if checkpointing else "kept"
    return {
        "what": f"memory of 8 trials, 64 tokens each, {how}", "against": "the base alone", "unit": "MB", "rounds": 1,
        "aim": "≤ 1.3",
        "ours": spread([held / 1e6]), "peer": spread([base / 1e6]), "ratio": spread([held / base]),
    }  # fmt: skip


def held_and_base(folder: Path, targets: str, checkpointing: bool) -> tuple[int, int]:
    """Bytes that the process holds at its peak while it trains, libraries left out, and those of the base's weights."""
    small = Fused(folder, recipes(folder, 64, ALL), ALL)
    small.step()  # what libraries allocate at their first use is no part of it
    del small
    gc.collect()
    process = psutil.Process()
    before = process.memory_info().rss
    large = folder / "large"
    fused = Fused(large, recipes(large, 64, targets, gradient_checkpointing=checkpointing), targets)
    base = sum(weight.nbytes for name, weight in fused.group.model.named_parameters() if "anchor" not in name)
    Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here: a base is loaded once
    for _ in range(2):
        fused.step()
    peak = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return int(peak.split()[1]) * 1024 - before, base


if __name__ == "__main__":
    main()
