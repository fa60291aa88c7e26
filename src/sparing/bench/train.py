"""`sparing bench train`: which figure, with which options."""

from __future__ import annotations

import difflib
import importlib
import inspect

from sparing.base.config import UserError
from sparing.bench.report import print_table
from sparing.bench.worker import WorkerError

FIGURES = {
    "throughput": "throughput.throughput",
    "quality": "quality.quality",
    "tune": "yardstick.tune",
    "gpu": "gpu.gpu",
    "startup": "startup.startup",
    "forecast": "forecast.forecast",
}
TITLES = {
    "throughput": "Training speed against transformers",
    "quality": "Held-out bits per byte for a budget",
    "tune": "The yardstick, tuned",
    "gpu": "Training speed on a GPU",
    "startup": "Starting up",
    "forecast": "What was predicted, and what came",
}


def run(figure: str = "throughput", json: bool = False, **options: object) -> dict:
    """Measure one of FIGURES -> {"rows": [...]} (see `report.row`); a table on standard error unless `json`.

    options: those of the figure's own function. Raises UserError for an unknown figure or option.
    """
    return measure_figure("train", FIGURES, TITLES, figure, json, options)


def measure_figure(
    bench: str, figures: dict[str, str], titles: dict[str, str], figure: str, json: bool, options: dict[str, object]
) -> dict:
    """`run` of any bench: figures' functions as "module.name" of this folder."""
    if figure not in figures:
        near = difflib.get_close_matches(str(figure), figures, 1)
        hint = f"did you mean {near[0]}? all: " if near else "choose from "
        raise UserError(f"bench {bench}: no figure {figure!r}; {hint}{', '.join(figures)}")
    module, name = figures[figure].split(".")
    measure = getattr(importlib.import_module(f"sparing.bench.{module}"), name)
    _check(f"{bench} {figure}", measure, options)
    try:
        rows = measure(**options)
    except WorkerError as error:
        raise UserError(f"bench {bench} {figure}: a side failed: {error}") from error
    if not json:
        print_table(titles[figure], rows)
    return {"rows": rows}


def _check(figure: str, measure, options: dict[str, object]) -> None:
    known = inspect.signature(measure).parameters
    for name in options:
        if name not in known:
            near = difflib.get_close_matches(name, known, 1)
            hint = f"nearest: {_flag(near[0])}" if near else f"it has {', '.join(map(_flag, known))}"
            raise UserError(f"bench {figure}: unknown option {_flag(name)}; {hint}")
    for name, parameter in known.items():
        if parameter.default is parameter.empty and name not in options:
            raise UserError(f"bench {figure} needs {_flag(name)}")


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")
