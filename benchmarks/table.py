"""Writes the tables of results/*.json between the markers in README.md."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
README = HERE.parent / "README.md"
BEGIN, END = "<!-- benchmarks -->", "<!-- /benchmarks -->"
ORDER = (
    "sft_throughput",
    "label_head",
    "startup",
    "checkpoint_stall",
    "mixed_lora",
    "serving",
    "fused_steps",
    "sweep",
    "scheduler",
    "recovery",
)
ONLY = {"serving": "64 adapters"}
"""Of a benchmark with many lines, those that the table shows; all are in results/."""

COMPARISONS = """\
| | against | Tunesmith | the other | ratio | aim |
| --- | --- | ---: | ---: | ---: | ---: |
"""
STALLS = """\
| saving | share of time | a save costs | training stands still | checkpoint | a step |
| --- | ---: | ---: | ---: | ---: | ---: |
"""
FIGURES = """\
| | measured | times | aim |
| --- | ---: | ---: | ---: |
"""


def main() -> None:
    reports = [json.loads((HERE / "results" / f"{name}.json").read_text(encoding="utf-8")) for name in ORDER]
    text = README.read_text(encoding="utf-8")
    if BEGIN not in text or END not in text:
        raise SystemExit(f"README.md has no {BEGIN} … {END}")
    before, rest = text.split(BEGIN, 1)
    after = rest.split(END, 1)[1]
    README.write_text(f"{before}{BEGIN}\n{tables(reports)}{END}{after}", encoding="utf-8")


def tables(reports: list[dict[str, Any]]) -> str:
    """The tables, then what was run and on what."""
    lines = [line for report in reports for line in report["lines"] if ONLY.get(report["name"], "") in line["what"]]
    compared = "".join(compared_row(line) for line in lines if "ratio" in line)
    stalled = "".join(stall_row(line) for line in lines if "share" in line)
    measured = "".join(figure_row(line) for line in lines if "figure" in line)
    settings = "".join(
        f"- `benchmarks/{report['name']}.py` (load {report['machine']['load_average']}): {report['setting']}\n"
        for report in reports
    )
    return f"{COMPARISONS}{compared}\n{STALLS}{stalled}\n{FIGURES}{measured}\n{footnote(reports)}\n\n{settings}"


def compared_row(line: dict[str, Any]) -> str:
    """A line of the first table: medians, and the lowest and highest ratio of a round."""
    unit, ratio = line["unit"], line["ratio"]
    spread = "" if line["rounds"] == 1 else f" ({ratio['low']:.2f}–{ratio['high']:.2f})"
    cells = [
        line["what"], line["against"], f"{number(line['ours']['median'])} {unit}", f"{number(line['peer']['median'])} {unit}",
        f"**{ratio['median']:.2f}**{spread}", line["aim"] or "–",
    ]  # fmt: skip
    return f"| {' | '.join(cells)} |\n"


def stall_row(line: dict[str, Any]) -> str:
    """A line of the second table, all medians."""
    cells = [
        line["what"], f"**{line['share']['median']:.2f} %**",
        f"{line['cost_seconds']['median']:.2f} s ({line['cost_seconds']['low']:.2f}–{line['cost_seconds']['high']:.2f})",
        f"{line['stall_seconds']['median']:.2f} s", f"{line['checkpoint_mb']:.0f} MB", f"{line['step_seconds']['median']:.2f} s",
    ]  # fmt: skip
    return f"| {' | '.join(cells)} |\n"


def figure_row(line: dict[str, Any]) -> str:
    """A line of the third table: the median, and the lowest and highest."""
    found, unit = line["figure"], line["unit"]
    spread = "" if line["rounds"] == 1 else f" ({number(found['low'])}–{number(found['high'])})"
    return (
        f"| {line['what']} | **{number(found['median'])} {unit}**{spread} | {line['rounds']} | {line['aim'] or '–'} |\n"
    )


def number(value: float) -> str:
    """Three digits or whole."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def footnote(reports: list[dict[str, Any]]) -> str:
    """The machine and the libraries."""
    machine = reports[0]["machine"]
    libraries = ", ".join(f"{name} {number}" for name, number in machine["libraries"].items())
    return (
        "Medians over interleaved rounds, with the lowest and highest ratio of a round. Losses, or greedy answers, are compared before any "
        "ratio is printed. The load is the machine's average when a measurement ended: well above the number of cores, "
        f"other work took part of it. {machine['cpu']}, {machine['cores']} cores, {machine['memory_gib']} GiB, "
        f"Python {machine['python']}, {libraries}."
    )


if __name__ == "__main__":
    main()
