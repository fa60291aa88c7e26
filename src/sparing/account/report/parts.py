"""Pieces of the page as HTML text. Everything that comes from a run is escaped."""

from __future__ import annotations

from html import escape

from sparing.account.receipt import COMPARED, at
from sparing.account.report.story import Story
from sparing.account.wording import (
    COMPARED_HEAD,
    LABEL,
    STAGE_HEAD,
    amount,
    ancestry,
    compared,
    digits,
    published_text,
    quality_text,
    scaled,
    staged,
)

TILES = ("bpb", "time_s", "cost_usd", "energy_kwh", "co2e_g", "tokens")


def tiles(story: Story) -> str:
    """The handful of figures that matter, each saying whether it was measured."""
    actual = (story.receipt or {}).get("actual", {})
    figures = [(LABEL[name], amount(name, figure["value"]), figure["how"]) for name in TILES if (figure := at(actual, name))]
    parts = story.summary.get("parameters")
    if parts:
        figures.append(("parameters", scaled(parts, ""), f"{scaled(story.summary['active_parameters'], '')} active"))
    return boxes(figures)


def boxes(figures: list[tuple[str, str, str]]) -> str:
    """(name, value, small print) side by side."""
    cells = "".join(
        f'<div class="tile"><dt>{escape(name)}</dt><dd>{escape(value)}<small>{escape(how)}</small></dd></div>'
        for name, value, how in figures
    )
    return f'<dl class="tiles">{cells}</dl>' if cells else ""


def table(caption: str, head: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    """A table that becomes a list of cards on narrow screens; columns that are empty throughout are left out. Roles are written out, for
    browsers drop those of tables that are shown as blocks."""
    if not rows:
        return ""
    keep = [i for i in range(len(head)) if i == 0 or any(row[i] not in ("", "–") for row in rows)]
    top = "".join(f'<th scope="col" role="columnheader">{escape(head[i])}</th>' for i in keep)
    body = "".join('<tr role="row">' + "".join(_cell(head[i], row[i], first=i == 0) for i in keep) + "</tr>" for row in rows)
    return (
        f'<table role="table"><caption>{escape(caption)}</caption><thead role="rowgroup"><tr role="row">{top}</tr></thead>'
        f'<tbody role="rowgroup">{body}</tbody></table>'
    )


def _cell(label: str, text: str, first: bool) -> str:
    if first:
        return f'<th scope="row" role="rowheader">{escape(text)}</th>'
    empty = " class=none" if text in ("", "–") else ""
    return f'<td role="cell"{empty} data-label="{escape(label)}">{escape(text) or "–"}</td>'


def prediction(story: Story) -> str:
    if story.receipt is None:
        return ""
    note = "".join(f"<p>{escape(text[0].upper() + text[1:])}.</p>" for text in story.receipt["missing"])
    return note + table("Predicted before the run, and what it came to", COMPARED_HEAD, compared(story.receipt))


def side_by_side(stories: list[Story]) -> str:
    """One row per figure, one column per run."""
    head = ("", *(story.name for story in stories))
    rows = []
    for name in COMPARED:
        figures = [at((story.receipt or {}).get("actual"), name) for story in stories]
        if any(figures):
            rows.append((LABEL[name], *(amount(name, figure["value"]) if figure else "–" for figure in figures)))
    bought = [(story.receipt or {}).get("quality", {}) for story in stories]
    for key, label in (("per_usd", "bits saved per byte, a dollar"), ("per_kwh", "bits saved per byte, a kWh")):
        if any(key in each for each in bought):
            rows.append((label, *(digits(each[key]) if key in each else "–" for each in bought)))
    return table("What each run cost and reached", head, rows)


def bill(story: Story) -> str:
    """The receipt: stages, what came later, ancestors, what it bought, where the figures come from."""
    receipt = story.receipt
    if receipt is None:
        return ""
    parts = [table("Training, by stage", STAGE_HEAD, staged(receipt["stages"]))]
    parts.append(table("Since then, not in the figures above", STAGE_HEAD, staged(receipt["later"])))
    parts.append(table("Derived from", ("run", "as", "time", "cost", "share of the whole line"), ancestry(receipt["ancestors"])))
    if receipt["published"]:
        parts.append(f"<p>{escape(published_text(receipt['published']))}.</p>")
    if bought := quality_text(receipt["quality"]):
        parts.append(f"<p>{escape(bought)}.</p>")
    energy, rates = receipt["actual"]["energy_kwh"], receipt["rates"]
    items = [f"Machine: {receipt['machine']}", f"Energy {energy['how']}: {energy['source']}; PUE {rates.get('pue', 1):g}"]
    if rates:
        items.append(f"${rates['usd_per_hour']:.4g} an hour, ${rates['usd_per_kwh']:.4g} a kWh, {rates['gco2e_per_kwh']:.4g} gCO2e a kWh")
        items += [f"{name.replace('_', ' ')}: {source}" for name, source in rates.get("sources", {}).items()]
    sources = "".join(f"<li>{escape(item)}</li>" for item in items)
    return "".join(parts) + f"<details><summary>Where the figures come from</summary><ul>{sources}</ul></details>"


def samples(story: Story) -> str:
    """What the model wrote; prompts stand out."""
    return "".join(
        f'<pre class="sample"><b>{escape(sample["prompt"])}</b>{escape(sample["text"])}</pre>'
        for sample in story.samples
        if sample.get("text")
    )


def recipe(story: Story) -> str:
    try:
        text = story.run.config_file.read_text(encoding="utf-8")
    except OSError:
        return ""
    title = f"{escape(story.name)}/config.toml, with the reason for each derived value"
    return f"<details><summary>{title}</summary><pre>{escape(text)}</pre></details>"
