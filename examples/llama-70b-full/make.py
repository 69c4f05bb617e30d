"""Makes what lies beside the recipes: plans, manifests and the arithmetic, by the commands' own functions.

python examples/llama-70b-full/make.py
"""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path
from typing import Any

from rich.console import Console

HERE = Path(__file__).resolve().parent
FLEETS = {"2x8-h100": "2x8xH100-80GB", "4x8-a100": "4x8xA100-80GB"}
STORAGE_GB_S = 2.0
"""10^9 bytes a second that one node writes to the claim: a parallel file system for GPU clusters, by its usual data sheet."""
BEGIN, END = "<!-- made by make.py -->\n", "<!-- end -->\n"


def make(out: Path) -> None:
    """Writes everything below `out`, README.md's tables included."""
    from tunesmith.cluster.imports import switch_off_compiler

    switch_off_compiler()
    from tunesmith.cluster.kube import output

    plans = {name: plan_of(name) for name in FLEETS}
    for name, plan in plans.items():
        folder = out / name
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "plan.json").write_text(json.dumps(plan.as_json(), indent=1) + "\n", encoding="utf-8")
        (folder / "plan.txt").write_text(plan_text(plan), encoding="utf-8")
        output.write(manifests(name), folder / "manifests")
    before, _, rest = (HERE / "README.md").read_text(encoding="utf-8").partition(BEGIN)
    after = rest.partition(END)[2]
    tables = arithmetic(plans)
    (out / "README.md").write_text(f"{before}{BEGIN}\n{tables}\n{END}{after}", encoding="utf-8")


def plan_of(name: str) -> Any:
    """What `tunesmith plan NAME.yaml --fleet FLEET` says."""
    from tunesmith.cluster.fleet import parse_fleet
    from tunesmith.cluster.fleet_file import BUILT_IN, load_fleets
    from tunesmith.cluster.recipe.load import load_recipe
    from tunesmith.trainers.memory.geometry import geometry
    from tunesmith.trainers.memory.plan import make_plan

    recipe = load_recipe(HERE / f"{name}.yaml")
    fleet = parse_fleet(FLEETS[name], load_fleets(BUILT_IN))
    return make_plan(recipe, geometry(recipe.model.base, recipe.output.dir), fleet)


def plan_text(plan: Any) -> str:
    """The same as people read it."""
    from tunesmith.trainers.memory.show import show

    page = io.StringIO()
    show(plan, Console(file=page, width=120, soft_wrap=True, highlight=False, color_system=None), explain=True)
    return "\n".join(line.rstrip() for line in page.getvalue().splitlines()) + "\n"


def manifests(name: str) -> list[dict[str, Any]]:
    """What `tunesmith k8s render` writes with the options that the README gives it."""
    from tunesmith.cluster.kube.commands import Wanted
    from tunesmith.cluster.kube.pods import Placement
    from tunesmith.trainers import kube

    placement = Placement(
        image="tunesmith:0.1.0-gpu",
        namespace="tunesmith",
        queue="tunesmith",
        priority="tunesmith-high",
        secret="tunesmith",
        network={"rdma/ib": 8},
        topology="topology.kubernetes.io/rack",
    )
    wanted = Wanted(HERE / f"{name}.yaml", False, placement, fleet=FLEETS[name], storage_gb_s=STORAGE_GB_S)
    return kube.documents(wanted)


def arithmetic(plans: dict[str, Any]) -> str:
    """Memory, step time and network of both fleets, from the plans' own numbers."""
    rows: list[list[str]] = [["", *(plan.fleet.name for plan in plans.values())]]
    columns = [column(plan) for plan in plans.values()]
    for label in columns[0]:
        rows.append([label, *(found[label] for found in columns)])
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    lines.insert(1, "| --- |" + " ---: |" * len(plans))
    return "\n".join(lines) + "\n"


def column(plan: Any) -> dict[str, str]:
    """Each line of the table for one fleet."""
    return memory(plan) | step(plan) | network(plan) | storage(plan) | run(plan)


def memory(plan: Any) -> dict[str, str]:
    """What a GPU holds."""
    from tunesmith.trainers import zero
    from tunesmith.trainers.memory.shard import MOMENTS

    prediction, engine, gib = plan.prediction, plan.prediction.engine, 2**30
    each, moments = prediction.parameters / plan.fleet.gpus, MOMENTS[engine.optimizer]
    assert zero.gradient_item(engine.stage, engine.item, engine.accumulation) == 4, "the table says sums in 32 bits"
    return {
        "**Memory of a GPU**, GiB": "",
        f"weights: P ÷ N × {engine.item} bytes, P = {prediction.parameters:,}": f"{each * engine.item / gib:.2f}",
        "gradients: P ÷ N × 4 bytes (sums of several micro-batches)": f"{each * 4 / gib:.2f}",
        "optimizer: P ÷ N × (4 bytes of master weight + moments)": f"{each * (4 + moments) / gib:.2f} ({moments:.3g} bytes)",
        "activations, simulated: a hidden state a layer, and one layer whole": f"{prediction.parts['activations'] / gib:.2f}",
        "gathered weights, simulated: a layer, those fetched ahead, those kept": f"{prediction.parts['gathered window'] / gib:.2f}",
        "buckets and logits, simulated": f"{(prediction.parts['buckets'] + prediction.parts['logits']) / gib:.2f}",
        "CUDA, NCCL, fragmentation (estimates)": f"{prediction.overhead.total() / gib:.2f}",
        "in all, of the capacity": f"**{prediction.total / gib:.1f}** of {prediction.capacity / gib:.1f}",
    }


def step(plan: Any) -> dict[str, str]:
    """What takes time, each with the usual share of its peak and, in brackets, the best and the worst."""
    from tunesmith.trainers.memory.roofline import LINKS, MEMORY, UTILISATION, flops_per_token

    prediction, gpu = plan.prediction, plan.fleet.gpu
    work, pieces, time = prediction.work, prediction.time.pieces, prediction.time
    tokens = work.tokens * plan.fleet.gpus

    def timed(piece: str, reached: Any, digits: int = 1) -> str:
        best, worst = (pieces[piece] * reached.usual / share for share in (reached.best, reached.worst))
        return f"{pieces[piece]:.{digits}f} s ({best:.{digits}f} to {worst:.{digits}f})"

    def shares(reached: Any) -> str:
        return f"{reached.usual:.0%} ({reached.best:.0%} to {reached.worst:.0%})"

    return {
        "**A step**": "",
        "tokens: rows × length × accumulation × N": f"{work.tokens / work.context / work.passes:.0f} × {work.context:,} × "
        f"{work.passes} × {plan.fleet.gpus} = {tokens:,.0f}",
        "operations a token, recomputation included": f"{flops_per_token(work) / 1e12:.4f} × 10^12",
        "a GPU's peak, and the rate of its memory": f"{gpu.tflops:g} × 10^12/s, {gpu.memory_gb_s:,g} GB/s",
        f"compute: operations of its tokens, at {shares(UTILISATION)} of the peak": timed("compute", UTILISATION),
        f"memory: accumulation × (10 P + 8 P ÷ N) bytes, at {shares(MEMORY)} of the rate": timed("memory", MEMORY),
        f"messages: what it sends, at {shares(LINKS)} of the link": timed("communication", LINKS),
        f"optimizer: 30 P ÷ N bytes, at {shares(MEMORY)} of the rate": timed("optimizer", MEMORY, 2),
        "the step: the slowest, then the optimizer (at worst all four in turn)": f"**{time.seconds:.1f} s** ({time.low:.1f} to "
        f"{time.high:.1f})",
        "tokens a second": f"{tokens / time.seconds:,.0f}",
    }


def network(plan: Any) -> dict[str, str]:
    """What one GPU sends in a step."""
    from tunesmith.trainers.memory.roofline import sent_bytes

    time, sent = plan.prediction.time, sent_bytes(plan.prediction.work, plan.fleet.gpus)
    return {
        "**Network of a step**": "",
        "a GPU sends: accumulation × 3 P × 2 bytes × (N − 1) ÷ N": f"{sent / 1e9:,.0f} GB",
        "the link: the ring leaves each node once, through": f"{plan.fleet.collective_bytes_s / 1e9:g} GB/s",
        "busy, of the step": f"{time.pieces['communication'] / time.seconds:.0%}",
    }


def storage(plan: Any) -> dict[str, str]:
    """What is written, and what of it lies on the claim at the same time."""
    disk, gib = plan.disk, 2**30
    a_node = disk.checkpoint / plan.fleet.nodes
    rehearsal = 2 * disk.checkpoint + disk.artifact
    return {
        "**A checkpoint**": "",
        "P × (2 bytes of weight + 4 of master weight + moments)": f"{disk.checkpoint / gib:,.0f} GiB",
        f"a node writes, at {STORAGE_GB_S:g} GB/s": f"{a_node / 1e9:,.0f} GB, {a_node / STORAGE_GB_S / 1e9:.0f} s",
        "**On the claim**, GiB": "",
        "the model as it is downloaded: P × 2 bytes": f"{disk.artifact / gib:,.0f}",
        "the rehearsal: 2 checkpoints and an artifact as large as the model": f"{rehearsal / gib:,.0f}",
        "the run: 3 checkpoints (newest, best, being written) and its artifact": f"{disk.peak / gib:,.0f}",
        "in all": f"**{(disk.artifact + rehearsal + disk.peak) / gib:,.0f}**",
    }


def run(plan: Any) -> dict[str, str]:
    """All steps and checkpoints, and what the fleet costs meanwhile."""
    fleet, train = plan.fleet, plan.recipe.train
    saves = plan.steps // train.save_steps
    saving = saves * plan.disk.checkpoint / fleet.nodes / STORAGE_GB_S / 1e9
    hours = [(seconds + saving) / 3600 for seconds in (plan.run.seconds, plan.run.low, plan.run.high)]
    usd = [each * fleet.usd_per_hour for each in hours]
    return {
        "**The run**": "",
        f"{plan.steps:,} steps": f"{plan.run.seconds / 3600:.1f} h ({plan.run.low / 3600:.1f} to {plan.run.high / 3600:.1f})",
        f"{saves} checkpoints, nothing of them hidden": f"{saving / 3600:.1f} h",
        "both": f"**{hours[0]:.1f} h** ({hours[1]:.1f} to {hours[2]:.1f})",
        "GPU hours": f"{hours[0] * fleet.gpus:,.0f}",
        "list price of a GPU hour": f"{fleet.gpu.usd_per_hour:g} USD",
        "at list price": f"{usd[0]:,.0f} USD ({usd[1]:,.0f} to {usd[2]:,.0f})",
    }


if __name__ == "__main__":
    make(Path(sys.argv[1]) if len(sys.argv) > 1 else HERE)
