"""Which documents an evaluation reads when it may not read all of them."""

from __future__ import annotations

import heapq
from collections.abc import Iterable

from sparing.data.split import content_hash


def select(documents: Iterable[str], max_bytes: int) -> list[str]:
    """Whole documents in the order of their content hashes until `max_bytes` of UTF-8 are reached; the last is cut between characters.

    The same documents in another order give the same selection. Memory: `max_bytes` and one document.
    """
    heap: list[tuple[int, int, bytes]] = []  # largest hash on top
    held = 0
    for index, text in enumerate(documents):
        raw = text.encode()
        hash = content_hash(raw)
        if held >= max_bytes and heap and hash >= -heap[0][0]:
            continue
        heapq.heappush(heap, (-hash, index, raw))
        held += len(raw)
        while held - len(heap[0][2]) >= max_bytes:
            held -= len(heapq.heappop(heap)[2])
    chosen, left = [], max_bytes
    for _, _, raw in sorted(heap, key=lambda entry: -entry[0]):
        part = raw[:left].decode(errors="ignore")  # what is ignored is the beginning of a character at the cut
        left -= len(raw)
        if part:
            chosen.append(part)
        if left <= 0:
            break
    return chosen
