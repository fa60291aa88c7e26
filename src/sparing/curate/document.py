"""A document as rules see it: its text, and what is computed of it once for all of them."""

from __future__ import annotations

import json
from functools import cached_property

import numpy as np

from sparing.curate.words import Vocabulary, vocabulary


class Document:
    """A text and what is known of it. Everything else is computed when a rule first asks for it."""

    def __init__(self, text: str, meta: str | None = None):
        """meta: a JSON object, with keys such as `url`, `id`, `language`."""
        self.text = text
        self._meta = meta
        self.memo: dict = {}
        """What two methods of one rule share."""

    @cached_property
    def meta(self) -> dict:
        """The metadata; {} where there is none, or no JSON object."""
        try:
            value = json.loads(self._meta or "{}")
        except ValueError:
            return {}
        return value if isinstance(value, dict) else {}

    @cached_property
    def lower(self) -> str:
        return self.text.lower()

    @cached_property
    def pieces(self) -> list[str]:
        """What stands between spaces."""
        return self.text.split()

    @cached_property
    def vocabulary(self) -> Vocabulary:
        """The vocabulary that `words` counts in."""
        return vocabulary()

    @cached_property
    def words(self) -> np.ndarray:
        """int64 [words]: the vocabulary's numbers of the words and punctuation marks."""
        return self.vocabulary.of(self.pieces)

    @cached_property
    def hashes(self) -> np.ndarray:
        """uint64 [words]: hashes of the words, the same in every process."""
        words = self.words  # first: new words make the table larger
        return self.vocabulary.hashes[words]

    def edited(self, text: str, pieces: list[str] | None = None) -> Document:
        """This document with another text. pieces: what stands between spaces in it, where that is known.

        Where only spaces have changed, the words are still known.
        """
        if text == self.text:
            return self
        other = Document(text, self._meta)
        if pieces is not None:
            other.pieces = pieces
            if "words" in self.__dict__ and pieces == self.pieces:
                other.vocabulary, other.words = self.vocabulary, self.words
                if "hashes" in self.__dict__:
                    other.hashes = self.hashes
        return other
