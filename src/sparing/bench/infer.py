"""`sparing bench infer`: which figure, with which options."""

from __future__ import annotations

from sparing.bench.train import measure_figure

FIGURES = {
    "generate": "generation.generate",
    "llamacpp": "generation.llamacpp",
    "drafts": "drafting.drafts",
    "turns": "drafting.turns",
    "cache": "drafting.cache",
    "experts": "drafting.experts",
}
TITLES = {
    "generate": "Decoding against transformers.generate",
    "llamacpp": "The engine against llama.cpp",
    "drafts": "Self-speculation",
    "turns": "The second turn of a conversation",
    "cache": "The key-value cache of a long text",
    "experts": "Experts that do not fit into memory",
}


def run(figure: str = "generate", json: bool = False, **options: object) -> dict:
    """Measure one of FIGURES, as `bench.train.run` does."""
    return measure_figure("infer", FIGURES, TITLES, figure, json, options)
