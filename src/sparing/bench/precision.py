"""`sparing bench precision`: memory, loss and speed of training in 8 bits, each beside 16."""

from __future__ import annotations

from sparing.bench.train import measure_figure

FIGURES = {
    "memory": "precision_memory.precision_memory",
    "loss": "precision_loss.precision_loss",
    "speed": "precision_speed.precision_speed",
}
TITLES = {"memory": "Memory at peak", "loss": "Loss after equal tokens", "speed": "Training speed in 8 bits"}


def run(figure: str = "speed", json: bool = False, **options: object) -> dict:
    """Measure one of FIGURES -> {"rows": [...]}; see `bench.train.run`."""
    return measure_figure("precision", FIGURES, TITLES, figure, json, options)
