"""Puts the report's page together: sections in order, the style, plotly.js once."""

from __future__ import annotations

import json
from html import escape
from pathlib import Path

from sparing import __version__
from sparing.account.report import parts
from sparing.account.report.charts import Chart, charts
from sparing.account.report.story import Story, story
from sparing.base.config import UserError
from sparing.base.files import output_file, write_atomic
from sparing.base.run import RunFolder

STYLE = """
:root { color-scheme: light; --ink: #1d232a; --soft: #56616c; --line: #d5dbe0; --accent: #0b5a8f; --panel: #f5f7f9; }
* { box-sizing: border-box; }
body { margin: 0; font: 16px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; color: var(--ink); background: white; }
main, header, footer { max-width: 1180px; margin: 0 auto; padding: 0 20px; }
header { padding-top: 28px; }
h1 { font-size: 1.7rem; line-height: 1.2; margin: 0 0 4px; overflow-wrap: anywhere; }
h2 { font-size: 1.25rem; margin: 40px 0 12px; padding-top: 14px; border-top: 1px solid var(--line); }
h3 { font-size: 1rem; margin: 0 0 2px; }
p { max-width: 75ch; margin: 8px 0; }
header p, footer { color: var(--soft); }
footer { padding-top: 32px; padding-bottom: 32px; font-size: .875rem; }
a { color: var(--accent); }
:focus-visible { outline: 3px solid var(--accent); outline-offset: 2px; border-radius: 2px; }
.skip { position: absolute; left: -9999px; }
.skip:focus { left: 12px; top: 12px; background: white; padding: 8px 12px; }
nav ul { display: flex; flex-wrap: wrap; gap: 4px 18px; list-style: none; padding: 0; margin: 14px 0 0; }
nav a { display: inline-block; padding: 4px 0; }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(132px, 1fr)); gap: 10px; margin: 22px 0 0; }
.tile { background: var(--panel); border: 1px solid var(--line); border-radius: 8px; padding: 10px 14px; }
.tile dt { color: var(--soft); font-size: .875rem; }
.tile dd { margin: 0; font-size: 1.3rem; font-weight: 650; font-variant-numeric: tabular-nums; line-height: 1.25; }
.tile small { display: block; font-size: .8rem; font-weight: 400; color: var(--soft); }
.grid { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 440px), 1fr)); gap: 22px; }
figure { margin: 0; min-width: 0; }
figure.wide { grid-column: 1 / -1; }
figcaption { font-size: .875rem; color: var(--soft); overflow-wrap: anywhere; }
.plot { width: 100%; }
table { border-collapse: collapse; width: 100%; margin: 16px 0 26px; font-variant-numeric: tabular-nums; }
caption { text-align: left; font-weight: 650; padding-bottom: 6px; }
th, td { text-align: right; padding: 6px 10px; border-bottom: 1px solid var(--line); font-weight: 400; vertical-align: top;
  overflow-wrap: anywhere; }
thead th { color: var(--soft); font-size: .875rem; }
th:first-child { text-align: left; padding-left: 0; }
tbody th { font-weight: 600; }
details { margin: 10px 0; }
summary { cursor: pointer; padding: 6px 0; color: var(--accent); }
li { overflow-wrap: anywhere; }
pre { white-space: pre-wrap; overflow-wrap: anywhere; background: var(--panel); border: 1px solid var(--line); border-radius: 8px;
  padding: 12px 14px; font: 14px/1.5 ui-monospace, "DejaVu Sans Mono", Menlo, monospace; margin: 12px 0; }
.sample b { color: var(--accent); }
@media (max-width: 700px) {
  main, header, footer { padding-left: 14px; padding-right: 14px; }
  .tiles { grid-template-columns: 1fr 1fr; }
  table, tbody, tr, th, td, caption { display: block; width: 100%; text-align: left; }
  thead { position: absolute; left: -9999px; }
  tr { border: 1px solid var(--line); border-radius: 8px; padding: 8px 12px; margin: 8px 0; }
  th:first-child, td { border: 0; padding: 2px 0; }
  td { display: flex; justify-content: space-between; gap: 16px; text-align: right; }
  td.none { display: none; }
  td::before { content: attr(data-label); color: var(--soft); flex: none; }
}
@media print { details > * { display: block; } nav, .skip { display: none; } }
"""

DRAW = """
for (const plot of document.querySelectorAll(".plot")) {
  const figure = JSON.parse(document.getElementById(plot.dataset.figure).textContent);
  Plotly.newPlot(plot, figure.data, figure.layout, {responsive: true, displayModeBar: false});
}
"""


def write_page(runs: list[RunFolder], path: str | Path) -> dict:
    """Write the page about one or several runs. -> {"report": path, "bytes": size}.

    Raises UserError where a run has no steps yet, its ledger is damaged, the file cannot be written, or plotly is not installed.
    """
    file = output_file(path, "--out")
    stories = [story(run) for run in runs]
    _tell_apart(stories)
    size = write_atomic(file, page(stories))["bytes"]
    return {"report": str(path), "bytes": size}


def _tell_apart(stories: list[Story]) -> None:
    """Runs of one name are called by their whole paths."""
    names = [each.name for each in stories]
    for each in stories:
        if names.count(each.name) > 1:
            each.name = str(each.run)


def page(stories: list[Story]) -> str:
    """The whole page as HTML text."""
    one = stories[0] if len(stories) == 1 else None
    title = one.name if one else "Runs compared"
    drawn = charts(stories)
    curves = [chart for chart in drawn if not chart.wide]
    maps = [chart for chart in drawn if chart.wide]
    sections = [
        ("prediction", "Predicted and actual" if one else "Side by side", parts.prediction(one) if one else parts.side_by_side(stories)),
        ("curves", "Curves", grid(curves, 0)),
        ("experts", "Experts", grid(maps, len(curves))),
        ("samples", "Samples", _each(stories, parts.samples)),
        ("receipt", "Receipt", _each(stories, parts.bill)),
        ("recipe", "Recipe", "".join(parts.recipe(each) for each in stories)),
    ]
    notes = "".join(f"<p>{escape(each.name if not one else '')} {escape(note)}</p>" for each in stories for note in each.notes)
    return frame(title, _subtitle(stories), sections, drawn, notes=notes, tiles=parts.tiles(one) if one else "")


def frame(title: str, subtitle: str, sections: list[tuple[str, str, str]], drawn: list[Chart], *, notes: str = "", tiles: str = "") -> str:
    """An HTML page that needs no network. sections: (id, heading, HTML), empty ones left out; drawn: the charts that they place by `grid`.

    Raises UserError where plotly is not installed."""
    sections = [(name, heading, body) for name, heading, body in sections if body]
    links = "".join(f'<li><a href="#{name}">{heading}</a></li>' for name, heading, _ in sections)
    body = "".join(f'<section aria-labelledby="{name}"><h2 id="{name}">{heading}</h2>{body}</section>' for name, heading, body in sections)
    data = "".join(_data(chart, number) for number, chart in enumerate(drawn))
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{escape(title)} – Sparing</title>
<link rel="icon" href="data:,">
<style>{STYLE}</style>
</head>
<body>
<a class="skip" href="#main">Skip to the figures</a>
<header>
<h1>{escape(title)}</h1>
<p>{escape(subtitle)}</p>
{notes}
<nav aria-label="Sections"><ul>{links}</ul></nav>
{tiles}
</header>
<main id="main">{body}</main>
<footer>Sparing {__version__}. This page needs no network.</footer>
{data}
<script>{_plotly()}</script>
<script>{DRAW}</script>
</body>
</html>
"""


def _subtitle(stories: list[Story]) -> str:
    if len(stories) > 1:
        return ", ".join(each.name for each in stories)
    bill, summary = stories[0].receipt, stories[0].summary
    said = [f"{len(stories[0].steps):,} steps"]
    if summary:
        said.append(f"budget {summary['budget']}")
    if bill:
        said += [bill["machine"], bill["status"]]
    return ", ".join(said)


def grid(drawn: list[Chart], first: int) -> str:
    """Places for charts, the first of which is number `first` of the page's."""
    figures = "".join(
        f"<figure{' class=wide' if chart.wide else ''}><h3>{escape(chart.title)}</h3>"
        f'<div class="plot" data-figure="figure{first + i}" role="img" aria-label="{escape(chart.says)}" '
        f'style="height:{chart.layout["height"]}px"></div><figcaption>{escape(chart.says)}</figcaption></figure>'
        for i, chart in enumerate(drawn)
    )
    return f'<div class="grid">{figures}</div>' if figures else ""


def _each(stories: list[Story], part) -> str:
    """One run's part as it is, those of several behind headings to open."""
    shown = [(each, text) for each in stories if (text := part(each))]
    if len(stories) == 1:
        return shown[0][1] if shown else ""
    return "".join(f"<details><summary>{escape(each.name)}</summary>{text}</details>" for each, text in shown)


def _data(chart: Chart, number: int) -> str:
    text = json.dumps({"data": chart.data, "layout": chart.layout}, separators=(",", ":")).replace("<", "\\u003c")
    return f'<script type="application/json" id="figure{number}">{text}</script>'


def _plotly() -> str:
    try:
        from plotly.offline import get_plotlyjs
    except ImportError:
        raise UserError("reports need plotly: pip install plotly") from None
    return get_plotlyjs().replace("</script", "<\\/script")
