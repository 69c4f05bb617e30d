"""The report's drawings, as inline SVG: parallel coordinates, learning curves, and the best so far against time.

A trial is drawn with a CSS class for its look (its rank's colour, "best" or "none") and with `data-t`, its number,
by which the page finds all its marks. Positions are in the units of each drawing's viewBox.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape
from itertools import pairwise
from typing import Any

from tunesmith.tuning import axes
from tunesmith.tuning.axes import Axis
from tunesmith.tuning.wording import compact, duration, measure, setting

Drawn = Sequence[tuple[dict[str, Any], str]]  # trials and their looks, in the order in which they are drawn
Tick = tuple[float, str]

WIDTH, HEIGHT = 520, 320  # of the two charts over tokens and time
LEFT, RIGHT, TOP, BOTTOM = 60, 504, 14, 272
PARALLEL_WIDTH, PARALLEL_SIDE, PARALLEL_BETWEEN = 1000, 80, 84  # at least; beside the outer axes; between two axes
PARALLEL_HEIGHT, PARALLEL_TOP, PARALLEL_BOTTOM = 430, 84, 412
_LETTER = 6.9  # width of one letter of an axis's name


def is_number(value: Any) -> bool:
    """Whether a metric is there and finite."""
    return value is not None and math.isfinite(value)


def parallel(results: dict[str, Any], drawn: Drawn, metric: Axis) -> str:
    """One axis for each key of the space and one for the metric, one line for each trial.

    A line has a gap, faintly dotted, where a key does not apply to its trial, and ends before the metric's axis where
    the trial has no result.

    Args:
        metric: the metric's scale; its better end is drawn at the top.
    """
    keys = list(results["space"])
    width = max(PARALLEL_WIDTH, 2 * PARALLEL_SIDE + PARALLEL_BETWEEN * len(keys))
    between = (width - 2 * PARALLEL_SIDE) / max(1, len(keys))
    scales = [
        axes.of_space(results["space"][key], [trial["values"][key] for trial, _ in drawn if key in trial["values"]])
        for key in keys
    ]
    staggered = between < 130
    has_results = any(look != "none" for _, look in drawn)
    under, over = "", ""  # the texts lie over the lines
    for n, (key, scale) in enumerate(zip([*keys, results["metric"]], [*scales, metric], strict=True)):
        is_metric = n == len(keys)
        ticks = scale.ticks() if not is_metric else axes.metric_ticks(scale) if has_results else []
        places = [(_height(scale.share(value), is_metric and results["mode"] == "min"), text) for value, text in ticks]
        x = PARALLEL_SIDE + n * between
        raised = 32 if staggered and n % 2 else 0
        under += _axis(x, [y for y, _ in places], raised)
        room = int(between * (1.9 if staggered else 0.95) / _LETTER)
        over += _axis_texts(x, key, places, raised, room, is_metric)
    lines = "".join(_parallel_line(results, trial, look, scales, metric, between) for trial, look in drawn)
    narrowest, head = int(0.72 * width), 0 if staggered else 32
    return (
        f'<svg class="parallel" viewBox="0 {head} {width} {PARALLEL_HEIGHT - head}" style="min-width:{narrowest}px" role="img" '
        f'aria-label="Parallel coordinates of {len(drawn)} trials">{under}{lines}{over}</svg>'
    )


def learning_curves(results: dict[str, Any], drawn: Drawn, metric: Axis) -> str:
    """The metric against the tokens trained, one line a trial; nothing but a sentence where nothing was reported."""
    reached = [report["tokens"] for trial, _ in drawn for report in trial["reports"]]
    if not reached:
        return '<p class="nothing">No trial has reported yet.</p>'
    across = Axis(high=max(reached))
    by_number = {trial["trial"]: trial for trial, _ in drawn}
    marks = [_frame(axes.count_ticks(across.high), across, metric, "tokens trained"), _baseline(results, metric)]
    for trial, look in drawn:
        reports = [report for report in trial["reports"] if is_number(report["value"])]
        if not reports:
            continue
        points = [_point(across, report["tokens"], metric, report["value"]) for report in reports]
        end = _end(trial["state"], points[-1])
        exploits = "".join(_exploit(trial, move, by_number, across, metric) for move in trial.get("lineage") or [])
        said = f"Trial {trial['trial']}, {trial['state']}: {measure(reports[-1]['value'])} after {compact(reports[-1]['tokens'])} tokens"
        marks.append(_marked(trial, look, said, _path([points]), end + exploits))
    if best := by_number.get(results["best"]):
        marks.append(_label(best, across, metric, results["mode"]))
    return _svg("Learning curves", marks)


def best_so_far(results: dict[str, Any], drawn: Drawn, metric: Axis) -> str:
    """The best metric that any trial had reported by a time; the dots are all reports."""
    reports = sorted(
        (report["seconds"], report["value"], trial["trial"], look)
        for trial, look in drawn
        for report in trial["reports"]
        if is_number(report["value"])
    )
    if not reports:
        return '<p class="nothing">No trial has reported yet.</p>'
    last = reports[-1][0]
    across = Axis(
        high=last if results["retrained"] else max(results["seconds"], last)
    )  # retraining makes nothing better
    frame = _frame(axes.time_ticks(across.high), across, metric, "time since the start")
    marks = [frame, _baseline(results, metric)]
    for seconds, value, number, look in reports:
        x, y = _point(across, seconds, metric, value)
        marks.append(f'<circle class="report {look}" data-t="{number}" cx="{x:.1f}" cy="{y:.1f}" r="2.2"/>')
    firsts = improvements(
        [(seconds, value, number) for seconds, value, number, look in reports if look != "none"], results["mode"]
    )
    if firsts:
        path, circles, y = "", "", 0.0
        for seconds, value, number in firsts:
            x, y = _point(across, seconds, metric, value)
            path += f"H{x:.1f}V{y:.1f}" if path else f"M{x:.1f},{y:.1f}"
            said = f"Trial {number} after {duration(seconds)}: {measure(value)}"
            circles += f'<circle data-t="{number}" cx="{x:.1f}" cy="{y:.1f}" r="4"><title>{said}</title></circle>'
        marks.append(f'<g class="sofar"><path d="{path}H{RIGHT}"/>{circles}</g>')
        text = f"{measure(firsts[-1][1])}, trial {firsts[-1][2]}"
        marks.append(
            f'<text class="name" x="{RIGHT}" y="{_beside(y, results["mode"]):.1f}" text-anchor="end">{text}</text>'
        )
    return _svg("Best so far", marks)


def improvements(reports: Sequence[tuple[float, float, int]], mode: str) -> list[tuple[float, float, int]]:
    """Those of (seconds, value, trial), in the order of time, that were better than all before them."""
    better: list[tuple[float, float, int]] = []
    for report in reports:
        if not better or (report[1] < better[-1][1] if mode == "min" else report[1] > better[-1][1]):
            better.append(report)
    return better


def _parallel_line(
    results: dict[str, Any], trial: dict[str, Any], look: str, scales: list[Axis], metric: Axis, between: float
) -> str:
    segments: list[list[tuple[float, float]]] = [[]]
    for n, (key, scale) in enumerate(zip(results["space"], scales, strict=True)):
        if key in trial["values"]:
            segments[-1].append((PARALLEL_SIDE + n * between, _height(scale.share(trial["values"][key]))))
        elif segments[-1]:
            segments.append([])
    if look != "none" and is_number(trial["value"]):
        x = PARALLEL_SIDE + len(scales) * between
        segments[-1].append((x, _height(metric.share(trial["value"]), results["mode"] == "min")))
    segments = [segment for segment in segments if segment]
    gaps = [(before[-1], after[0]) for before, after in pairwise(segments)]
    ends = "".join(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="2.6"/>' for gap in gaps for x, y in gap)
    ends += f'<path class="gap" d="{_path([list(gap) for gap in gaps])}"/>' if gaps else ""
    values = ", ".join(f"{key.rpartition('.')[2]} {setting(value)}" for key, value in trial["values"].items())
    said = f"Trial {trial['trial']}, {trial['state']}: {results['metric']} {measure(trial['value'])}; {values}"
    return _marked(trial, look, said, _path(segments), ends)


def _axis(x: float, heights: list[float], raised: int) -> str:
    leader = f'<path class="leader" d="M{x:.1f},{PARALLEL_TOP - 9 - raised}V{PARALLEL_TOP}"/>' if raised else ""
    ticks = "".join(f"M{x - 4:.1f},{y:.1f}H{x:.1f}" for y in heights)
    return f'{leader}<path class="axis" d="M{x:.1f},{PARALLEL_TOP}V{PARALLEL_BOTTOM}{ticks}"/>'


def _axis_texts(x: float, key: str, ticks: list[Tick], raised: int, room: int, is_metric: bool) -> str:
    group, _, name = ("", "", key) if is_metric else key.rpartition(".")
    top = PARALLEL_TOP - 14 - raised
    written = "".join(
        f'<text class="tick" x="{x - 7:.1f}" y="{y + 4:.1f}" text-anchor="end">'
        f"<title>{escape(text)}</title>{escape(_cut(text, 12))}</text>"
        for y, text in ticks
    )
    return (
        f'<g class="{"measure" if is_metric else "key"}"><title>{escape(key)}</title>{written}'
        f'<text class="group" x="{x:.1f}" y="{top - 15}" text-anchor="middle">{escape(_cut(group, room))}</text>'
        f'<text class="name" x="{x:.1f}" y="{top}" text-anchor="middle">{escape(_cut(name, room))}</text></g>'
    )


def _height(share: float, inverted: bool = False) -> float:
    return PARALLEL_BOTTOM - (1 - share if inverted else share) * (PARALLEL_BOTTOM - PARALLEL_TOP)


def _point(across: Axis, x: float, up: Axis, y: float) -> tuple[float, float]:
    return LEFT + across.share(x) * (RIGHT - LEFT), BOTTOM - up.share(y) * (BOTTOM - TOP)


def _path(segments: list[list[tuple[float, float]]]) -> str:
    """Straight lines; a segment of one point becomes a dot, by the round cap of a line without length."""
    return "".join(
        f"M{segment[0][0]:.1f},{segment[0][1]:.1f}" + ("".join(f"L{x:.1f},{y:.1f}" for x, y in segment[1:]) or "h0")
        for segment in segments
    )


def _marked(trial: dict[str, Any], look: str, said: str, path: str, more: str) -> str:
    """A trial's marks; the second, invisible and wide path is what a pointer hits."""
    lines = f'<path class="line" d="{path}"/><path class="hit" d="{path}"/>' if path else ""
    return f'<g class="t {look}" data-t="{trial["trial"]}"><title>{escape(said)}</title>{lines}{more}</g>'


def _frame(ticks: list[Tick], across: Axis, metric: Axis, name: str) -> str:
    marks = []
    for value, text in axes.metric_ticks(metric):
        y = BOTTOM - metric.share(value) * (BOTTOM - TOP)
        marks.append(f'<path class="grid" d="M{LEFT},{y:.1f}H{RIGHT}"/>')
        marks.append(f'<text class="tick" x="{LEFT - 8}" y="{y + 4:.1f}" text-anchor="end">{escape(text)}</text>')
    for value, text in ticks:
        x = LEFT + across.share(value) * (RIGHT - LEFT)
        anchor = "end" if x > RIGHT - 12 else "middle"
        marks.append(f'<path class="axis" d="M{x:.1f},{BOTTOM}v5"/>')
        marks.append(f'<text class="tick" x="{x:.1f}" y="{BOTTOM + 20}" text-anchor="{anchor}">{escape(text)}</text>')
    marks.append(f'<path class="axis" d="M{LEFT},{BOTTOM}H{RIGHT}"/>')
    marks.append(f'<text class="group" x="{RIGHT}" y="{BOTTOM + 40}" text-anchor="end">{escape(name)}</text>')
    return "".join(marks)


def _baseline(results: dict[str, Any], metric: Axis) -> str:
    value = results["baseline"]
    if not is_number(value) or not metric.holds(value):
        return ""
    y = BOTTOM - metric.share(value) * (BOTTOM - TOP)
    above = y - 6 if y - TOP > 16 else y + 15
    return (
        f'<path class="baseline" d="M{LEFT},{y:.1f}H{RIGHT}"/>'
        f'<text class="note" x="{RIGHT}" y="{above:.1f}" text-anchor="end">before training {measure(value)}</text>'
    )


def _end(state: str, point: tuple[float, float]) -> str:
    """How a line ends: a dot if the trial was stopped, a cross if it failed, a ring if it runs."""
    x, y = point
    if state == "failed":
        return f'<path class="cross" d="M{x - 4:.1f},{y - 4:.1f}l8,8m0,-8l-8,8"/>'
    if state in ("stopped", "running"):
        return f'<circle class="{state}" cx="{x:.1f}" cy="{y:.1f}" r="3.4"/>'
    return ""


def _exploit(trial: dict[str, Any], move: dict[str, Any], others: dict[int, Any], across: Axis, metric: Axis) -> str:
    """A diamond where a trial took another's weights, and a dotted line from where the other then was."""
    here, there = _at(trial, move["report"]), _at(others.get(move["from"]), move["report"])
    if here is None:
        return ""
    x, y = _point(across, here["tokens"], metric, here["value"])
    source = ""
    if there is not None:
        from_x, from_y = _point(across, there["tokens"], metric, there["value"])
        source = f'<path class="took" d="M{from_x:.1f},{from_y:.1f}L{x:.1f},{y:.1f}"/>'
    changed = ", ".join(f"{key} {setting(old)} → {setting(new)}" for key, (old, new) in move["changed"].items())
    said = f"Trial {trial['trial']} took the weights of trial {move['from']} at step {move['step']}: {changed}"
    return (
        f'{source}<path class="exploit" d="M{x:.1f},{y - 5:.1f}l5,5l-5,5l-5,-5z"><title>{escape(said)}</title></path>'
    )


def _at(trial: dict[str, Any] | None, report: int) -> dict[str, Any] | None:
    found = [seen for seen in trial["reports"] if seen["report"] == report] if trial else []
    return found[0] if found and is_number(found[0]["value"]) else None


def _label(best: dict[str, Any], across: Axis, metric: Axis, mode: str) -> str:
    reports = [report for report in best["reports"] if is_number(report["value"])]
    if not reports:
        return ""
    x, y = _point(across, reports[-1]["tokens"], metric, reports[-1]["value"])
    text = f"{measure(reports[-1]['value'])}, trial {best['trial']}"
    anchor = "end" if x > (LEFT + RIGHT) / 2 else "start"
    return f'<text class="name" x="{x:.1f}" y="{_beside(y, mode):.1f}" text-anchor="{anchor}">{escape(text)}</text>'


def _beside(y: float, mode: str) -> float:
    """Where the text of a best point goes: on its better side, where no other trial is, unless that is off the chart."""
    below = y + 19
    above = y - 9
    return (below if below < BOTTOM - 3 else above) if mode == "min" else (above if above > TOP + 9 else below)


def _cut(text: str, letters: int) -> str:
    return text if len(text) <= letters else text[: max(1, letters - 1)] + "…"


def _svg(name: str, marks: list[str]) -> str:
    return f'<svg class="chart" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{name}">{"".join(marks)}</svg>'
