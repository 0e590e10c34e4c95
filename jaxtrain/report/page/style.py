"""The look of the page and the plots: the colours of both, and the style sheet of the page."""

COLORS = {
    "paper": ("#fcfcfa", "#15171a"),
    "ink": ("#1c1e21", "#e6e6e3"),
    "muted": ("#6a7078", "#979da6"),
    "rule": ("#e3e3de", "#2c3036"),
    "tint": ("#f3f3ef", "#1d2024"),
    "right": ("#2f6fb0", "#5b9be0"),
    "wrong": ("#d2553f", "#e8705a"),
    "c0": ("#2463a8", "#74b0f0"),
    "c1": ("#c2571a", "#f0995c"),
    "c2": ("#1f7f5c", "#62c79d"),
    "c3": ("#8348a8", "#c294e6"),
    "c4": ("#b03052", "#f0859f"),
    "c5": ("#7a6a10", "#d4c257"),
    "c6": ("#1b7f92", "#62c8da"),
    "c7": ("#5c6470", "#a9b1bd"),
}
"""By name: a colour on a light page and on a dark one; `--NAME` in the style sheet."""

LIGHT = {name: light for name, (light, _) in COLORS.items()}
"""The colours of the PNG plots. No two are equal, so that a colour tells its name."""

NUM_CURVE_COLORS = 8


def curve_color(index: int | None) -> str:
    """The name of a curve's colour.

    >>> curve_color(None), curve_color(9)
    ('muted', 'c1')
    """
    return "muted" if index is None else f"c{index % NUM_CURVE_COLORS}"


def _variables(page: int) -> str:
    return " ".join(f"--{name}: {colors[page]};" for name, colors in COLORS.items())


SHEET = f"""
:root {{ {_variables(0)} }}
@media (prefers-color-scheme: dark) {{ :root {{ {_variables(1)} }} }}
"""
SHEET += """
* { box-sizing: border-box; }
body {
  margin: 0; background: var(--paper); color: var(--ink);
  font: 15px/1.5 ui-sans-serif, system-ui, -apple-system, "Segoe UI", "Helvetica Neue",
    "Liberation Sans", Arial, sans-serif;
  font-variant-numeric: tabular-nums;
}
main { max-width: 1120px; margin: 0 auto; padding: 48px 32px 64px; }
header p, footer, .note, section > p { color: var(--muted); }
h1 { margin: 0; font-size: 32px; line-height: 1.15; font-weight: 650; letter-spacing: -0.02em;
  overflow-wrap: anywhere; }
header p { margin: 6px 0 0; overflow-wrap: anywhere; }
h2 { margin: 48px 0 14px; padding-top: 14px; border-top: 1px solid var(--rule); font-size: 17px;
  font-weight: 650; }
section > p { margin: -8px 0 14px; }
footer { margin-top: 56px; font-size: 13px; }

.numbers { display: flex; flex-wrap: wrap; gap: 20px 44px; margin: 34px 0 0; }
.numbers dt { color: var(--muted); font-size: 13px; }
.numbers dd { margin: 0; font-size: 30px; line-height: 1.2; font-weight: 600;
  letter-spacing: -0.02em; }
.numbers dd.note { font-size: 13px; font-weight: 400; letter-spacing: 0; }

.charts { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(440px, 100%), 1fr));
  gap: 30px 40px; }
figure { margin: 0; }
.chart { display: block; width: 100%; height: auto; overflow: visible; stroke-linejoin: round; }
.chart .point { fill: var(--c); opacity: 0; }
.chart .point:hover { opacity: 1; }

.wide { overflow-x: auto; }
table { border-collapse: collapse; font-size: 14px; }
th, td { padding: 5px 22px 5px 0; text-align: left; font-weight: 400; vertical-align: baseline; }
thead th { color: var(--muted); font-size: 13px; border-bottom: 1px solid var(--rule); }
tbody tr + tr > * { border-top: 1px solid var(--rule); }
.number { text-align: right; white-space: nowrap; }
.best { font-weight: 700; }
.chip { display: inline-block; width: 14px; height: 3px; margin: 0 8px 4px 0;
  background: var(--c); border-radius: 2px; }
.settings th { color: var(--muted); width: 1%; white-space: nowrap; padding-right: 28px; }
.settings td { overflow-wrap: anywhere; }

.confusion th, .confusion td { padding: 5px 9px; }
.confusion thead th:first-child { padding-left: 0; white-space: nowrap; }
.confusion tbody th { padding-left: 0; padding-right: 16px; white-space: nowrap; }
.confusion td { min-width: 44px; }
.confusion .none { color: var(--rule); }
.confusion .right { background: color-mix(in srgb, var(--right) var(--h), transparent); }
.confusion .wrong { background: color-mix(in srgb, var(--wrong) var(--h), transparent);
  font-weight: 600; }

.mistakes { display: grid; grid-template-columns: repeat(auto-fill, minmax(104px, 1fr));
  gap: 20px 16px; }
.mistakes img, .mistakes svg { display: block; width: 100%; border-radius: 3px;
  background: var(--tint); }
.mistakes .pixels { image-rendering: pixelated; }
.mistakes .signal { fill: none; stroke: var(--c0); stroke-width: 1.6; stroke-linejoin: round; }
.mistakes figcaption { margin-top: 5px; font-size: 13px; line-height: 1.35;
  overflow-wrap: anywhere; }
.mistakes b { color: var(--wrong); }
.mistakes span, .mistakes small { color: var(--muted); }
.mistakes small { display: block; font-size: 12px; }

pre { margin: 0 0 16px; padding: 12px 14px; overflow-x: auto; background: var(--tint);
  border-radius: 4px; font-size: 13px; }
pre.sample { white-space: pre-wrap; overflow-wrap: anywhere;
  font-family: ui-monospace, "SF Mono", Menlo, Consolas, "DejaVu Sans Mono", monospace; }
code { font-family: ui-monospace, "SF Mono", Menlo, Consolas, "DejaVu Sans Mono", monospace; }
summary { cursor: pointer; font-weight: 600; padding: 6px 0; }
details.run { margin-top: 28px; border-top: 1px solid var(--rule); padding-top: 8px; }
details.run > summary { font-size: 17px; }
@media (max-width: 560px) {
  main { padding: 28px 18px 40px; }
  h1 { font-size: 26px; }
  .numbers { gap: 16px 28px; }
  .numbers dd { font-size: 24px; }
}
@media print { .charts, .mistakes { break-inside: avoid; } body { background: none; } }
"""
