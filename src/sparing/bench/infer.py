"""`sparing bench infer`: which figure, with which options."""

from __future__ import annotations

from sparing.bench import train

FIGURES = {"generate": "generation.generate", "llamacpp": "generation.llamacpp"}
TITLES = {"generate": "Decoding against transformers.generate", "llamacpp": "The engine against llama.cpp"}


def run(figure: str = "generate", json: bool = False, **options: object) -> dict:
    """Measure one of FIGURES, as `bench.train.run` does."""
    return train.run_one("infer", FIGURES, TITLES, figure, json, options)
