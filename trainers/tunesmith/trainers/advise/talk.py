"""The advice for people: what was measured, what fits, what to do and why."""

from __future__ import annotations

from rich.console import Console, Group
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from tunesmith.trainers.advise.command import Report
from tunesmith.trainers.advise.room import gib
from tunesmith.trainers.advise.rules import DIFFERENT, SIMILAR

_COLOURS = {"similar": "green", "between": "yellow", "different": "red", "unknown": "dim"}
_WAYS = {"full": "every weight", "lora": "LoRA", "qlora": "QLoRA (NF4)"}


def show(report: Report, console: Console) -> None:
    """Prints the advice, wrapped to the console's width."""
    facts, advice, fleet = report.facts, report.advice, report.fleet
    table = Table.grid(padding=(0, 2))
    table.add_column(style="bold", no_wrap=True)
    table.add_column()
    table.add_row("Data", Text("\n".join(report.counts.lines)))
    table.add_row(
        "Base", Text(f"{report.base.reference}: {_count(facts.size.parameters)} parameters ({report.base.known_from})")
    )
    table.add_row("Loss", _loss(report))
    table.add_row(
        "Goal",
        Text(facts.goal if report.goal_given else f"{facts.goal} (guessed from the data; --goal says otherwise)"),
    )
    shape = "" if fleet.gpus == 1 else f"{fleet.gpus} × "
    table.add_row(
        "Fleet", Text(f"{fleet.name}: {shape}{fleet.gpu.name}, {gib(fleet.gpu.memory_gib)}{' each' if shape else ''}")
    )
    table.add_row("Memory", _memory(report))
    rank = "" if advice.rank is None else f" of rank {advice.rank}"
    epochs = "1 epoch" if advice.epochs == 1 else f"{advice.epochs} epochs"
    chosen = f"{advice.objective} with {_WAYS[advice.way]}{rank}, learning rate {advice.learning_rate:g}, {epochs}"
    table.add_row("Advice", Text(chosen, style="bold green"))
    table.add_row("Why", _sentences(advice.reasons))
    if advice.cautions:
        table.add_row("But", _sentences(advice.cautions))
    console.print(table, soft_wrap=False)
    next_command = (f"tunesmith train {report.path} --dry-run", "cyan")
    console.print(Text.assemble("\nThe recipe is written. Next: ", next_command))


def _loss(report: Report) -> Text:
    loss, closeness = report.loss, report.facts.closeness
    if isinstance(loss, str):
        return Text(f"not measured: {loss}", style="dim")
    limits = {"similar": f"under {SIMILAR}", "between": f"{SIMILAR} to {DIFFERENT}", "different": f"over {DIFFERENT}"}
    return Text.assemble(
        f"{loss.bits_per_byte:.2f} ± {loss.standard_error:.2f} bits a byte ({loss.nats_per_token:.2f} nats a token) on {loss.rows} rows with "
        f"{loss.tokens:,} tokens: ",
        (closeness, _COLOURS[closeness]),
        f" ({limits[closeness]})",
    )


def _memory(report: Report) -> Table:
    """A line for each layout that was simulated: memory of a worker, and whether it fits."""
    rows = Table.grid(padding=(0, 2))
    rows.add_column()
    rows.add_column(justify="right")
    rows.add_column()
    for layout in report.advice.considered:
        named = [_WAYS[layout.way]]
        named += [f"ZeRO-{layout.zero}"] if layout.zero else []
        named += ["gradient checkpointing"] if layout.checkpointing else []
        verdict = Text("fits", "green") if layout.fits else Text("does not fit", "red")
        rows.add_row(", ".join(named), gib(layout.gib), verdict)
    return rows


def _sentences(sentences: list[str]) -> Group:
    return Group(*(Padding(Text(sentence), 0) for sentence in sentences))


def _count(parameters: int) -> str:
    return f"{parameters / 1e9:.3g} billion" if parameters >= 1e9 else f"{parameters / 1e6:.3g} million"
