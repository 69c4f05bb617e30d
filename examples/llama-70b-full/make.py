"""Makes what lies beside the recipes: plans, manifests and the arithmetic, by the commands' own functions.

python examples/llama-70b-full/make.py
"""

from __future__ import annotations

import io
import json
import os
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
    os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")
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
    from tunesmith.trainers import zero
    from tunesmith.trainers.memory.roofline import UTILISATION, flops_per_token, sent_bytes
    from tunesmith.trainers.memory.shard import MOMENTS

    prediction, work, fleet, engine = plan.prediction, plan.prediction.work, plan.fleet, plan.prediction.engine
    gib, gpus = 2**30, fleet.gpus
    each = prediction.parameters / gpus
    moments = MOMENTS[engine.optimizer]
    gradient = zero.gradient_item(engine.stage, engine.item, engine.accumulation)
    sent = sent_bytes(work, gpus)
    pieces, tokens = prediction.time.pieces, work.tokens * gpus
    flops = flops_per_token(work)
    a_node = plan.disk.checkpoint / fleet.nodes
    run = plan.run
    return {
        "**Memory of a GPU**, GiB": "",
        f"weights: P ÷ N × {engine.item} bytes, P = {prediction.parameters:,}": f"{each * engine.item / gib:.2f}",
        "gradients: P ÷ N × 4 bytes (sums of several micro-batches)"
        if gradient == 4
        else "gradients: P ÷ N × 2 bytes": f"{each * gradient / gib:.2f}",
        "optimizer: P ÷ N × (4 bytes of master weight + moments)": f"{each * (4 + moments) / gib:.2f} ({moments:.3g} bytes)",
        "activations: a hidden state a layer, and one layer whole": f"{prediction.parts['activations'] / gib:.2f}",
        "gathered weights: a layer, those fetched ahead, those kept": f"{prediction.parts['gathered window'] / gib:.2f}",
        "buckets and logits": f"{(prediction.parts['buckets'] + prediction.parts['logits']) / gib:.2f}",
        "CUDA, NCCL, fragmentation (estimates)": f"{prediction.overhead.total() / gib:.2f}",
        "in all, of the capacity": f"**{prediction.total / gib:.1f}** of {prediction.capacity / gib:.1f}",
        "**A step**": "",
        "tokens: rows × length × accumulation × N": f"{work.tokens / work.context / work.passes:.0f} × {work.context:,} × "
        f"{work.passes} × {gpus} = {tokens:,.0f}",
        "operations a token, recomputation included": f"{flops / 1e12:.3f} × 10^12",
        f"compute: at {UTILISATION.usual:.0%} of the peak": f"{pieces['compute']:.1f} s",
        "memory traffic": f"{pieces['memory']:.1f} s",
        "messages": f"{pieces['communication']:.1f} s",
        "optimizer": f"{pieces['optimizer']:.2f} s",
        "the step: the slowest, and the optimizer": f"**{prediction.time.seconds:.1f} s** ({prediction.time.low:.1f} to "
        f"{prediction.time.high:.1f})",
        "tokens a second": f"{tokens / prediction.time.seconds:,.0f}",
        "**Network of a step**": "",
        "a GPU sends: passes × 3 P × 2 bytes × (N − 1) ÷ N": f"{sent / 1e9:,.0f} GB",
        "the ring leaves each node once, through": f"{fleet.network_gb_s:g} GB/s",
        "busy, of the step": f"{pieces['communication'] / prediction.time.seconds:.0%}",
        "**A checkpoint**": "",
        "size": f"{plan.disk.checkpoint / gib:,.0f} GiB",
        f"a node writes, at {STORAGE_GB_S:g} GB/s": f"{a_node / 1e9:,.0f} GB, {a_node / STORAGE_GB_S / 1e9:.0f} s",
        "on the claim at most": f"{plan.disk.peak / gib / 1024:.1f} TiB",
        "**The run**": "",
        f"{plan.steps:,} steps": f"{run.seconds / 3600:.1f} h ({run.low / 3600:.1f} to {run.high / 3600:.1f})",
        "GPU hours": f"{run.seconds / 3600 * gpus:,.0f}",
        "at list price": f"{run.usd:,.0f} USD ({run.usd_low:,.0f} to {run.usd_high:,.0f})",
    }


if __name__ == "__main__":
    make(Path(sys.argv[1]) if len(sys.argv) > 1 else HERE)
