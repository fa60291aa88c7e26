"""The data card: what came in, what each stage took out and why, what stays, what it cost. One HTML page that needs no network."""

from __future__ import annotations

from collections import Counter
from html import escape
from pathlib import Path

from sparing.account.ledger import Entry
from sparing.account.report.charts import COLOURS, Chart, layout_of
from sparing.account.report.page import frame, grid
from sparing.account.report.parts import boxes, table
from sparing.account.wording import amount
from sparing.base.files import write_atomic
from sparing.curate.pipeline import Fate

MOST = 20
"""Rows of a table."""


def write_card(path: Path, title: str, summary: dict, fate: Fate, costs: list[Entry]) -> None:
    """Raises UserError where plotly is not installed."""
    counts, sizes = summary["documents"], summary["bytes"]
    figures = [
        ("documents in", f"{counts['in']:,}", f"{sizes['in'] / 1e6:,.1f} MB of text"),
        ("stay", f"{counts['out']:,}", f"{sizes['out'] / 1e6:,.1f} MB, {_share(counts['out'], counts['in'])}"),
        ("rejected", f"{counts['rejected']:,}", _share(counts["rejected"], counts["in"])),
        ("quarantined", f"{counts['quarantined']:,}", "could not be read"),
        ("edited", f"{summary['edited']:,}", "of those that stay"),
    ]
    drawn = [chart for chart in (_reasons(fate), _lengths(fate)) if chart]
    rejected = [
        (name, f"{count:,}", _share(count, counts["in"]), f"{fate.bytes[name] / 1e6:,.2f} MB")
        for name, count in fate.rejected.most_common()
    ]
    quarantined = [(name, f"{count:,}", _share(count, counts["in"])) for name, count in summary["quarantined"].items()]
    spent = [(row.stage, amount("time_s", row.wall_s), amount("cost_usd", row.usd), amount("energy_kwh", row.kwh)) for row in costs]
    sections = [
        ("removed", "What was taken out", grid(drawn, 0) + table("Rejected, by rule", ("rule", "documents", "share", "text"), rejected)),
        ("unread", "What could not be read", table("Quarantined, by reason", ("reason", "documents", "share"), quarantined)),
        ("kinds", "What stays", _kinds("Languages", fate.languages) + _kinds("Licences", fate.licences)),
        ("samples", "Samples of what was rejected", "".join(_samples(*each) for each in sorted(fate.samples.items()))),
        ("cost", "Cost", table("By stage", ("stage", "time", "cost", "energy"), spent)),
    ]
    write_atomic(path, frame(title, f"{counts['in']:,} documents, {counts['out']:,} stay", sections, drawn, tiles=boxes(figures)))


def _share(part: int, whole: int) -> str:
    return f"{part / whole:.1%}" if whole else "–"


def _kinds(caption: str, counts: Counter[str]) -> str:
    rows = [(name, f"{count:,}", _share(count, counts.total())) for name, count in counts.most_common(MOST)]
    return table(caption, ("", "documents", "share"), rows)


def _reasons(fate: Fate) -> Chart | None:
    counts = fate.rejected.most_common(MOST)
    if not counts:
        return None
    names, values = [name for name, _ in counts][::-1], [count for _, count in counts][::-1]
    bars = {"type": "bar", "orientation": "h", "x": values, "y": names, "marker": {"color": COLOURS[0]}}
    shape = layout_of("", legend=False, across="documents") | {"height": 90 + 24 * len(names)}
    return Chart("Rejected, by rule", ", ".join(f"{name}: {count:,}" for name, count in counts), [bars], shape)


def _lengths(fate: Fate) -> Chart | None:
    data, said = [], []
    for number, (name, label) in enumerate((("out", "stay"), ("rejected", "rejected"))):
        powers = sorted(fate.lengths[name])
        if not powers:
            continue
        x, y = [f"{2**power:,}" for power in powers], [fate.lengths[name][power] for power in powers]
        data.append({"type": "bar", "name": label, "x": x, "y": y, "marker": {"color": COLOURS[number]}})
        said.append(f"{label}: most have {2 ** max(powers, key=fate.lengths[name].__getitem__):,} characters or up to twice as many")
    if not data:
        return None
    every = sorted({power for counts in fate.lengths.values() for power in counts})
    shape = layout_of("documents", legend=len(data) > 1, across="characters, from")
    shape["xaxis"] = shape["xaxis"] | {"type": "category", "categoryorder": "array", "categoryarray": [f"{2**power:,}" for power in every]}
    return Chart("Lengths", "; ".join(said), data, shape)


def _samples(reason: str, samples: list[tuple[int, str, str]]) -> str:
    texts = "".join(f"<p>{escape(where)}</p><pre>{escape(text)}</pre>" for _, where, text in samples)
    return f"<details><summary>{escape(reason)}</summary>{texts}</details>"
