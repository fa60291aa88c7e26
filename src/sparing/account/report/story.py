"""Reads from a run folder what the report shows of it."""

from __future__ import annotations

from dataclasses import dataclass, field

from sparing.account.receipt import read_state, receipt
from sparing.base.config import UserError
from sparing.base.files import read_lines
from sparing.base.run import RunFolder

POINTS = 160
"""Of a curve: each the mean of its span of steps, so that what is seen is the course and not the noise of single batches."""


@dataclass
class Story:
    """A run as the page shows it. Curves are of training steps, in their order."""

    run: RunFolder
    name: str
    steps: list[dict]
    evaluations: list[dict]
    loads: list[dict]
    """{"step", "loads": tokens by layer and expert}."""
    samples: list[dict]
    summary: dict
    receipt: dict | None
    """None where nothing was metered."""
    notes: list[str] = field(default_factory=list)
    wakes: dict[str, dict[str, dict[str, float]]] = field(default_factory=dict)
    """Of a run that has grown: text -> layer -> {expert: share of the text's tokens that wake it}."""


def story(run: RunFolder) -> Story:
    """Raises UserError for a damaged ledger or a run that has not made a step."""
    lines = read_lines(run.metrics_file)
    steps = [line for line in lines if line.get("loss") is not None and "eval_bpb" not in line]
    if not steps:
        raise UserError(f"{run} has no training steps to report on yet")
    summary = read_state(run, "summary", dict) or {}
    try:
        bill, notes = receipt(run), []
    except UserError as error:
        if "nothing was metered" not in str(error):
            raise
        bill, notes = None, ["This run was not metered: it is older than its ledger."]
    return Story(
        run=run,
        name=run.path.resolve().name,
        steps=steps,
        evaluations=[line for line in lines if line.get("eval_bpb") is not None],
        loads=read_lines(run.state / "loads.jsonl"),
        samples=summary.get("samples", []),
        summary=summary,
        receipt=bill,
        wakes=_wakes(run),
        notes=notes if summary else [*notes, "This run is not finished: the page shows it as far as it is."],
    )


def _wakes(run: RunFolder) -> dict[str, dict[str, dict[str, float]]]:
    """What state/wakes.json says, as far as it has that form."""

    def inside(value: object, kind: type = dict) -> dict:
        return {str(key): one for key, one in value.items() if isinstance(one, kind)} if isinstance(value, dict) else {}

    found = {text: {layer: inside(shares, float) for layer, shares in inside(by_layer).items()} for text, by_layer in
             inside(read_state(run, "wakes", dict)).items()}  # fmt: skip
    return {text: by_layer for text, by_layer in found.items() if any(by_layer.values())}


def curve(story: Story, key: str, scale: float = 1.0) -> tuple[list[float], list[float]]:
    """(millions of tokens, mean of `key` times scale) in at most `POINTS` spans of steps; steps without it are left out."""
    points = [(line["tokens"], line[key]) for line in story.steps if isinstance(line.get(key), int | float)]
    size = -(-len(points) // POINTS) or 1
    spans = [points[i : i + size] for i in range(0, len(points), size)]
    return [span[-1][0] / 1e6 for span in spans], [_short(scale * sum(value for _, value in span) / len(span)) for span in spans]


def _short(value: float) -> float:
    """Five digits: what a chart can show."""
    return float(f"{value:.5g}")
