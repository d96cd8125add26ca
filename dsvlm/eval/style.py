"""The style of the report: one sheet for light and dark, printed into the page."""

LIGHT = """
  --page: #fbfbfa; --panel: #ffffff; --ink: #1d1f23; --soft: #5d636d; --rule: #e2e3e6;
  --right: #0a7d43; --partly: #946200; --wrong: #c92a2a;
  --c0: #1f6fde; --c1: #d9580d; --c2: #0a8f4d; --c3: #9333c4; --c4: #c92a2a; --c5: #0b7f92; --c6: #8a6d00;
  --c7: #6b7280;
"""
DARK = """
  --page: #15171a; --panel: #1d2024; --ink: #e8eaed; --soft: #a3a9b3; --rule: #33373d;
  --right: #45d08c; --partly: #e2b13c; --wrong: #ff7b72;
  --c0: #6ea8ff; --c1: #ff9a4d; --c2: #3ecf85; --c3: #cd8bf5; --c4: #ff7b72; --c5: #4ccbe0; --c6: #dcc14a;
  --c7: #a3a9b3;
"""
SHEET = """
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 2rem 1.25rem 4rem; max-width: 960px; background: var(--page); color: var(--ink);
  font: 15px/1.5 system-ui, -apple-system, "Segoe UI", "Liberation Sans", Arial, sans-serif; }
h1 { font-size: 1.9rem; line-height: 1.2; margin: 0 0 .35rem; }
h2 { font-size: 1.25rem; margin: 2.6rem 0 .5rem; }
h3 { font-size: 1rem; margin: 1.5rem 0 .5rem; }
h3 small { font-weight: 400; color: var(--soft); margin-left: .5rem; }
p { margin: .35rem 0; }
.note { color: var(--soft); max-width: 46rem; }
code, pre { font: 13px/1.45 ui-monospace, "Liberation Mono", Menlo, monospace; }
pre { overflow-x: auto; background: var(--panel); border: 1px solid var(--rule); border-radius: 8px; padding: 1rem; }
summary { cursor: pointer; }
dl { display: grid; grid-template-columns: repeat(auto-fill, minmax(200px, 1fr)); gap: .7rem 1.5rem;
  margin: 1.2rem 0 0; }
dt { color: var(--soft); font-size: .85rem; }
dd { margin: 0; overflow-wrap: anywhere; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th { text-align: left; font-weight: 600; color: var(--soft); font-size: .85rem; }
th, td { padding: .45rem .9rem .45rem 0; border-bottom: 1px solid var(--rule); vertical-align: middle; }
td.number, th.number { text-align: right; }
td:first-child, td.number { white-space: nowrap; }
.bar { position: relative; width: 150px; height: 10px; border-radius: 5px; background: var(--rule); }
.bar i { position: absolute; inset: 0 auto 0 0; border-radius: 5px; background: var(--c0); }
.bar b { position: absolute; top: -4px; bottom: -4px; width: 3px; background: var(--ink);
  outline: 1px solid var(--panel); }
.legend { display: flex; flex-wrap: wrap; gap: .2rem 1.1rem; color: var(--soft); font-size: .9rem; }
.legend span { display: inline-flex; align-items: center; gap: .4rem; }
.swatch { width: 16px; height: 4px; border-radius: 2px; background: var(--c); }
.swatch.true, .swatch.predicted, .swatch.asked { height: 12px; background: none; border: 3px solid var(--c); }
.swatch.asked, rect.asked { --c: #38a3ff; }
.swatch.true, rect.true { --c: #00d97e; }
.swatch.predicted, rect.predicted { --c: #ff3fc4; }
.panel { background: var(--panel); border: 1px solid var(--rule); border-radius: 8px; padding: .9rem; }
.chart { display: block; width: 100%; height: auto; }
.chart text { fill: var(--soft); font-size: 12.5px; }
.grid { stroke: var(--rule); }
polyline { fill: none; stroke: var(--c); stroke-linejoin: round; }
.raw { stroke-width: 1; opacity: .22; }
.smooth { stroke-width: 2.2; }
.tiles { display: grid; grid-template-columns: repeat(auto-fill, minmax(210px, 1fr)); gap: .8rem; }
.tile { display: flex; flex-direction: column; }
.tile .chart { margin-top: auto; padding-top: .5rem; }
.tile p { color: var(--soft); font-size: .85rem; margin: 0; }
.tile .value { color: var(--ink); font-size: 1.5rem; line-height: 1.3; }
.cards { display: grid; grid-template-columns: repeat(auto-fill, minmax(205px, 1fr)); gap: .8rem; }
.card { margin: 0; background: var(--panel); border: 1px solid var(--rule); border-radius: 8px; overflow: hidden;
  display: flex; flex-direction: column; }
.picture { position: relative; }
.picture img { display: block; width: 100%; height: auto; image-rendering: auto; }
.picture svg { position: absolute; inset: 0; width: 100%; height: 100%; }
rect { fill: none; vector-effect: non-scaling-stroke; }
rect.halo { stroke: #000; stroke-opacity: .55; stroke-width: 4.5px; }
rect.true, rect.predicted, rect.asked { stroke: var(--c); stroke-width: 2.5px; }
rect.predicted { stroke-dasharray: 6 3; }
figcaption { padding: .55rem .75rem .65rem; font-size: .87rem; line-height: 1.4; display: flex; flex-direction: column;
  flex: 1; overflow-wrap: anywhere; }
figcaption p { margin: .1rem 0; }
.cards + h3 { margin-top: 2rem; }
.legend + .cards { margin-top: .5rem; }
figcaption b { color: var(--soft); font-weight: 600; margin-right: .2rem; }
.question { font-weight: 600; }
.verdict { margin-top: auto; padding-top: .3rem; font-weight: 600; }
.right { color: var(--right); } .partly { color: var(--partly); } .wrong { color: var(--wrong); }
""" + "\n".join(f".s{i} {{ --c: var(--c{i}); }}" for i in range(8))


def stylesheet() -> str:
    light = f":root {{ color-scheme: light dark; {LIGHT} }}"
    dark = f"@media (prefers-color-scheme: dark) {{ :root {{ {DARK} }} }}"
    return f"{light}\n{dark}{SHEET}"
