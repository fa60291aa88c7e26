"""Repairs text that was decoded by the wrong table ("cafÃ©" for "café"), by ftfy, as FineWeb does before it is written."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import ClassVar

import numpy as np

from sparing.base.config import UserError
from sparing.curate.document import Document
from sparing.curate.filters import Scores

FIRST = ((0x80, 0x2FF), (0x2000, 0x2122))
"""What the first byte of a letter outside ASCII becomes where UTF-8 is read by a table of 256. What follows is not ASCII either."""


@cache
def _ftfy():
    """Raises UserError where the package is missing."""
    try:
        import ftfy
        import ftfy.badness
    except ImportError:
        raise UserError(
            "the rule encoding needs the ftfy package: pip install 'sparing[curate]'; or leave it out: encoding = \"none\""
        ) from None
    return ftfy


def suspect(text: str) -> bool:
    """Whether some character may have been decoded by the wrong table: two in a row that may be one, or a control character that no text
    has (U+0080 to U+009F). ftfy reads 6 MB of books a second, this 540 (LAB.md)."""
    if text.isascii():
        return False
    if "Ã " in text:  # what "à" becomes where its second byte was then taken for a space
        return True
    codes = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), np.uint32)
    before, after = codes[:-1], codes[1:]
    first = np.logical_or.reduce([(before >= low) & (before <= high) for low, high in FIRST])
    return bool((first & (after >= 0x80)).any() or ((codes >= 0x80) & (codes < 0xA0)).any())


@dataclass(frozen=True)
class Encoding:
    """Documents are decoded as they were written. What one wrong table has done is undone; what stays unreadable is rejected."""

    name: ClassVar[str] = "encoding"

    max_bad: float | None = 0.002
    """Sequences that no language has, per character of the repaired text (ftfy's badness). Books and encyclopedias have none."""

    def load(self) -> None:
        _ftfy()

    def scores(self, document: Document) -> Scores:
        """{"repaired": characters fewer than before, as a share; "bad": see `max_bad`}."""
        text = before = document.text
        bad = 0
        if suspect(text):
            text = _ftfy().fix_encoding(text)
            bad = _ftfy().badness.badness(text)
        document.memo[self] = text
        return {"repaired": round((len(before) - len(text)) / max(1, len(before)), 6), "bad": round(bad / max(1, len(text)), 6)}

    def verdict(self, scores: Scores) -> str | None:
        return f"{self.name}: max_bad" if self.max_bad is not None and scores["bad"] > self.max_bad else None

    def edit(self, document: Document) -> Document:
        """The document with its text repaired."""
        if self not in document.memo:
            self.scores(document)
        return document.edited(document.memo.pop(self))
