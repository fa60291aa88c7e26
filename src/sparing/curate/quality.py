"""A quality model of the user's own: which of two samples a text is more like.

A linear model over hashed n-grams, as fastText's classifiers are (Joulin et al. 2017, arXiv 1607.01759), by which DCLM chose its texts (Li
et al. 2024, arXiv 2406.11794). Training on some thousand documents takes seconds, so it is done on the spot.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import ClassVar

import numpy as np

from sparing.base.config import UserError
from sparing.base.files import write_atomic
from sparing.curate.document import Document
from sparing.curate.filters import Scores

BITS = 18
"""2^18 weights, 1 MiB."""
EPOCHS, RATE = 4, 0.5
FORMAT = "sparing quality model 1"
_MULTIPLIER = np.uint64(0x9E3779B97F4A7C15)


@dataclass(frozen=True, eq=False)
class QualityModel:
    """The logistic regression of good (1) against bad (0)."""

    weights: np.ndarray
    """float32 [2^BITS]"""
    bias: float

    def score(self, document: Document) -> float:
        """Probability that the text is from the good sample, were both equally large."""
        return 1 / (1 + math.exp(-max(-30.0, min(30.0, _margin(self.weights, features(document)) + self.bias))))

    def save(self, path: str | Path) -> None:
        """Write the model as safetensors."""
        from safetensors.numpy import save

        tensors = {"weights": self.weights, "bias": np.array([self.bias], np.float32)}
        write_atomic(Path(path), save(tensors, metadata={"format": FORMAT}))

    @classmethod
    def load(cls, path: str | Path) -> QualityModel:
        """The model that `save` wrote. Raises UserError for any other file."""
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(path, framework="numpy") as file:
                if (file.metadata() or {}).get("format") != FORMAT:
                    raise UserError(f"{path}: not a quality model; train one with sparing.curate.quality.train")
                return cls(file.get_tensor("weights"), float(file.get_tensor("bias")[0]))
        except (OSError, SafetensorError) as error:
            raise UserError(f"{path}: cannot be read as a quality model: {str(error).splitlines()[0]}") from None


def features(document: Document) -> np.ndarray:
    """int64 [features]: the buckets of the words and pairs of words of a document, each once."""
    hashes = document.hashes
    keys = np.concatenate((hashes, hashes[:-1] * _MULTIPLIER + hashes[1:]))
    return np.unique((keys * _MULTIPLIER) >> np.uint64(64 - BITS)).astype(np.int64)


def _margin(weights: np.ndarray, buckets: np.ndarray) -> float:
    """The weights' sum over a document whose features make a vector of length 1, so that long documents are no surer than short ones."""
    return float(weights[buckets].sum(dtype=np.float64)) / math.sqrt(max(1, buckets.size))


def train(good: Iterable[str], bad: Iterable[str], seed: int = 0) -> QualityModel:
    """A model of two samples of texts; both count the same, however many they are. The same texts and seed give the same bits.

    AdaGrad (Duchi et al. 2011) over the documents in random order, one at a time.

    Raises:
        UserError: a sample without text.
    """
    samples = [[features(Document(text)) for text in texts if text.strip()] for texts in (bad, good)]
    for name, sample in zip(("bad", "good"), samples, strict=True):
        if not sample:
            raise UserError(f"the {name} sample has no text")
    examples = [(buckets, label) for label, sample in enumerate(samples) for buckets in sample]
    balance = [len(examples) / (2 * len(sample)) for sample in samples]
    weights, squares = np.zeros(1 << BITS, np.float32), np.full(1 << BITS, 1e-6, np.float32)
    bias, bias_squares = 0.0, 1e-6
    dice = np.random.default_rng(seed)
    for _ in range(EPOCHS):
        for index in dice.permutation(len(examples)):
            buckets, label = examples[index]
            margin = max(-30.0, min(30.0, _margin(weights, buckets) + bias))
            error = balance[label] * (1 / (1 + math.exp(-margin)) - label)
            slope = error / math.sqrt(buckets.size)
            squares[buckets] += slope * slope
            weights[buckets] -= RATE * slope / np.sqrt(squares[buckets]) * _scale(buckets.size)
            bias_squares += error * error
            bias -= 0.1 * error / math.sqrt(bias_squares)
    return QualityModel(weights, bias)


def _scale(size: int) -> float:
    """AdaGrad's step is the same for any slope; the first one of a document should move its margin by about RATE."""
    return 1 / math.sqrt(size)


@cache
def _loaded(path: str) -> QualityModel:
    return QualityModel.load(path)


@dataclass(frozen=True)
class Quality:
    """Documents are more like the good sample than like the bad one, by a model that `train` made."""

    name: ClassVar[str] = "quality"

    model: str = ""
    """The model's file; the score depends on it."""
    min_score: float | None = 0.5

    def files(self) -> list[str]:
        return [self.model] if self.model else []

    def load(self) -> None:
        if not self.model:
            raise UserError("quality.model: no file; train one with sparing.curate.quality.train, or leave the section out")
        _loaded(self.model)

    def scores(self, document: Document) -> Scores:
        return {"good": round(_loaded(self.model).score(document), 6)}

    def verdict(self, scores: Scores) -> str | None:
        return f"{self.name}: min_score" if self.min_score is not None and scores["good"] < self.min_score else None
