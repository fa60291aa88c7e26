"""Finds evaluation texts in training texts, by the word 13-grams that they share (Brown et al. 2020, arXiv 2005.14165, appendix C)."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cache
from itertools import chain
from typing import ClassVar

import numpy as np

from sparing.base.config import UserError
from sparing.base.messages import say
from sparing.curate.document import Document
from sparing.curate.filters import Scores
from sparing.curate.words import LONG_PIECE, MAX_PIECES, SYMBOLS, stable_hash
from sparing.data.files import find_files, kind_of
from sparing.data.sources import JSON, PARQUET, Reject, Tally, documents, rows

_NUMBER = re.compile(r"\d+(?:[.,،٫⎖⎗⎘]\d+)?")
_TO_SPACES = dict.fromkeys(map(ord, SYMBOLS), " ")
_MULTIPLIER = np.uint64(0x9E3779B97F4A7C15)


def normalise(piece: str, numbers: bool = False) -> list[str]:
    """The words of a piece of text in lower case, without punctuation and accents, and unless `numbers` are told apart each as 0 (as
    datatrove's simplify_text does)."""
    text = (piece.lower() if numbers else _NUMBER.sub("0", piece.lower())).translate(_TO_SPACES)
    if not text.isascii():
        text = "".join(char for char in unicodedata.normalize("NFD", text) if unicodedata.category(char) != "Mn")
    return text.split()


class _Hashes(dict):
    """Pieces of text between spaces → the hashes of their normalised words."""

    def __init__(self, numbers: bool):
        self.numbers = numbers

    def __missing__(self, piece: str) -> tuple[int, ...]:
        hashes = tuple(map(stable_hash, normalise(piece, self.numbers)))
        if len(piece) <= LONG_PIECE:
            self[piece] = hashes
        return hashes


_hashes = {numbers: _Hashes(numbers) for numbers in (False, True)}


def n_grams(pieces: Iterable[str], n: int, numbers: bool = False) -> np.ndarray:
    """uint64 [n-grams]: hashes of the n-grams of normalised words, the same in every process."""
    hashes = _hashes[numbers]
    if len(hashes) > MAX_PIECES:
        hashes.clear()
    words = np.fromiter(chain.from_iterable(map(hashes.__getitem__, pieces)), np.uint64)
    count = words.size - n + 1
    keys = np.zeros(max(0, count), np.uint64)
    for at in range(n if count > 0 else 0):
        keys = keys * _MULTIPLIER + words[at : at + count]
    return keys


def index(texts: Iterable[str], n: int, numbers: bool = False) -> np.ndarray:
    """uint64 [different n-grams], sorted: those of evaluation texts. A text of fewer than n words has none."""
    parts = [n_grams(text.split(), n, numbers) for text in texts]
    return np.unique(np.concatenate(parts)) if parts else np.zeros(0, np.uint64)


def evaluation_texts(paths: Iterable[str], reject: Reject | None = None) -> Iterator[str]:
    """The texts of evaluations: all text of a row of JSON or Parquet is one, in the order of its fields; any other file is one.

    Raises UserError for a path that names nothing.
    """
    for file in find_files(list(paths)):
        if kind_of(file.path) in (*JSON, *PARQUET):
            yield from (all_text(row.value) for row in rows([file], reject))
        else:
            yield from (document.text for document in documents([file], reject=reject))


def all_text(value: object) -> str:
    """Every string in a JSON value, a line each."""
    if isinstance(value, dict | list):
        return "\n".join(filter(None, map(all_text, value.values() if isinstance(value, dict) else value)))
    return value if isinstance(value, str) else ""


@cache
def _indexed(paths: tuple[str, ...], n: int, numbers: bool) -> tuple[np.ndarray, str]:
    """(`index` of the texts, what could not be used of them in words)."""
    tally = Tally()
    found = index(evaluation_texts(paths, tally), n, numbers)
    return found, f"{tally.total:,} evaluation texts cannot be used: {tally}" if tally.total else ""


@dataclass(frozen=True)
class Contamination:
    """Documents share no n-gram with evaluation texts."""

    name: ClassVar[str] = "contamination"

    evaluations: tuple[str, ...] = ()
    """Files and folders of evaluation texts: JSON lines, Parquet or plain text; the score depends on them."""
    n: int = 13
    """Words of an n-gram. Texts with fewer are not looked for. The score depends on it."""
    numbers: bool = False
    """Tell numbers apart; otherwise all of them are the same word. The score depends on it."""
    max_shared: int = 0
    """n-grams of a document that an evaluation has."""

    def files(self) -> list[str]:
        return [file.path for file in find_files(self.evaluations)] if self.evaluations else []

    def load(self) -> None:
        if not self.evaluations:
            raise UserError("contamination.evaluations: no files; name evaluation texts, or leave the section out")
        if self.n < 1:
            raise UserError(f"contamination.n must be at least 1, not {self.n}")
        found, lost = _indexed(self.evaluations, self.n, self.numbers)
        if lost:
            say(lost)
        if not found.size:
            raise UserError(f"contamination.evaluations: no text of {self.n} words in {', '.join(self.evaluations)}")

    def scores(self, document: Document) -> Scores:
        known, keys = _indexed(self.evaluations, self.n, self.numbers)[0], n_grams(document.pieces, self.n, self.numbers)
        if not known.size or not keys.size:
            return {"shared": 0}
        at = np.minimum(np.searchsorted(known, keys), known.size - 1)
        return {"shared": int(np.count_nonzero(known[at] == keys))}

    def verdict(self, scores: Scores) -> str | None:
        return f"{self.name}: max_shared" if scores["shared"] > self.max_shared else None
