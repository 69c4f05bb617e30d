"""The mask receipt as a page that a person can look at: one file, no scripts, nothing fetched."""

from __future__ import annotations

from html import escape
from typing import Any

from tunesmith.cluster.artifacts import MaskReceipt

_STYLE = """
:root { --ink:#1c2733; --soft:#5b6b7c; --line:#dde4ea; --page:#f6f8fa; --card:#fff; --on:#0b6b3a; --on-bg:#c9f2d8;
  --off:#6b7785; --bad:#b3261e; --bad-bg:#fde7e5; --good-bg:#e2f6ea; }
@media (prefers-color-scheme: dark) { :root { --ink:#e6edf3; --soft:#9aa8b5; --line:#303b47; --page:#0f151b;
  --card:#182129; --on:#b8f5cf; --on-bg:#14532d; --off:#8896a5; --bad:#ffb4ab; --bad-bg:#4a1512; --good-bg:#11351f; } }
* { box-sizing:border-box }
body { margin:0; background:var(--page); color:var(--ink); font:15px/1.55 system-ui,"Noto Sans KR",sans-serif }
main { max-width:980px; margin:0 auto; padding:32px 20px 64px }
h1 { font-size:26px; margin:0 0 4px } h2 { font-size:17px; margin:36px 0 12px }
p.lead { color:var(--soft); margin:0 0 20px }
.verdict { border-radius:10px; padding:12px 16px; margin:0 0 20px; font-weight:600 }
.verdict.good { background:var(--good-bg); color:var(--on) } .verdict.bad { background:var(--bad-bg); color:var(--bad) }
.numbers { display:flex; flex-wrap:wrap; gap:12px }
.number { background:var(--card); border:1px solid var(--line); border-radius:10px; padding:12px 18px; flex:1 1 150px }
.number b { display:block; font-size:24px; font-variant-numeric:tabular-nums } .number span { color:var(--soft) }
.table { background:var(--card); border:1px solid var(--line); border-radius:10px; overflow-x:auto }
table { width:100%; border-collapse:collapse } th,td { padding:8px 14px; text-align:right; font-variant-numeric:tabular-nums }
th { color:var(--soft); font-weight:600; font-size:13px } th:first-child,td:first-child { text-align:left;
  min-width:180px; overflow-wrap:anywhere } tr+tr td { border-top:1px solid var(--line) }
td i { display:block; height:6px; border-radius:3px; background:var(--line); overflow:hidden; margin-top:4px }
td i u { display:block; height:100%; background:var(--on); }
article { background:var(--card); border:1px solid var(--line); border-radius:10px; margin:0 0 16px; overflow:hidden }
article header { display:flex; justify-content:space-between; gap:12px; padding:8px 16px; color:var(--soft);
  border-bottom:1px solid var(--line); font-size:13px; overflow-wrap:anywhere }
pre { margin:0; padding:14px 16px; white-space:pre-wrap; overflow-wrap:anywhere; color:var(--off);
  font:13.5px/1.65 ui-monospace,"SFMono-Regular",Menlo,Consolas,monospace }
mark { background:var(--on-bg); color:var(--on); border-radius:3px; padding:1px 0; box-decoration-break:clone;
  -webkit-box-decoration-break:clone }
.cut { color:var(--bad); background:var(--bad-bg); border-radius:3px }
.legend { font-size:13.5px; color:var(--soft); margin:0 0 12px }
"""


def page(receipt: MaskReceipt) -> str:
    """The whole HTML document."""
    verdict = (
        f'<p class="verdict good">Passed: {passed(receipt)}.</p>'
        if receipt.passed
        else f'<p class="verdict bad">Failed. {escape(" ".join(receipt.problems))}</p>'
    )
    share = _share(receipt.trained_tokens, receipt.tokens)
    numbers = [
        (f"{receipt.trained_tokens:,}", "tokens trained"),
        (f"{receipt.tokens:,}", "tokens read"),
        (share, "of all tokens"),
    ]
    if receipt.assistant_turns:
        ended = f"{receipt.turns_with_trained_end:,} / {receipt.assistant_turns:,}"
        numbers.append((ended, "turns with a trained end"))
    cards = "".join(f'<div class="number"><b>{value}</b><span>{name}</span></div>' for value, name in numbers)
    rows = "".join(_source_row(counts) for counts in receipt.sources)
    examples = "".join(_example(example) for example in receipt.examples)
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width,initial-scale=1">
<title>Mask receipt</title><style>{_STYLE}</style></head><body><main>
<h1>Mask receipt</h1><p class="lead">Which tokens this run learns to write, counted after packing.</p>
{verdict}<div class="numbers">{cards}</div>
<h2>By source</h2><div class="table"><table><tr><th>source</th><th>examples</th><th>tokens</th><th>trained</th><th>share</th></tr>{rows}</table></div>
<h2>{len(receipt.examples)} examples</h2>
<p class="legend"><mark> Marked text is trained. </mark> The rest is only read.</p>{examples}
</main></body></html>
"""


def passed(receipt: MaskReceipt) -> str:
    """What a receipt that passed has shown."""
    said = "tokens are trained"
    if receipt.assistant_turns or receipt.cut_rows:
        said += ", and every trained turn ends with its end-of-turn token"
    if receipt.cut_rows:
        said += f" but for {receipt.cut_rows:,} {'row' if receipt.cut_rows == 1 else 'rows'} cut at max_length"
    return said


def _source_row(counts: Any) -> str:
    share = _share(counts.trained_tokens, counts.tokens)
    bar = f'<i><u style="width:{share if counts.tokens else "0%"}"></u></i>'
    return (
        f"<tr><td>{escape(counts.source)}</td><td>{counts.examples:,}</td><td>{counts.tokens:,}</td>"
        f"<td>{counts.trained_tokens:,}</td><td>{share}{bar}</td></tr>"
    )


def _example(example: dict[str, Any]) -> str:
    spans = "".join(
        f"<mark>{escape(span['text'])}</mark>" if span["trained"] else escape(span["text"]) for span in example["spans"]
    )
    more = f"\n… {example['not_shown']:,} more tokens" if example["not_shown"] else ""
    more += '<i class="cut"> ✂ cut at max_length</i>' if example.get("cut") else ""
    trained = f"{example['trained_tokens']:,} of {example['tokens']:,} tokens trained"
    return f"<article><header><span>{escape(example['where'])}</span><span>{trained}</span></header><pre>{spans}{more}</pre></article>"


def _share(part: int, whole: int) -> str:
    return f"{100 * part / whole:.1f}%" if whole else "–"
