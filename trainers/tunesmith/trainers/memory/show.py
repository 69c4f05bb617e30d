"""A plan as people read it: a bar that is the device's memory, where it goes, and what to change."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.console import Console, Group
from rich.table import Table
from rich.text import Text

from tunesmith.trainers.memory.plan import Plan, describe, gib

if TYPE_CHECKING:
    from rich.console import RenderableType

COLOURS = {
    "weights": "blue",
    "adapter": "bright_blue",
    "gradients": "yellow",
    "optimizer state": "magenta",
    "activations": "green",
    "logits": "bright_green",
    "gathered window": "cyan",
    "buckets": "bright_cyan",
}
BAR = 60
"""Characters of the bar that stand for the device's whole memory."""


def show(plan: Plan, console: Console, explain: bool = False) -> None:
    """Prints the plan."""
    parts: list[RenderableType] = [_title(plan), Text(), _bar(plan), _where(plan), Text(), _verdict(plan)]
    if plan.chosen:
        parts.append(
            Text("chosen for auto: " + ", ".join(f"{key}: {_yaml(value)}" for key, value in plan.chosen.items()))
        )
    parts += [Text(), _time(plan)]
    if plan.alternatives:
        parts += [Text(), _alternatives(plan)]
    elif not plan.prediction.fits:
        parts += [Text(), Text("No change of stage, offload, checkpointing, rows, adaptation or number of GPUs fits.")]
    if explain:
        from tunesmith.trainers.memory.explain import explanation

        parts += [Text(), *(Text(line) for line in explanation(plan))]
    console.print(Group(*parts))


def _title(plan: Plan) -> Text:
    prediction = plan.prediction
    what = plan.recipe.adaptation.kind + (
        f" over {plan.recipe.model.quantization}" if plan.recipe.model.quantization else ""
    )
    by = " as the HF Trainer would" if plan.as_hf else ""
    return Text.assemble(
        (plan.model.name, "bold"),
        f"  {prediction.parameters / 1e9:.3g}B parameters, {prediction.trainable / 1e6:,.1f}M trained ({what}){by}\n",
        (plan.fleet.name, "bold"),
        f"  {prediction.workers} × {plan.fleet.gpu.name}, {gib(prediction.capacity):.1f} GiB each; "
        f"rows of {plan.length:,} tokens, {plan.recipe.train.per_device_train_batch_size} at a time"
        f"{_sharding(plan)}{_other_workers(plan)}",
    )


def _other_workers(plan: Plan) -> str:
    """That the fleet has another number of workers than the recipe says."""
    written = plan.recipe.cluster.most_workers
    if written == plan.prediction.workers or "workers" not in plan.recipe.cluster.model_fields_set:
        return ""
    return f"\n(the recipe says cluster.workers: {written}; a plan uses the whole fleet)"


def _sharding(plan: Plan) -> str:
    engine = plan.prediction.engine
    checkpointing = ", gradient checkpointing" if plan.recipe.train.gradient_checkpointing else ""
    if engine is None or (engine.workers == 1 and engine.stage < 2):
        return checkpointing
    offload = f", offload to {engine.offload}" if engine.offload != "none" else ""
    return f", ZeRO-{engine.stage}{offload}{checkpointing}"


def _bar(plan: Plan) -> Text:
    """The device as a line: each cause in its colour, what is free as dots, what is too much beyond the border."""
    prediction = plan.prediction
    bar = Text()
    pieces = [(COLOURS.get(cause, "white"), size) for cause, size in prediction.parts.most_common()]
    pieces.append(("bright_black", prediction.overhead.total()))
    reached, drawn = 0, 0
    for colour, size in pieces:
        reached += size
        upto = min(round(reached / prediction.capacity * BAR), 2 * BAR)
        for position in range(drawn, upto):
            if position == BAR:
                bar.append("│", "bold red")
            bar.append("█", colour)
        drawn = max(drawn, upto)
    if drawn < BAR:
        bar.append("·" * (BAR - drawn), "bright_black")
    if drawn <= BAR:
        bar.append("│", "bold")
    if reached > 2 * prediction.capacity:
        bar.append("→", "bold red")
    return bar


def _where(plan: Plan) -> Table:
    prediction = plan.prediction
    table = Table(box=None, show_header=False, padding=(0, 2, 0, 0))
    table.add_column(justify="left", no_wrap=True)
    table.add_column(justify="right", no_wrap=True)
    for cause, size in prediction.parts.most_common():
        table.add_row(Text.assemble(("█ ", COLOURS.get(cause, "white")), cause), f"{gib(size):,.2f} GiB")
    table.add_row(Text("  allocated", "bold"), f"{gib(prediction.allocated):,.2f} GiB")
    details = ", ".join(f"{cause} {gib(size):.2f}" for cause, size in prediction.overhead.items() if size)
    table.add_row(
        Text.assemble(("█ ", "bright_black"), f"overhead ({details})"),
        f"{gib(prediction.overhead.total()):,.2f} GiB",
    )
    table.add_row(Text("  in all", "bold"), Text(f"{gib(prediction.total):,.2f} GiB", "bold"))
    return table


def _verdict(plan: Plan) -> Text:
    prediction = plan.prediction
    left = gib(prediction.capacity - prediction.total)
    if prediction.fits:
        return Text.assemble(("fits", "bold green"), f", {left:,.1f} GiB to spare; most is held at: {prediction.worst}")
    return Text.assemble(("does not fit", "bold red"), f": {-left:,.1f} GiB too much at: {prediction.worst}")


def _time(plan: Plan) -> Text:
    prediction, time = plan.prediction, plan.prediction.time
    tokens = prediction.work.tokens * prediction.workers
    lines = [
        f"a step of {tokens:,.0f} tokens  {_span(time.seconds)} ({_span(time.low)} to {_span(time.high)}), "
        f"bound by {time.bound_by}; {tokens / time.seconds:,.0f} tokens a second"
    ]
    if plan.run is not None:
        price = (
            ""
            if plan.run.usd is None
            else f", {plan.run.usd:,.2f} USD ({plan.run.usd_low:,.2f} to {plan.run.usd_high:,.2f})"
        )
        lines.append(f"{plan.steps:,} steps (from {plan.steps_from})  {_span(plan.run.seconds)}{price}")
    elif plan.fleet.usd_per_hour:
        price = plan.fleet.usd_per_hour * time.seconds / 3600 / tokens * 1e9
        lines.append(f"a billion tokens  {price:,.0f} USD at {plan.fleet.usd_per_hour:.2f} USD an hour")
    lines.append(f"disk  {gib(plan.disk.peak):,.1f} GiB at most, {gib(plan.disk.checkpoint):,.1f} a checkpoint")
    return Text("\n".join(lines))


def _alternatives(plan: Plan) -> Text:
    lines = Text.assemble(
        ("What fits, the cheapest first", "bold"), ("\n    GiB  GPUs  GPU time  change", "bright_black")
    )
    for one in plan.alternatives:
        note = f"  (and {one.host_gib:,.0f} GiB of host memory each)" if one.host_gib else ""
        size = gib(one.prediction.total)
        lines.append(f"\n{size:7,.1f}  {one.gpus:4}  × {one.costs:6.2f}  {_brief(one.changes)}{note}")
    return lines


def _brief(changes: dict[str, object]) -> str:
    """Changes without the names of their sections."""
    return ", ".join(part.rpartition(".")[2].removesuffix(": true") for part in describe(changes).split(", "))


def _span(seconds: float) -> str:
    """A time as people say it."""
    for unit, size in (("days", 86400.0), ("h", 3600.0), ("min", 60.0)):
        if seconds >= 2 * size:
            return f"{seconds / size:,.1f} {unit}"
    return f"{seconds:.3g} s"


def _yaml(value: object) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)
