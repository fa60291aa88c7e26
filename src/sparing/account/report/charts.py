"""The report's charts, as dictionaries in plotly.js's schema: one chart a quantity with one line a run, one heat map a run."""

from __future__ import annotations

from dataclasses import dataclass

from sparing.account.receipt import at
from sparing.account.report.story import Story, curve
from sparing.account.wording import digits

COLOURS = ("#0072B2", "#D55E00", "#007A5A", "#A3447F", "#8A6100", "#3D7EA6")
"""Told apart by most colour-blind readers (after Okabe and Ito, jfly.uni-koeln.de/color), darkened to 4.5:1 on white where paler."""
DASHES = ("solid", "dash", "dot", "dashdot", "longdash", "longdashdot")
ROWS = 200
"""A heat map shows every expert up to this many; beyond, each layer's busiest."""
INK, GRID = "#1d232a", "#dfe4e8"


@dataclass
class Chart:
    title: str
    says: str
    """What it shows, in words: for those who do not see it."""
    data: list[dict]
    layout: dict
    wide: bool = False


CURVES = (
    ("loss", "Training loss", "nats per token", 1.0),
    ("bpb", "Held-out text", "bits per byte", 1.0),
    ("tokens_per_s", "Speed", "tokens per second", 1.0),
    ("mfu", "Share of the peak (MFU)", "%", 100.0),
    ("idle", "Idle cores", "%", 100.0),
    ("memory_bytes", "Memory", "GB", 1e-9),
    ("watts", "Power", "W", 1.0),
)


def charts(stories: list[Story]) -> list[Chart]:
    """All charts that the runs have figures for."""
    drawn = []
    for key, title, unit, scale in CURVES:
        lines = [_points(story, key, scale) for story in stories]
        if any(x for x, _ in lines):
            drawn.append(_lines(stories, lines, key, title, unit))
    maps = [draw(story, len(stories) > 1) for story in stories for draw in (heat_map, wakes_map)]
    return drawn + [chart for chart in maps if chart]


def _points(story: Story, key: str, scale: float) -> tuple[list[float], list[float]]:
    if key != "bpb":
        return curve(story, key, scale)
    return [line.get("tokens", 0) / 1e6 for line in story.evaluations], [round(line["eval_bpb"], 4) for line in story.evaluations]


def _lines(stories: list[Story], lines: list[tuple[list[float], list[float]]], key: str, title: str, unit: str) -> Chart:
    data, said = [], []
    for number, (story, (x, y)) in enumerate(zip(stories, lines, strict=True)):
        if not x:
            continue
        colour = COLOURS[number % len(COLOURS)]
        data.append(
            {
                "type": "scatter", "mode": "lines+markers" if key == "bpb" else "lines", "name": story.name, "x": x, "y": y,
                "line": {"color": colour, "width": 2, "dash": DASHES[(number + number // len(COLOURS)) % len(DASHES)]},
                "marker": {"size": 7}, "hovertemplate": f"%{{y:.4g}} {unit} at %{{x:.3g}} M tokens<extra>{story.name}</extra>",
            }
        )  # fmt: skip
        if key == "bpb":
            data += _predicted(story, x, colour)
        whose = f"{story.name}: " if len(stories) > 1 else ""
        said.append(f"{whose}{digits(y[0])} at first, {digits(y[-1])} at last, between {digits(min(y))} and {digits(max(y))}")
    layout = layout_of(unit, legend=len(data) > 1)
    if key in ("loss", "bpb"):
        layout["yaxis"] |= _without_the_beginning(lines, data)
    else:
        layout["yaxis"]["rangemode"] = "tozero"
    return Chart(title, f"{title}, {unit}. " + ". ".join(said) + ".", data, layout)


def _without_the_beginning(lines: list[tuple[list[float], list[float]]], data: list[dict]) -> dict:
    """A range of which the first steps' high values do not squeeze the rest into a line; predictions and their intervals are in it."""
    rest = [value for _, y in lines for value in y[len(y) // 20 :]]
    for mark in data:
        if "error_y" in mark:
            rest += [mark["y"][0] + mark["error_y"]["array"][0], mark["y"][0] - mark["error_y"]["arrayminus"][0]]
    low, high = min(rest), max(rest)
    pad = 0.06 * (high - low) or 0.05
    return {"range": [low - pad, high + pad]}


def _predicted(story: Story, x: list[float], colour: str) -> list[dict]:
    """The bits per byte that the plan foresaw, with its interval, at the end of the run."""
    figure = at((story.receipt or {}).get("predicted"), "bpb")
    if figure is None:
        return []
    mark = {"type": "scatter", "mode": "markers", "name": "predicted", "x": [x[-1]], "y": [figure["value"]],
            "marker": {"symbol": "diamond-open", "size": 11, "color": colour, "line": {"width": 2}},
            "hovertemplate": "predicted %{y:.3f}<extra></extra>"}  # fmt: skip
    if figure.get("low") is not None and figure.get("high") is not None:
        mark["error_y"] = {"array": [figure["high"] - figure["value"]], "arrayminus": [figure["value"] - figure["low"]]}
    return [mark]


def layout_of(unit: str, *, legend: bool, across: str = "million tokens") -> dict:
    axis = {"gridcolor": GRID, "zeroline": False, "automargin": True, "fixedrange": True, "tickfont": {"color": INK}}
    return {
        "height": 300 if legend else 270,
        "margin": {"l": 52, "r": 12, "t": 8, "b": 44},
        "paper_bgcolor": "white",
        "plot_bgcolor": "white",
        "font": {"family": "system-ui, sans-serif", "size": 13, "color": INK},
        "xaxis": axis | {"title": {"text": across, "standoff": 8}},
        "yaxis": axis | {"title": {"text": unit, "standoff": 6}},
        "hovermode": "x unified" if legend else "closest",
        "showlegend": legend,
        "legend": {"orientation": "h", "y": -0.28, "x": 0, "font": {"size": 12}},
    }


def heat_map(story: Story, named: bool) -> Chart | None:
    """Experts' loads over time, relative to their layer's mean (1: balanced); None for a dense model."""
    lines = [line for line in story.loads if line.get("loads")]
    if not lines:
        return None
    layers = [len(layer) for layer in lines[0]["loads"]]
    every = sum(layers) <= ROWS
    columns = [_column(line["loads"], every) for line in lines]
    rows = [list(row) for row in zip(*columns, strict=True)]
    names = [f"{i + 1}.{j + 1}" for i, n in enumerate(layers) for j in range(n)] if every else [f"{i + 1}" for i in range(len(layers))]
    starts = [sum(layers[:i]) for i in range(len(layers))] if every else list(range(len(layers)))
    layout = layout_of("MoE layer" + (", its experts" if every else ""), legend=False)
    layout["height"] = max(260, min(560, 90 + 5 * len(rows)))
    layout["xaxis"] |= {"title": {"text": "step", "standoff": 8}, "showgrid": False}
    layout["yaxis"] |= {
        "showgrid": False, "autorange": "reversed", "tickmode": "array",
        "tickvals": [start + (layers[i] - 1) / 2 for i, start in enumerate(starts)] if every else starts,
        "ticktext": [str(i + 1) for i in range(len(layers))],
    }  # fmt: skip
    layout["shapes"] = [
        {"type": "line", "xref": "paper", "x0": 0, "x1": 1, "y0": start - 0.5, "y1": start - 0.5, "line": {"color": "white", "width": 2}}
        for start in (starts[1:] if every else [])
    ]
    last = columns[-1]
    what = "Load of each expert, 1: its fair share" if every else "Busiest expert of each layer, 1: its fair share"
    data = [
        {
            "type": "heatmap", "z": rows, "x": [line["step"] for line in lines], "customdata": [[name] * len(lines) for name in names],
            "zmin": 0, "zmax": 2 if every else max(2.0, max(map(max, rows))), "zmid": 1, "colorscale": _SCALE,
            "colorbar": {"thickness": 10, "outlinewidth": 0, "tickfont": {"size": 11}, "x": 1.01},
            "hovertemplate": "step %{x}, expert %{customdata}: %{z:.2f} of its fair share<extra></extra>",
        }
    ]  # fmt: skip
    title = "Experts' balance" + (f": {story.name}" if named else "")
    says = f"{what}, over {len(lines)} steps of the run; at its end between {min(last):.2f} and {max(last):.2f}."
    return Chart(title, says, data, layout, wide=True)


_SCALE = [[0.0, "#2166ac"], [0.25, "#92c5de"], [0.5, "#f7f7f7"], [0.75, "#f4a582"], [1.0, "#b2182b"]]


def _column(layers: list[list[int]], every: bool) -> list[float]:
    values = []
    for layer in layers:
        mean = sum(layer) / len(layer) or 1.0
        values += [round(load / mean, 3) for load in layer] if every else [round(max(layer) / mean, 3)]
    return values


def wakes_map(story: Story, named: bool) -> Chart | None:
    """The share of each text's tokens that wake each expert, by layer; None for a run in which no domain was grown."""
    if not story.wakes:
        return None
    experts = list(dict.fromkeys(expert for by_layer in story.wakes.values() for shares in by_layer.values() for expert in shares))
    places = [(text, layer) for text, by_layer in story.wakes.items() for layer in by_layer]
    rows = [[story.wakes[text][layer].get(expert) for expert in experts] for text, layer in places]
    starts = [places.index((text, next(iter(by_layer)))) for text, by_layer in story.wakes.items()]
    middles = [start + (len(by_layer) - 1) / 2 for start, by_layer in zip(starts, story.wakes.values(), strict=True)]
    layout = layout_of("", legend=False)
    layout["height"] = max(260, min(700, 90 + 6 * len(rows)))
    layout["xaxis"] |= {"title": {"text": "expert", "standoff": 8}, "showgrid": False, "type": "category"}
    layout["yaxis"] |= {"showgrid": False, "autorange": "reversed", "tickmode": "array", "tickvals": middles, "ticktext": list(story.wakes)}
    layout["shapes"] = [
        {"type": "line", "xref": "paper", "x0": 0, "x1": 1, "y0": start - 0.5, "y1": start - 0.5, "line": {"color": INK, "width": 1}}
        for start in starts[1:]
    ]
    data = [
        {
            "type": "heatmap", "z": rows, "x": experts, "customdata": [[f"layer {layer}, {text}"] * len(experts) for text, layer in places],
            "zmin": 0, "zmax": 1, "colorscale": [[0.0, "#f7f7f7"], [1.0, "#2166ac"]],
            "colorbar": {"thickness": 10, "outlinewidth": 0, "tickfont": {"size": 11}, "x": 1.01, "tickformat": ".0%"},
            "hovertemplate": "%{customdata}: %{z:.1%} of the tokens wake %{x}<extra></extra>",
        }
    ]  # fmt: skip
    means = []
    for text, by_layer in story.wakes.items():
        domains = [expert for expert in experts if expert in story.wakes]
        known = {expert: [shares[expert] for shares in by_layer.values() if expert in shares] for expert in domains}
        means += [f"{text} wakes {expert} with {sum(of) / len(of):.2%} of its tokens" for expert, of in known.items() if of]
    title = "What each domain wakes" + (f": {story.name}" if named else "")
    says = f"Share of tokens that wake each expert, by text and layer. On average {'; '.join(means)}."
    return Chart(title, says, data, layout, wide=True)
