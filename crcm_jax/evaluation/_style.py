"""The report's style sheet: light and dark, readable on a phone, printable."""

STYLE = """
:root { color-scheme: light dark; --ink: #1d2430; --soft: #5b6675;
  --paper: #fdfdfb; --line: #dfe3e8; --shade: #f1f3f5; --accent: #0b63b5;
  --other: #c2410c; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6e9ee; --soft: #a3adba;
  --paper: #14181e; --line: #323a45; --shade: #1d232b; --accent: #74b5f5;
  --other: #fb923c; } }
body { margin: 0; background: var(--paper); color: var(--ink);
  font: 16px/1.5 system-ui, -apple-system, "Segoe UI", "DejaVu Sans",
    sans-serif; }
main { max-width: 76rem; margin: 0 auto; padding: 2rem 1.25rem 4rem; }
h1 { font-size: 1.8rem; line-height: 1.2; margin: 0; }
h2 { font-size: 1.25rem; margin: 2.5rem 0 .5rem; padding-top: 1rem;
  border-top: 1px solid var(--line); }
h3 { font-size: 1rem; font-weight: 600; margin: 1.25rem 0 .5rem; }
p, dd { max-width: 46rem; margin: .25rem 0 .75rem; color: var(--soft); }
dt { font-weight: 600; }
dd { margin-left: 0; }
figure { margin: 0; }
figcaption { font-size: .8rem; color: var(--soft); padding-top: .25rem; }
.clips { display: grid; gap: .75rem;
  grid-template-columns: repeat(auto-fill, minmax(7.5rem, 1fr)); }
.clips img, .missing { display: block; width: 100%; height: auto;
  aspect-ratio: 1; object-fit: contain; image-rendering: pixelated;
  background: #000; border-radius: 4px; }
.missing { display: grid; place-items: center; background: var(--shade);
  color: var(--soft); font-size: .8rem; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: .4rem .8rem; text-align: right; vertical-align: bottom;
  border-bottom: 1px solid var(--line); white-space: nowrap; }
th { font-weight: 600; }
thead th { white-space: normal; }
th small { display: block; font-weight: 400; color: var(--soft); }
th:first-child { text-align: left; }
tr.floor { background: var(--shade); }
b { color: var(--accent); }
.charts { display: grid; gap: 1.5rem;
  grid-template-columns: repeat(auto-fill, minmax(20rem, 1fr)); }
svg { display: block; width: 100%; height: auto; }
svg text { font-size: 11px; fill: var(--soft); }
svg .grid { stroke: var(--line); }
svg polyline { fill: none; stroke: var(--accent); stroke-linejoin: round; }
svg .raw { opacity: .3; stroke-width: 1; }
svg .mean { stroke-width: 2; }
svg .other { stroke: var(--other); }
svg .mean.other { stroke-dasharray: 6 3; }
.first { color: var(--accent); }
.other { color: var(--other); }
summary { cursor: pointer; color: var(--accent); }
pre { background: var(--shade); padding: .8rem 1rem; border-radius: 4px;
  overflow-x: auto; font-size: .85rem; }
"""
