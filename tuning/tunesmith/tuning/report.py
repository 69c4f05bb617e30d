"""A sweep as a page that a person can look at: one file that fetches nothing, and reads fully without its script."""

from __future__ import annotations

import statistics
from datetime import datetime
from html import escape
from typing import Any

from tunesmith.tuning import axes, charts
from tunesmith.tuning.charts import is_number
from tunesmith.tuning.importance import FEWEST_TRIALS, importance
from tunesmith.tuning.report_style import RANKS, SCRIPT, STYLE
from tunesmith.tuning.wording import compact, duration, listed, measure, percent, setting, spread

_STATES = ("finished", "stopped", "failed", "infeasible", "running", "waiting")
_OUTCOMES = ("finished", "was stopped early", "failed", "was infeasible", "is running", "is waiting")
_MANY = 40  # trials: thinner lines
_HINT = '<span id="hint" hidden>Point at a line or a row to follow a trial; click to keep it.</span>'
_LONG_SPACE = 8  # keys: more are listed in two columns
_LIMITS = {  # of a budget: what its spending is called, its limit, its name
    "trials": ("trials", "trials"),
    "hours": ("max_hours", "time"),
    "gpu_hours": ("max_gpu_hours", "GPU hours"),
    "tokens": ("max_tokens", "tokens"),
}


def render(results: dict[str, Any]) -> str:
    """The whole HTML document about a finished or a running sweep.

    Args:
        results: what the sweep has written down so far; values and reports that are not finite count as absent.
    """
    standing = ranked(results)
    looks = _looks(results, standing)
    others = [trial for trial in results["trials"] if all(trial is not other for other in standing)]
    drawn = [(trial, looks[trial["trial"]]) for trial in [*others, *reversed(standing)]]
    drawn.sort(key=lambda pair: pair[1] == "best")  # over all others
    name, sense = escape(results["name"]), "lower" if results["mode"] == "min" else "higher"
    searched = f"{'Minimises' if results['mode'] == 'min' else 'Maximises'} {escape(results['metric'])}"
    tools = f"searcher {escape(results['searcher'])} · scheduler {escape(results['scheduler'])}"
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width,initial-scale=1">
<title>{name}: sweep</title><style>{STYLE}</style></head><body class="{"many" if len(drawn) > _MANY else ""}"><main>
<h1>{name}</h1><p class="lead">{searched} · {tools}</p>
{_verdict(results, standing)}{_facts(results)}
{_drawings(results, drawn, sense)}
<div class="{"two" if len(results["space"]) <= _LONG_SPACE else "stack"}">{_parameters(results)}{_budget(results)}</div>
{_ancestry(results)}{_table(results, [*standing, *sorted(others, key=_unranked)], looks)}
</main><script>{SCRIPT}</script></body></html>
"""


def ranked(results: dict[str, Any]) -> list[dict[str, Any]]:
    """Trials that have a metric and did not fail, best first; of equals, the earlier one."""
    alive = [
        trial
        for trial in results["trials"]
        if is_number(trial["value"]) and trial["state"] in ("finished", "stopped", "running")
    ]
    sign = 1 if results["mode"] == "min" else -1
    return sorted(alive, key=lambda trial: (sign * trial["value"], trial["trial"]))


def ancestors(results: dict[str, Any], number: int) -> list[tuple[int, dict[str, Any]]]:
    """How population-based training came to a trial's weights: (trial, the exploit that it made), earliest first.

    A trial's weights are those it last took from another, which had itself taken others' before that report.
    """
    by_number = {trial["trial"]: trial for trial in results["trials"]}
    line: list[tuple[int, dict[str, Any]]] = []
    before = float("inf")
    while True:
        moves = [move for move in by_number.get(number, {}).get("lineage") or [] if move["report"] < before]
        if not moves:
            return line[::-1]
        last = max(moves, key=lambda move: move["report"])
        line.append((number, last))
        number, before = last["from"], last["report"]


def _looks(results: dict[str, Any], standing: list[dict[str, Any]]) -> dict[int, str]:
    """The CSS class of each trial: its rank in eight steps, the best apart, and those that have no rank."""
    looks = {trial["trial"]: "none" for trial in results["trials"]}
    for rank, trial in enumerate(standing):
        looks[trial["trial"]] = f"q{round(rank * (RANKS - 1) / max(1, len(standing) - 1))}"
    if results["best"] in looks:
        looks[results["best"]] = "best"
    return looks


def _unranked(trial: dict[str, Any]) -> tuple[int, int]:
    return ("running", "waiting", "finished", "stopped", "failed", "infeasible").index(trial["state"]), trial["trial"]


def _verdict(results: dict[str, Any], standing: list[dict[str, Any]]) -> str:
    best = next((trial for trial in results["trials"] if trial["trial"] == results["best"]), None)
    look = "good" if results["complete"] else "run"
    if best is None or not is_number(best["value"]):
        look = "bad" if results["complete"] else "run"
        said = "No trial has a result." if results["complete"] else "Running; no trial has reported yet."
        reasons = [
            trial["why"] for trial in results["trials"] if trial["state"] in ("failed", "infeasible") and trial["why"]
        ]
        if reasons:
            most = max(reasons, key=reasons.count)
            said += f" {reasons.count(most)} of {len(reasons)} for this reason: {escape(most)}"
    else:
        start = (
            f"Trial {best['trial']} is best"
            if results["complete"]
            else f"Running; so far trial {best['trial']} is best"
        )
        said = f"{start}, with {escape(results['metric'])} {measure(best['value'])}{spread(best['std'])}"
        finished = [trial["value"] for trial in standing if trial["state"] == "finished"]
        versus = []
        if is_number(results["baseline"]):
            versus.append(_difference(best["value"], results["baseline"], " before training"))
            if results["complete"] and (best["value"] >= results["baseline"]) == (results["mode"] == "min"):
                look = "bad"
        if len(finished) > 1:
            versus.append(_difference(best["value"], statistics.median(finished), " of the median finished trial"))
        said += f": {listed(versus)}." if versus else "."
    return f'<p class="verdict {look}"><b>{said}</b>{_tally(results)}</p>'


def _difference(value: float, reference: float, whose: str) -> str:
    """How far a value is from another: 39% (3.356) below the 8.570 before training."""
    if value == reference:
        return f"equal to the {measure(reference)}{whose}"
    apart = setting(abs(value - reference))
    share = f"{percent(abs(value - reference) / abs(reference))} ({apart})" if reference else apart
    return f"{share} {'below' if value < reference else 'above'} the {measure(reference)}{whose}"


def _tally(results: dict[str, Any]) -> str:
    states = [trial["state"] for trial in results["trials"]]
    counts = [
        f"{states.count(state)} {outcome if states.count(state) == 1 else outcome.replace('was', 'were').replace('is ', 'are ')}"
        for state, outcome in zip(_STATES, _OUTCOMES, strict=True)
        if state in states
    ]
    trials = f"{len(states)} {'trial' if len(states) == 1 else 'trials'}"
    tokens = f"{compact(results['budget']['spent']['tokens'])} tokens"
    spent = f"{duration(results['seconds'])}, {tokens}"
    if results["retrained"]:
        searched = max(report["seconds"] for trial in results["trials"] for report in trial["reports"])
        spent = f"{duration(searched)}, {tokens}; {duration(results['seconds'])} with the winner's retraining"
    return f"{trials}: {listed(counts)}; {spent}." if counts else f"No trials yet; {spent}."


def _facts(results: dict[str, Any]) -> str:
    facts = []
    if results["winner"]:
        facts.append(("Winner's recipe", f"<code>{escape(results['winner'])}</code>"))
    if results["artifact"]:
        facts.append(("Winner's artifact", f"<code>{escape(results['artifact'])}</code>"))
    if again := results["retrained"]:
        seeds = ", ".join(
            f"{seed}: {measure(value)}" for seed, value in zip(again["seeds"], again["values"], strict=True)
        )
        said = f"{measure(again['mean'])}{spread(again['std'])} over {len(again['seeds'])} seeds ({seeds})"
        facts.append(("Winner retrained", escape(said)))
    facts.append(
        ("Execution", escape(f"{results['execution']}: {results['why']}" if results["why"] else results["execution"]))
    )
    facts.append(("Started", f"{datetime.fromisoformat(results['started']):%Y-%m-%d %H:%M %Z}"))
    return f"<dl>{''.join(f'<dt>{name}</dt><dd>{value}</dd>' for name, value in facts)}</dl>"


def _drawings(results: dict[str, Any], drawn: charts.Drawn, sense: str) -> str:
    name = escape(results["metric"])
    values = [trial["value"] for trial, look in drawn if look != "none" and is_number(trial["value"])]
    curves = [[each["value"] for each in trial["reports"] if is_number(each["value"])] for trial, _ in drawn]
    seen, firsts = [value for curve in curves for value in curve], [curve[0] for curve in curves if curve]
    before = [results["baseline"]] if is_number(results["baseline"]) else []
    of_ends = axes.of_metric(values or [0.0], results["mode"])
    of_reports = axes.of_metric([*seen, *before] or [0.0], results["mode"], room=0.1, sound=firsts)
    ramp = "".join(f'<i class="ramp" style="background:var(--q{n})"></i>' for n in range(RANKS))
    looks = {look for _, look in drawn}
    keys = '<span><i class="bar"></i>best trial</span>' if "best" in looks else ""
    keys += f"<span>best {ramp} worst {name}</span>" if looks - {"best", "none"} else ""
    keys += '<span><i class="bar none"></i>no result</span>' if "none" in looks else ""
    states = {trial["state"] for trial, _ in drawn}
    ends = [("stopped", "● stopped"), ("failed", "× failed"), ("running", "○ running")]
    marks = [f"<span>{text}</span>" for state, text in ends if state in states]
    marks += ["<span>◇ took another's weights</span>"] if any(trial.get("lineage") for trial, _ in drawn) else []
    off = "".join(
        f"<span>before training {measure(value)}, off the chart</span>"
        for value in before
        if not of_reports.holds(value)
    )
    legend = (
        f'<p class="legend">{"".join(marks) or f"<span>{sense} is better</span>"}{_beyond(seen, of_reports)}{off}</p>'
    )
    together = (
        charts.parallel(results, drawn, of_ends)
        if drawn
        else '<p class="nothing">No trial has been drawn from the space yet.</p>'
    )
    return (
        f'<section><h2>Settings and result</h2><p class="legend">{keys}{_beyond(values, of_ends)}'
        f"{_HINT if drawn else ''}</p>"
        f'<div class="wide">{together}</div></section><div class="two">'
        f"<section><h2>{name} against tokens</h2>{legend}{charts.learning_curves(results, drawn, of_reports)}</section>"
        f'<section><h2>Best {name} so far</h2><p class="legend">Each dot is a report.{_passing(results, drawn)}</p>'
        f"{charts.best_so_far(results, drawn, of_reports)}</section></div>"
    )


def _passing(results: dict[str, Any], drawn: charts.Drawn) -> str:
    """Says so where some trial's report was better than what the best trial ended with."""
    best = next((trial["value"] for trial, look in drawn if look == "best"), None)
    ranks = [trial for trial, look in drawn if look != "none"]
    seen = [(each["value"], trial["trial"]) for trial in ranks for each in trial["reports"] if is_number(each["value"])]
    if not is_number(best) or not seen:
        return ""
    value, number = min(seen) if results["mode"] == "min" else max(seen)
    return (
        f" Trial {number} was at {measure(value)} before its last, which is the one that counts."
        if value != best
        else ""
    )


def _beyond(values: list[float], axis: axes.Axis) -> str:
    count = sum(not axis.holds(value) for value in values)
    return f"<span>{count} far worse, drawn at the edge</span>" if count else ""


def _parameters(results: dict[str, Any]) -> str:
    shares = importance(results)
    best = next((trial["values"] for trial in results["trials"] if trial["trial"] == results["best"]), None)
    rows = ""
    for key in sorted(results["space"], key=lambda key: -shares.get(key, 0.0)):  # a stable order where nothing is known
        chosen = f"best trial: {escape(setting(best[key])) if key in best else 'not used'}" if best is not None else ""
        share = shares.get(key, 0.0)
        meter = f'<div class="meter"><u style="width:{100 * share:.1f}%"></u></div>' if shares else ""
        rows += (
            f'<div class="row"><span>{escape(key)}</span><em>{percent(share) if shares else ""}</em>{meter}'
            f"<small>{' · '.join(filter(None, [_searched(results['space'][key]), chosen]))}</small></div>"
        )
    said = (
        "How much each key, alone, tells the better half of the trials from the rest (PED-ANOVA); small shares are noise."
        if shares
        else f"Too few trials to tell: it takes {FEWEST_TRIALS} that finished or were stopped, with different results."
    )
    if shares and results["scheduler"] == "pbt":
        said += " The values are those that each trial ended with, many of them copied from better trials."
    return f'<section><h2>What mattered</h2><p class="legend">{said}</p><div class="rows">{rows}</div></section>'


def _searched(entry: dict[str, Any]) -> str:
    if "values" in entry:
        said = "one of " + ", ".join(map(setting, entry["values"]))
    else:
        log = " on a log scale" if entry["kind"].startswith("log") else ""
        said = f"{setting(entry['low'])} to {setting(entry['high'])}{log}"
    for key, values in (entry.get("when") or {}).items():
        allowed = values if isinstance(values, list) else [values]
        said += f", only where {key} is {' or '.join(map(setting, allowed))}"
    return escape(said)


def _budget(results: dict[str, Any]) -> str:
    budget, rows = results["budget"], ""
    for spending, (limit, name) in _LIMITS.items():
        spent, most = budget["spent"][spending], budget[limit]
        if most is None and not spent:
            continue
        share = spent / most if most else 0.0
        over = ' class="over"' if share > 1 else ""
        meter = (
            f'<div class="meter"><u{over} style="width:{100 * min(1.0, share):.1f}%"></u></div>'
            if most is not None
            else ""
        )
        of = f" of {_amount(spending, most)} · {percent(share)}" if most is not None else ", no limit"
        rows += f'<div class="row"><span>{name}</span><em>{_amount(spending, spent)}{of}</em>{meter}</div>'
    return f'<section><h2>Budget</h2><p class="legend">Spent against the limits of this sweep.</p><div class="rows">{rows}</div></section>'


def _amount(spending: str, amount: float) -> str:
    if spending == "hours":
        return duration(3600 * amount)
    return f"{amount:.2g}" if spending == "gpu_hours" else compact(amount)


def _ancestry(results: dict[str, Any]) -> str:
    line = ancestors(results, results["best"]) if results["best"] is not None else []
    if not line:
        return ""
    rows = "".join(f"<li>Trial {number} {_exploit(move)}</li>" for number, move in line)
    return (
        f"<section><h2>How trial {results['best']} came about</h2>"
        f'<p class="legend">Its weights began in trial {line[0][1]["from"]} and passed on with these changes.</p><ol>{rows}</ol></section>'
    )


def _exploit(move: dict[str, Any]) -> str:
    changed = ", ".join(
        f'{escape(key)} <span class="whole">{escape(setting(old))} → {escape(setting(new))}</span>'
        for key, (old, new) in move["changed"].items()
    )
    return f"took trial {move['from']}'s weights at step {move['step']:,}{f': {changed}' if changed else ''}"


def _table(results: dict[str, Any], trials: list[dict[str, Any]], looks: dict[int, str]) -> str:
    keys = list(results["space"])
    heads = "".join(
        f'<th title="{escape(key)}"><small>{escape(key.rpartition(".")[0])}</small>{escape(key.rpartition(".")[2])}</th>'
        for key in keys
    )
    if not trials:
        return '<section><h2>All trials, best first</h2><p class="nothing">None yet.</p></section>'
    rows = "".join(_row(trial, looks[trial["trial"]], keys) for trial in trials)
    return (
        '<section><h2>All trials, best first</h2><div class="trials"><table><thead><tr><th>trial</th>'
        f'<th class="why">state</th><th>{escape(results["metric"])}</th><th>reports</th><th>tokens</th>{heads}</tr></thead>'
        f"<tbody>{rows}</tbody></table></div></section>"
    )


def _row(trial: dict[str, Any], look: str, keys: list[str]) -> str:
    moves = [f"<small>{_exploit(move)}</small>" for move in trial.get("lineage") or []]
    lineage = (
        "".join(moves)
        if len(moves) < 2
        else f"<details><summary>{len(moves)} exploits</summary>{''.join(moves)}</details>"
    )
    why = f"<small>{escape(trial['why'])}</small>" if trial["why"] else ""
    steps = f" <small>to step {trial['reports'][-1]['step']:,}</small>" if trial["reports"] else ""
    settings = "".join(
        f'<td class="value" title="{escape(setting(trial["values"][key]))}">{escape(setting(trial["values"][key]))}</td>'
        if key in trial["values"]
        else '<td class="value"><small>–</small></td>'
        for key in keys
    )
    value = measure(trial["value"]) if is_number(trial["value"]) else "–"
    return (
        f'<tr class="{look}" data-t="{trial["trial"]}"><td><i class="ramp"></i>{trial["trial"]}</td>'
        f'<td class="why"><span class="state {trial["state"]}">{trial["state"]}</span>{why}{lineage}</td>'
        f"<td><b>{value}</b>{spread(trial['std'])}</td><td>{len(trial['reports'])}{steps}</td>"
        f"<td>{compact(trial['tokens'])}</td>{settings}</tr>"
    )
