"""`sparing bench`: the list of figures, and the function that measures one of them."""

from __future__ import annotations

import difflib
import importlib
import inspect
from collections.abc import Callable

from sparing.account.meter import metered
from sparing.base.config import UserError
from sparing.bench.peers import require
from sparing.bench.worker import WorkerError

FIGURES = {
    "train": {
        "throughput": ("sparing.bench.throughput.throughput", "Training speed against transformers"),
        "quality": ("sparing.bench.quality.quality", "Held-out bits per byte for a budget"),
        "tune": ("benchmarks.yardstick.tune", "The yardstick, tuned"),
        "gpu": ("sparing.bench.gpu.gpu", "Training speed on a GPU"),
        "startup": ("sparing.bench.startup.startup", "Starting up"),
        "forecast": ("sparing.bench.forecast.forecast", "What was predicted, and what came"),
    },
    "precision": {
        "speed": ("sparing.bench.precision_speed.precision_speed", "Training speed in 8 bits"),
        "memory": ("sparing.bench.precision_memory.precision_memory", "Memory at peak"),
        "loss": ("sparing.bench.precision_loss.precision_loss", "Loss after equal tokens"),
    },
    "infer": {
        "generate": ("sparing.bench.generation.generate", "Decoding against transformers.generate"),
        "llamacpp": ("sparing.bench.generation.llamacpp", "The engine against llama.cpp"),
        "drafts": ("sparing.bench.drafting.drafts", "Self-speculation"),
        "turns": ("sparing.bench.drafting.turns", "The second turn of a conversation"),
        "cache": ("sparing.bench.drafting.cache", "The key-value cache of a long text"),
        "experts": ("sparing.bench.drafting.experts", "Experts that do not fit into memory"),
    },
    "data": {
        "curate": ("sparing.bench.curating.curate", "Curating text against datatrove"),
    },
}
"""By area and name: the function that measures a figure, and its title. The first of an area is its default."""


def bench(area: str, figure: str | None = None, **options: object) -> dict:
    """Measure one figure -> {"title", "rows"}; the rows are those of `results.row`.

    area: train, precision, infer or data. figure: a name of `FIGURES`, by default the area's first. options: those of the figure's own
    function. Raises UserError for an unknown figure or option, and where a side fails.
    """
    if area not in FIGURES:
        raise UserError(f"bench {area}: not available; choose {' or '.join(FIGURES)}")
    figures = FIGURES[area]
    figure = figure or next(iter(figures))
    if figure not in figures:
        near = difflib.get_close_matches(str(figure), figures, 1)
        hint = f"did you mean {near[0]}? all: " if near else "choose from "
        raise UserError(f"bench {area}: no figure {figure!r}; {hint}{', '.join(figures)}")
    path, title = figures[figure]
    module, _, name = path.rpartition(".")
    if module.startswith("benchmarks."):
        require(f"bench {area} {figure}")
    measure = getattr(importlib.import_module(module), name)
    _check(f"bench {area} {figure}", measure, options)
    try:
        with metered("bench", first=f"{area} {figure}"):
            return {"title": title, "rows": measure(**options)}
    except WorkerError as error:
        raise UserError(f"bench {area} {figure}: a side failed: {error}") from error


def _check(figure: str, measure: Callable, options: dict[str, object]) -> None:
    known = inspect.signature(measure).parameters
    for name in options:
        if name not in known:
            near = difflib.get_close_matches(name, known, 1)
            hint = f"nearest: {_flag(near[0])}" if near else f"it has {', '.join(map(_flag, known))}"
            raise UserError(f"{figure}: unknown option {_flag(name)}; {hint}")
    for name, parameter in known.items():
        if parameter.default is parameter.empty and name not in options:
            raise UserError(f"{figure} needs {_flag(name)}")


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")
