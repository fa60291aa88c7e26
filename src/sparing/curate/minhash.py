"""MinHash signatures: documents in, band keys out (Broder 1997; the bands: Leskovec et al., Mining of Massive Datasets, section 3.4).

Text is compared by its words without case, punctuation, diacritics and, unless the settings say otherwise, the values of numbers, as
datatrove compares it (utils/text.py, `simplify_text`). What parts words is decided by Unicode categories, not by a list of characters.
All work is array operations on blocks of documents; a document's signature does not depend on its neighbours.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from sparing.base.config import UserError
from sparing.data.split import content_hash, mix

BLOCK = 1 << 17
"""Characters at a time: most arrays of a block fit a processor's second-level cache. A longer document is a block of its own."""
MINIMA_BLOCK = 1 << 15
"""N-grams at a time, likewise."""
LETTER, DIGIT, ALONE, MARK, SPACE, NOTHING = range(6)
"""What a character is: part of a word (the first three), a space if not within a number (MARK), a space, or not there at all. ALONE is a
word by itself: a letter of a script that puts no spaces between words."""
MARKS = ".,،٫⎖⎗⎘"
"""Decimal and thousands separators."""
UNSPACED = (
    (0x0E00, 0x0EFF),  # Thai, Lao
    (0x1000, 0x109F),  # Myanmar
    (0x1780, 0x17FF),  # Khmer
    (0x3040, 0x30FF),  # kana
    (0x31F0, 0x31FF),
    (0x3400, 0x9FFF),  # Han
    (0xF900, 0xFAFF),
    (0xFF66, 0xFF9D),
    (0x20000, 0x3FFFF),
)
UNIFORM = ((0x3400, 0x9FFF), (0xAC00, 0xD7A3), (0x20000, 0x2F7FF), (0x30000, 0x3FFFF))
"""Ranges of letters alone that have neither case nor diacritics: the tables need no look at each of them."""
PLACES = 256
"""Coefficients of characters by their place in a word. Longer words use them again."""


@dataclass(frozen=True)
class DuplicateSettings:
    """What counts as a duplicate. The bands are datatrove's and FineWeb's: documents of Jaccard similarity 0.8 meet with probability
    1 - (1 - 0.8^8)^14 = 0.924, those of 0.5 with 0.053, and the threshold below decides about those that met."""

    bands: int = 14
    """Two documents are compared if they agree in all rows of one band."""
    rows: int = 8
    """Minima a band."""
    ngram: int = 5
    """Words. A document of fewer has no n-grams: only an exact copy of it is a duplicate."""
    jaccard: float = 0.7
    """A document is removed if its set of n-grams has at least this Jaccard similarity with that of a document which stays."""
    seed: int = 1
    """Of the hash functions."""
    numbers: bool = False
    """Tell numbers apart. Otherwise 3 and 4,000.5 are the same word, as in datatrove: pages that differ in dates and counters only are
    duplicates, and so are exercises that differ in their numbers only."""
    memory_mb: int = 256
    """Megabytes of records that are sorted at a time."""
    lines: int = 0
    """A line that this many documents have is boilerplate (`lines.repeated_lines`); 0: lines are left alone."""
    line_chars: int = 40
    """A shorter line is never boilerplate: headings, dialogue and code repeat for good reasons."""

    def __post_init__(self):
        for name, low, high in (
            ("bands", 1, 256),
            ("rows", 1, 64),
            ("ngram", 1, 64),
            ("jaccard", 0.0, 1.0),
            ("seed", 0, 2**63 - 1),
            ("memory_mb", 1, 1 << 20),
            ("lines", 0, 2**31 - 1),
            ("line_chars", 1, 1 << 20),
        ):
            if not low <= getattr(self, name) <= high:
                raise UserError(f"duplicates: {name} {getattr(self, name)} is not between {low} and {high}")
        if self.jaccard == 0 or self.lines == 1:
            raise UserError("duplicates: jaccard 0 or lines 1 would make everything a duplicate")


def signatures(batch: pa.RecordBatch, settings: DuplicateSettings) -> pa.RecordBatch:
    """One row a document of `batch` (columns `text`, `source`, `line`): where it was found, `bytes` of its text, `exact` (64 bits of
    BLAKE2b of the text without white space around it), `ngrams` (how many) and `band_0` ... (uint64; null without n-grams).

    Equal band keys mean that all minima of that band are equal. A pure function, so any engine may map it over its batches.
    """
    texts = texts_of(batch)
    keys = np.zeros((settings.bands, len(texts)), np.uint64)
    least, counts = minima_of(texts, settings)
    keys[:, counts > 0] = band_keys(least, settings)
    exact = np.array([content_hash(text.strip().encode()) for text in texts], np.uint64)
    arrays = {
        "source": batch.column("source"),
        "line": batch.column("line"),
        "bytes": pc.cast(pc.fill_null(pc.binary_length(batch.column("text")), 0), pa.int64()),
        "exact": pa.array(exact),
        "ngrams": pa.array(counts),
    }
    arrays |= {f"band_{band}": pa.array(keys[band], mask=counts == 0) for band in range(settings.bands)}
    return pa.RecordBatch.from_arrays(list(arrays.values()), list(arrays))


def minima_of(texts: Sequence[str], settings: DuplicateSettings) -> tuple[np.ndarray, np.ndarray]:
    """(the minima of each text that has n-grams, uint32, (bands * rows, such texts); how many n-grams each text has, int64, (texts,))."""
    least, counts = [np.empty((settings.bands * settings.rows, 0), np.uint32)], np.zeros(len(texts), np.int64)
    for low, high in _blocks(texts):
        grams, offsets = ngrams(texts[low:high], settings)
        counts[low:high] = np.diff(offsets)
        least.append(minima(grams, offsets, settings))
    return np.concatenate(least, axis=1), counts


def texts_of(batch: pa.RecordBatch) -> list[str]:
    return [text or "" for text in batch.column("text").to_pylist()]


def ngram_sets(texts: Sequence[str], settings: DuplicateSettings) -> Iterator[np.ndarray]:
    """Of each text its distinct n-grams, as ascending hashes, uint64."""
    for low, high in _blocks(texts):
        grams, offsets = ngrams(texts[low:high], settings)
        for index in range(high - low):
            yield np.unique(grams[offsets[index] : offsets[index + 1]])


def jaccard(a: np.ndarray, b: np.ndarray) -> float:
    """Of two sets as `ngram_sets` gives them. 0 for empty ones."""
    common = len(np.intersect1d(a, b, assume_unique=True))
    return common / max(1, len(a) + len(b) - common)


def _blocks(texts: Sequence[str]) -> Iterator[tuple[int, int]]:
    """Ranges of texts that come to about BLOCK characters."""
    low, size = 0, 0
    for high, text in enumerate(texts, 1):
        size += len(text)
        if size >= BLOCK or high == len(texts):
            yield low, high
            low, size = high, 0


# words


@lru_cache(1)
def _tables() -> tuple[np.ndarray, np.ndarray]:
    """Of every code point what it is (uint8) and the letter that stands for it (uint32; 0 for what is no part of a word)."""
    kinds = np.full(0x110000, LETTER, np.uint8)
    folds = np.arange(0x110000, dtype=np.uint32)
    skipped = np.zeros(0x110000, bool)
    for low, high in UNIFORM:
        skipped[low : high + 1] = True
    for low, high in UNSPACED:
        kinds[low : high + 1] = ALONE
    for low, high in ((0, 0x30000), (0xE0000, 0xE1000)):  # beyond, up to private use, nothing is assigned
        for code in (np.flatnonzero(~skipped[low:high]) + low).tolist():
            char = chr(code)
            category = unicodedata.category(char)
            if char in MARKS:
                kinds[code] = MARK
            elif category in ("Mn", "Me", "Cf"):  # diacritics; soft hyphens and joiners
                kinds[code] = NOTHING
            elif category == "Nd":
                kinds[code], folds[code] = DIGIT, ord("0") + unicodedata.digit(char)
            elif category[0] in "ZPS" or category == "Cc":
                kinds[code] = SPACE
            elif code > 127 or char.isupper():
                folded = char.casefold()
                parts = [part for part in unicodedata.normalize("NFD", folded) if unicodedata.category(part) != "Mn"]
                folds[code] = ord(parts[0] if len(parts) == 1 else folded if len(folded) == 1 else char)
    folds[(kinds == MARK) | (kinds == SPACE)] = 0
    return kinds, folds


@lru_cache(1)
def _coefficients() -> np.ndarray:
    return mix(np.arange(1, PLACES + 1, dtype=np.uint64)) | np.uint64(1)


def words(texts: Sequence[str], settings: DuplicateSettings) -> tuple[np.ndarray, np.ndarray]:
    """-> (the hashes of all words, uint64, (words,); where each text's begin, and the end, int64, (texts + 1,))."""
    kinds, folds = _tables()
    texts = [text if text.isascii() else unicodedata.normalize("NFC", text) for text in texts]
    ends = np.cumsum([len(text) + 1 for text in texts], dtype=np.int64)
    codes = np.frombuffer("\n".join([*texts, ""]).encode("utf-32-le"), np.uint32)
    kind = kinds[codes]
    number = kind == DIGIT
    if not settings.numbers and number.any():
        number[1:-1] |= (kind[1:-1] == MARK) & number[:-2] & number[2:]
        kind[1:][number[1:] & number[:-1]] = NOTHING  # the first digit stands for the number
    at = np.flatnonzero(kind != NOTHING)
    kind, letters = kind[at], folds[codes[at]]
    if not settings.numbers:
        letters[kind == DIGIT] = ord("0")
    begins, alone = kind <= ALONE, kind == ALONE
    begins[1:] &= (kind[:-1] > ALONE) | alone[:-1] | alone[1:]
    starts = np.flatnonzero(begins)
    if not len(starts):
        return np.empty(0, np.uint64), np.zeros(len(texts) + 1, np.int64)
    offsets = np.concatenate([[0], np.searchsorted(at[starts], ends)])
    letters = letters[starts[0] :]
    starts -= starts[0]
    places = np.arange(len(letters)) - np.repeat(starts, np.diff(starts, append=len(letters)))
    # Multilinear hashing (Lemire and Kaser 2014): what lies between words is 0 and adds nothing.
    return mix(np.add.reduceat(letters * _coefficients()[places % PLACES], starts)), offsets


def ngrams(texts: Sequence[str], settings: DuplicateSettings) -> tuple[np.ndarray, np.ndarray]:
    """-> (the hashes of all word n-grams in their order, uint64; where each text's begin, and the end, int64, (texts + 1,))."""
    hashes, offsets = words(texts, settings)
    n = settings.ngram
    counts = np.maximum(np.diff(offsets) - (n - 1), 0)
    whole = max(0, len(hashes) - n + 1)
    grams = hashes[:whole].copy()
    for index in range(1, n):
        grams *= np.uint64(0x9E3779B97F4A7C15)
        grams += hashes[index : whole + index]
    inside = np.ones(whole, bool)
    across = (offsets[1:-1, None] - np.arange(1, n)).ravel()  # those that reach into the next text
    inside[across[(across >= 0) & (across < whole)]] = False
    return mix(grams[inside]), np.concatenate([[0], np.cumsum(counts)])


# minima


@lru_cache(4)
def _functions(count: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """a (odd), b of x -> a x + b mod 2^32, which permutes 32-bit integers; uint32, (count,) each."""
    bits = mix(np.arange(2 * count, dtype=np.uint64) + mix(seed)) >> np.uint64(32)
    a, b = bits.astype(np.uint32).reshape(2, count)
    return a | np.uint32(1), b


def minima(grams: np.ndarray, offsets: np.ndarray, settings: DuplicateSettings) -> np.ndarray:
    """Of each document that has n-grams the least value of each hash function: uint32, (bands * rows, documents)."""
    # numpy, not a library: rensa 0.5 is faster (1 against 5 ms a megabyte of text), but its minima depend on each other in short documents
    # (0.94 of pairs of 90 n-grams with J = 0.8 met, by the formula it is 0.924) and change from version to version; datasketch takes 48 ms.
    a, b = _functions(settings.bands * settings.rows, settings.seed)
    starts = offsets[:-1][np.diff(offsets) > 0]
    bits = (grams >> np.uint64(32)).astype(np.uint32)
    least = np.empty((len(a), len(starts)), np.uint32)
    low = 0
    while low < len(starts):
        high = max(low + 1, int(np.searchsorted(starts, starts[low] + MINIMA_BLOCK)))
        some = bits[starts[low] : starts[high] if high < len(starts) else len(bits)]
        values, begins = np.empty_like(some), starts[low:high] - starts[low]
        for index in range(len(a)):
            np.multiply(some, a[index], out=values)
            np.add(values, b[index], out=values)
            np.minimum.reduceat(values, begins, out=least[index, low:high])
        low = high
    return least


def band_keys(least: np.ndarray, settings: DuplicateSettings) -> np.ndarray:
    """A hash of the minima of each band: uint64, (bands, documents), never 2^64 - 1."""
    parts = least.reshape(settings.bands, settings.rows, -1)
    keys = np.zeros((settings.bands, parts.shape[2]), np.uint64)
    for row in range(settings.rows):
        keys = mix(keys + parts[:, row])
    return np.minimum(keys, np.uint64(2**64 - 2))
