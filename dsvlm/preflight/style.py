"""What the preview's page adds to the style of the report."""

SHEET = """
h2 small { font-weight: 400; color: var(--soft); font-size: .9rem; margin-left: .4rem; }
td .bar { width: 100%; min-width: 90px; height: 5px; margin-top: 4px; }
.charts { display: grid; grid-template-columns: repeat(auto-fit, minmax(320px, 1fr)); gap: 1rem; margin: .6rem 0 1rem; }
.charts .panel { padding: .7rem .7rem .4rem; }
rect.column { fill: var(--c0); stroke: none; }
rect.over { fill: var(--wrong); }
.limit { stroke: var(--wrong); stroke-width: 1.5; stroke-dasharray: 4 3; }
.swatch.stored { height: 12px; background: none; border: 1px dashed var(--soft); }
rect.stored { stroke: #fff; stroke-width: 1px; stroke-dasharray: 2 3; }
.cards.wide { grid-template-columns: repeat(auto-fill, minmax(265px, 1fr)); gap: 1rem; align-items: start; }
.cards.wide .picture img { image-rendering: pixelated; }
.picture.none { aspect-ratio: 3 / 1; display: grid; place-items: center; background: var(--rule); color: var(--soft); }
.tag { position: absolute; font: 600 11px/15px ui-monospace, "Liberation Mono", Menlo, monospace; color: #000;
  background: var(--c); padding: 0 4px; border-radius: 2px; }
.tag.above { transform: translateY(-100%); }
.tag.asked { --c: #38a3ff; } .tag.true { --c: #00d97e; }
.card.masked { border-color: var(--wrong); }
.card.masked .picture img { opacity: .35; filter: grayscale(1); }
.text { font-size: .95rem; line-height: 1.75; margin: 0 0 .3rem; white-space: pre-wrap; }
.t, .mark { border-radius: 3px; padding: .1em 0; }
.mark { font-style: normal; padding: .05em .4em; border: 1px solid var(--rule); }
.prompt { color: var(--ink); }
.learnt { --tint: color-mix(in srgb, var(--c2) 20%, transparent); background: var(--tint);
  box-shadow: inset 0 -2px 0 var(--c2); }
.control { font: 11px/1.4 ui-monospace, "Liberation Mono", Menlo, monospace; color: var(--soft); padding: .1em .35em;
  border: 1px solid var(--rule); margin: 0 .15em; white-space: nowrap; }
.image { font: 11px/1.4 ui-monospace, "Liberation Mono", Menlo, monospace; color: var(--page); background: var(--c7);
  border-radius: 3px; padding: .15em .45em; margin-right: .15em; }
.box { display: inline-flex; border-radius: 3px; border: 1.5px solid #38a3ff; overflow: hidden; margin: 0 .2em;
  vertical-align: baseline; line-height: 1.35; box-shadow: none; }
.box.learnt { border-color: #00d97e; }
.box b { background: #38a3ff; color: #000; margin: 0; padding: 0 .35em; font-size: .8em; }
.box.learnt b { background: #00d97e; }
.box .t { font: 12px/1.5 ui-monospace, "Liberation Mono", Menlo, monospace; padding: 0 .3em; border-radius: 0;
  box-shadow: none; }
.text:hover .t { outline: 1px solid var(--rule); }
.text .t:hover { outline: 2px solid var(--c0); }
details { color: var(--soft); }
.tokens { display: flex; flex-wrap: wrap; gap: 3px; margin: .4rem 0; }
.tokens .mark { font: 11px/1.5 ui-monospace, "Liberation Mono", Menlo, monospace; color: var(--ink); margin: 0; }
.tokens small { color: var(--soft); margin-left: .4em; }
.where { margin-top: .5rem !important; padding-top: .4rem; border-top: 1px solid var(--rule); color: var(--soft);
  font-size: .78rem; }
"""
