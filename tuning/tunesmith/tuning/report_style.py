"""How the report of a sweep looks, in light and in dark, and what pointing at a trial does.

Colours of ranks follow ColorBrewer's YlGnBu, which people with any form of colour blindness can order, with the best
farthest from the page's own colour; the best trial is orange, which stands apart from all of them.
"""

from __future__ import annotations

RANKS = 8  # colours, from the best (q0) to the worst (q7)

STYLE = """
:root { color-scheme:light dark; --ink:#1c2733; --soft:#566575; --line:#dde4ea; --page:#f6f8fa; --card:#fff;
  --best:#d9480f; --best-bg:#fff1e8; --good:#0b6b3a; --good-bg:#e2f6ea; --bad:#b3261e; --bad-bg:#fde7e5;
  --run:#1d4f91; --run-bg:#e3eefb; --none:#a7b1bb; --q0:#0c2c84; --q1:#225ea8; --q2:#1d80b5; --q3:#2f9fc0;
  --q4:#57b8bd; --q5:#86c9b4; --q6:#a9d0a2; --q7:#c6d596 }
@media (prefers-color-scheme: dark) { :root { --ink:#e6edf3; --soft:#9aa8b5; --line:#303b47; --page:#0f151b;
  --card:#182129; --best:#ff922b; --best-bg:#3a2612; --good:#b8f5cf; --good-bg:#11351f; --bad:#ffb4ab; --bad-bg:#4a1512;
  --run:#b3d4ff; --run-bg:#14304f; --none:#5d6976; --q0:#e6f7b0; --q1:#b9e6b0; --q2:#86d3b5; --q3:#57bcc0; --q4:#3a9fc4;
  --q5:#2f80b8; --q6:#34699f; --q7:#3a5180 } }
* { box-sizing:border-box }
body { margin:0; background:var(--page); color:var(--ink); font:15px/1.55 system-ui,"Noto Sans KR",sans-serif }
main { max-width:1240px; margin:0 auto; padding:32px 20px 64px }
h1 { font-size:26px; line-height:1.25; margin:0 0 4px; overflow-wrap:anywhere } h2 { font-size:17px; margin:0 0 2px }
p.lead { color:var(--soft); margin:0 0 20px; overflow-wrap:anywhere }
.verdict { border-radius:10px; padding:14px 18px; margin:0 0 16px; overflow-wrap:anywhere }
.verdict b { display:block; font-size:18px; line-height:1.4 } .verdict.good { background:var(--good-bg); color:var(--good) }
.verdict.bad { background:var(--bad-bg); color:var(--bad) } .verdict.run { background:var(--run-bg); color:var(--run) }
dl { display:grid; grid-template-columns:max-content minmax(0,1fr); gap:6px 20px; margin:0 0 20px }
dt { color:var(--soft) } dd { margin:0; overflow-wrap:anywhere }
code { font:13.5px ui-monospace,"SFMono-Regular",Menlo,Consolas,monospace }
section { background:var(--card); border:1px solid var(--line); border-radius:10px; padding:16px 18px; margin:0 0 16px;
  min-width:0 }
.two { display:grid; grid-template-columns:repeat(2,minmax(0,1fr)); gap:16px; margin:0 0 16px } .two section { margin:0; display:flex; flex-direction:column } .two svg { margin-top:auto }
.wide { overflow-x:auto } .legend,.nothing { font-size:13.5px; color:var(--soft); margin:0 0 10px; overflow-wrap:anywhere }
.legend span { display:inline-block; max-width:100%; margin-right:14px } #hint[hidden] { display:none }
.ramp { display:inline-block; width:11px; height:11px; vertical-align:-1px; margin-right:1px }
.bar { display:inline-block; width:22px; height:0; border-top:3px solid var(--best); vertical-align:4px; margin-right:5px }
.bar.none { border-top:2px dashed var(--none) }
svg { display:block; width:100%; height:auto } svg text { font:12px system-ui,"Noto Sans KR",sans-serif; fill:var(--ink) }
svg .tick,svg .group,svg .note { fill:var(--soft) } svg .name { font-weight:650; font-size:13px }
svg text { paint-order:stroke; stroke:var(--card); stroke-width:5px; stroke-linejoin:round }
svg path { fill:none; stroke-linecap:round; stroke-linejoin:round } svg .axis { stroke:var(--soft); stroke-width:1 }
svg .grid,svg .leader { stroke:var(--line) } svg .baseline { stroke:var(--soft); stroke-dasharray:2 5 }
.t .line { stroke:var(--c); stroke-width:1.6; stroke-opacity:.85 } .t circle { fill:var(--c) }
.t .hit { stroke:transparent; stroke-width:10; pointer-events:stroke } .t.none .line { stroke-dasharray:5 4 }
.many .t .line { stroke-width:1.1; stroke-opacity:.6 } .t.best .line { stroke-width:3.2; stroke-opacity:1 }
.t .running { fill:var(--card); stroke:var(--c); stroke-width:1.8 } .t .cross { stroke:var(--bad); stroke-width:2 }
.exploit { fill:var(--card)!important; stroke:var(--c); stroke-width:1.8 } .took,.gap { stroke:var(--c); stroke-dasharray:1 4 }
.gap { stroke-opacity:.5 } .best .gap { stroke-width:2; stroke-opacity:.8 }
.report { fill:var(--c) } .sofar path { stroke:var(--best); stroke-width:2.4 }
.sofar circle { fill:var(--best); stroke:var(--card); stroke-width:1.5 }
.best { --c:var(--best) } .none { --c:var(--none) } .q0 { --c:var(--q0) } .q1 { --c:var(--q1) } .q2 { --c:var(--q2) }
.q3 { --c:var(--q3) } .q4 { --c:var(--q4) } .q5 { --c:var(--q5) } .q6 { --c:var(--q6) } .q7 { --c:var(--q7) }
.hot svg [data-t]:not(.on) { opacity:.12 } .hot .t.on .line { stroke-width:3.2; stroke-opacity:1 }
.hot tr.on td { background:var(--run-bg) } tr[data-t] { cursor:pointer }
.rows { display:grid; gap:12px 32px }
.stack .rows { grid-template-columns:repeat(auto-fit,minmax(min(100%,320px),1fr)) } .row { display:grid; grid-template-columns:minmax(0,1fr) max-content; gap:0 12px }
.row > * { overflow-wrap:anywhere } .row small,td small { color:var(--soft); font-size:13px }
.row em { font-style:normal; text-align:right; font-variant-numeric:tabular-nums } .row small { grid-column:1/-1 }
.meter { grid-column:1/-1; height:8px; border-radius:4px; background:var(--line); overflow:hidden; margin:4px 0 3px }
.meter u { display:block; height:100%; background:var(--q1); border-radius:4px } .meter u.over { background:var(--bad) }
ol { margin:8px 0 0; padding-left:22px } ol small { color:var(--soft) }
.trials { max-height:80vh; overflow:auto; margin:8px -18px -16px; border-top:1px solid var(--line) }
table { width:100%; border-collapse:separate; border-spacing:0 } th,td { padding:7px 9px; text-align:right;
  font-variant-numeric:tabular-nums; vertical-align:top; border-bottom:1px solid var(--line); white-space:nowrap }
th { color:var(--soft); font-weight:600; font-size:13px; line-height:1.3; position:sticky; top:0; background:var(--card);
  z-index:1; vertical-align:bottom } th small { display:block; font-weight:400 }
th:first-child,td:first-child { position:sticky; left:0; background:var(--card); text-align:left; padding-left:18px }
th:first-child { z-index:2 } tr.best td { background:var(--best-bg) } tr.best td b { color:var(--best) }
td.why { text-align:left; white-space:normal; min-width:190px; max-width:340px; overflow-wrap:anywhere } th.why { text-align:left }
td.why > small { display:block } td.value { max-width:180px; overflow:hidden; text-overflow:ellipsis }
td .ramp { background:var(--c); border-radius:50%; margin-right:7px } summary { cursor:pointer } .whole { display:inline-block }
.state { font-size:13px; font-weight:600 } .state.finished { color:var(--good) }
.state.failed,.state.infeasible { color:var(--bad) } .state.running { color:var(--run) } .state.stopped,.state.waiting { color:var(--soft) }
@media (max-width:820px) { .two { grid-template-columns:minmax(0,1fr) } main { padding:20px 12px 48px }
  dl { grid-template-columns:minmax(0,1fr); gap:0 } dd { margin:0 0 8px } }
@media print { .trials { max-height:none; overflow:visible } section { break-inside:avoid } }
@media (max-width:560px) { svg.chart text { font-size:16px } svg.parallel text { font-size:14.5px } }
"""

SCRIPT = """
const marks=[...document.querySelectorAll('[data-t]')];let kept=null;
const show=t=>{document.body.classList.toggle('hot',t!==null);
  marks.forEach(m=>m.classList.toggle('on',t!==null&&m.dataset.t===t))};
const over=e=>{const m=e.target.closest&&e.target.closest('[data-t]');return m?m.dataset.t:null};
document.addEventListener('pointerover',e=>show(over(e)??kept));
document.addEventListener('click',e=>{const t=over(e);if(t!==null){kept=kept===t?null:t;show(kept)}});
document.querySelectorAll('#hint').forEach(h=>h.hidden=false);
"""
