"""Decides which documents are held out and which are sampled, by a hash of their content, so that order and file names do not matter."""

from __future__ import annotations

import hashlib
from array import array
from dataclasses import dataclass, replace

import numpy as np

EXACT = 1 << 16
"""Up to this many entries thresholds are exact; beyond, they are multiples of 2**48."""
SPACE = 1 << 64
WHOLE_SHARE = 0.2
"""A document with a larger share of the corpus is not held out whole: too much would be lost for training."""
SECTION_BYTES = 64 << 10
_MASK = SPACE - 1


def content_hash(raw: bytes) -> int:
    """64 bits of BLAKE2b."""
    return int.from_bytes(hashlib.blake2b(raw, digest_size=8).digest(), "little")


def mix(x):
    """A fixed permutation of 64-bit integers (splitmix64, Steele et al. 2014), of an int or a uint64 array."""
    x = (x + 0x9E3779B97F4A7C15) & _MASK
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & _MASK
    return x ^ (x >> 31)


class HashHistogram:
    """How many bytes and documents lie below each hash, in bounded memory, whatever the order of arrival."""

    def __init__(self):
        self._hashes, self._sizes = array("Q"), array("Q")
        self._binned: tuple[np.ndarray, np.ndarray] | None = None  # bytes, documents per bin of 2**48 hashes

    def add(self, hash: int, size: int) -> None:
        self._hashes.append(hash)
        self._sizes.append(size)
        if len(self._hashes) > EXACT:
            if self._binned is None:
                self._binned = np.zeros(EXACT, np.int64), np.zeros(EXACT, np.int64)
            bins = (np.frombuffer(self._hashes, np.uint64) >> np.uint64(48)).astype(np.int64)
            np.add.at(self._binned[0], bins, np.frombuffer(self._sizes, np.uint64).astype(np.int64))
            np.add.at(self._binned[1], bins, 1)
            self._hashes, self._sizes = array("Q"), array("Q")

    def entries(self) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """(first hash, last hash, bytes, documents) per distinct content, or per bin; ascending. uint64, uint64, int64, int64."""
        hashes, sizes = np.array(self._hashes, np.uint64), np.array(self._sizes, np.int64)
        if self._binned is None:
            first, inverse = np.unique(hashes, return_inverse=True)
            size, count = np.zeros(len(first), np.int64), np.zeros(len(first), np.int64)
            np.add.at(size, inverse, sizes)
            np.add.at(count, inverse, 1)
            return first, first, size, count
        size, count = self._binned[0].copy(), self._binned[1].copy()
        bins = (hashes >> np.uint64(48)).astype(np.int64)
        np.add.at(size, bins, sizes)
        np.add.at(count, bins, 1)
        first = np.arange(EXACT, dtype=np.uint64) << np.uint64(48)
        return first, first | np.uint64((1 << 48) - 1), size, count


def threshold(entries: tuple[np.ndarray, ...], target: float) -> int:
    """The smallest bound such that the entries with hash < bound hold at least `target` bytes; 2**64 if all together do not."""
    _, last, size, _ = entries
    total = np.cumsum(size)
    index = int(np.searchsorted(total, target))
    return SPACE if index >= len(total) - 1 else int(last[index]) + 1


def held_out_bound(entries: tuple[np.ndarray, ...], split: Split, target: int) -> int:
    """A bound on the hash below which about `target` bytes are held out whole; `split.bound` when there are no more than that."""
    first, last, size, count = entries
    heavy = np.zeros(len(first), bool)
    for low, high in split.never:
        heavy |= (first >= np.uint64(low)) & (last <= np.uint64(high))
    return min(split.bound, threshold((first, last, np.where(heavy, 0, size), count), target))


@dataclass(frozen=True)
class Split:
    """The held-out side: documents with hash < bound, the ranges in `never` excepted, and the end of the document `tail_hash`."""

    bound: int = 0
    never: tuple[tuple[int, int], ...] = ()
    """Closed ranges of hashes: contents that make up too much of the corpus to be held out whole."""
    tail_hash: int | None = None
    tail_bytes: int = 0
    documents: int = 0
    bytes: int = 0
    reason: str = "nothing is held out"

    def holds_out(self, hash: int) -> bool:
        return hash < self.bound and not any(low <= hash <= high for low, high in self.never)

    def cut(self, raw: bytes) -> int:
        """Where the held-out end of the tail document begins: after a line, else a space, else between characters; 0 < cut < len."""
        target = max(1, len(raw) - self.tail_bytes)
        for mark in (b"\n", b" "):
            cut = raw.rfind(mark, max(1, target - min(4096, self.tail_bytes)), target) + 1
            if 0 < cut < len(raw):
                return cut
        while target > 1 and raw[target] & 0xC0 == 0x80:
            target -= 1
        while target < len(raw) - 1 and raw[target] & 0xC0 == 0x80:
            target += 1
        return target


def choose_split(entries: tuple[np.ndarray, ...], fraction: float, largest: bytes) -> Split:
    """Hold out about `fraction` of the bytes; `largest` is the largest document.

    Plainly hash < fraction where that comes within a factor of two. With few or very unequal documents: as many in hash order as come
    nearest, at least one, never one that is more than a fifth of the corpus; and where those give less than half of what was asked for,
    the end of the largest document too.
    """
    first, last, size, count = entries
    total = int(size.sum())
    if fraction <= 0 or total == 0:
        return Split()
    heavy = size > WHOLE_SHARE * total
    never = tuple((int(low), int(high)) for low, high in zip(first[heavy], last[heavy], strict=True))
    able, able_last = np.where(heavy, 0, size), last.astype(object)
    below = np.cumsum(able)
    bound = max(1, round(fraction * EXACT)) << 48
    reason = f"hash of the content < {fraction:g}"
    chosen = int(np.searchsorted(last, np.uint64(bound - 1), side="right"))  # entries wholly below the bound
    held_out = int(below[chosen - 1]) if chosen else 0
    if not fraction / 2 <= held_out / total <= min(2 * fraction, (1 + fraction) / 2):
        usable = np.flatnonzero(able)
        if len(usable):
            best = int(usable[np.argmin(np.abs(below[usable] - fraction * total))])
            bound, chosen, held_out = int(able_last[best]) + 1, best + 1, int(below[best])
            reason = "few documents: those with the smallest hashes of the content"
        else:
            bound = chosen = held_out = 0
    documents = int(count[:chosen][~heavy[:chosen]].sum()) if chosen else 0
    split = Split(bound, never, None, 0, documents, held_out, reason)
    hash = content_hash(largest)
    if held_out < fraction / 2 * total and len(largest.decode()) > 1 and not split.holds_out(hash):
        copies = int(count[(first <= np.uint64(hash)) & (np.uint64(hash) <= last)].sum()) if len(first) < EXACT else 1
        tail = min(len(largest) // 2, max(1, (round(fraction * total) - held_out) // copies))
        whole = f", and {documents} whole" if documents else ""
        reason = f"the end of the largest document{whole}: there are too few to hold out more"
        split = Split(bound, never, hash, tail, documents + copies, held_out, reason)
        return replace(split, bytes=held_out + copies * (len(largest) - split.cut(largest)))
    present = np.flatnonzero(size)
    if documents == 0 and len(present) > 1:  # a handful of single characters: one of them must do
        one = present[0]
        return Split(int(able_last[one]) + 1, (), None, 0, int(count[one]), int(size[one]), "few documents: the one with the smallest hash")
    return split
