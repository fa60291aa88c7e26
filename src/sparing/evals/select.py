"""Selects the text that an evaluation reads when it may not read all of it."""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Sequence

from sparing.data.split import content_hash

SHARES = 32
"""Up to this many documents are read, in equal shares: one long book says little about a library."""


def select(documents: Iterable[str], max_bytes: int) -> list[str]:
    """The beginnings of documents, equally long where they are long enough, that come to `max_bytes` of UTF-8; cut between characters.

    Documents are taken in the order of their content hashes, so that another order gives the same selection. Memory: `SHARES` times
    `max_bytes`, and one document.
    """
    share = max(1, max_bytes // SHARES)
    heap: list[tuple[int, int, bytes]] = []  # largest hash on top
    size = 0
    for index, text in enumerate(documents):
        raw = text.encode()
        hash = content_hash(raw)
        if size >= max_bytes and hash >= -heap[0][0]:
            continue
        heapq.heappush(heap, (-hash, index, raw[:max_bytes]))
        size += min(len(raw), share)
        while size - (top := min(len(heap[0][2]), share)) >= max_bytes:
            size -= top
            heapq.heappop(heap)
    chosen = [raw for _, _, raw in sorted(heap, key=lambda entry: -entry[0])]
    level = _level([len(raw) for raw in chosen], max_bytes)
    parts = (raw[:level].decode(errors="ignore") for raw in chosen)  # what is ignored is the beginning of a character at the cut
    return [part for part in parts if part]


def _level(lengths: Sequence[int], total: int) -> int:
    """The largest n for which the lengths, cut to n, come to no more than `total`."""
    for done, length in enumerate(sorted(lengths)):
        if length * (len(lengths) - done) > total:
            return total // (len(lengths) - done)
        total -= length
    return max(lengths, default=0)
