"""Which blocks of the key-value cache belong to whom: reference counts, prefix reuse by a hash chain, least recently used first to go.

A block holds BLOCK positions of every layer. A full block's key is the hash of its tokens and of the key before it, so equal keys mean
equal text from the very start (as in vLLM's automatic prefix caching, docs.vllm.ai/en/latest/design/prefix_caching).
"""

from __future__ import annotations

import hashlib
from array import array
from collections import OrderedDict, deque
from collections.abc import Sequence

from sparing.kernels.sizes import CACHE_BLOCK as BLOCK


def chain(key: bytes, tokens: Sequence[int]) -> bytes:
    """The key of the block of `tokens` that follows the block with `key` (b"": the first)."""
    return hashlib.blake2b(key + array("q", tokens).tobytes(), digest_size=16).digest()


class BlockPool:
    """`blocks` blocks, numbered from 0."""

    def __init__(self, blocks: int):
        self.blocks = blocks
        self._unused = deque(range(blocks))
        self._users = [0] * blocks
        self._key: list[bytes | None] = [None] * blocks
        self._by_key: dict[bytes, int] = {}
        self._idle: OrderedDict[int, None] = OrderedDict()  # kept for their text, used by nobody, oldest first
        self.evicted = 0

    @property
    def free(self) -> int:
        """Blocks that `take` can give."""
        return len(self._unused) + len(self._idle)

    @property
    def cached(self) -> int:
        """Blocks kept for their text alone."""
        return len(self._idle)

    def match(self, tokens: Sequence[int], key: bytes = b"") -> tuple[list[int], bytes]:
        """The blocks that hold the beginning of `tokens`, all but the last token at most, now used once more; and the last one's key.
        key: what the chain begins with, another for every way of computing."""
        found = []
        for start in range(0, (len(tokens) - 1) // BLOCK * BLOCK, BLOCK):
            following = chain(key, tokens[start : start + BLOCK])
            block = self._by_key.get(following)
            if block is None:
                break
            found.append(block)
            key = following
        for block in found:
            self._users[block] += 1
            self._idle.pop(block, None)
        return found, key

    def take(self, count: int) -> list[int] | None:
        """`count` blocks to write into, the unused ones first; None (and nothing taken) where there are too few."""
        if count > self.free:
            return None
        taken = []
        for _ in range(count):
            if self._unused:
                block = self._unused.popleft()
            else:
                block, _ = self._idle.popitem(last=False)
                del self._by_key[self._key[block]]  # type: ignore[arg-type]
                self._key[block] = None
                self.evicted += 1
            self._users[block] = 1
            taken.append(block)
        return taken

    def seal(self, block: int, key: bytes) -> None:
        """`block` is full and may be found by its key from now on (unless another with the same text already is)."""
        if key not in self._by_key and self._key[block] is None:
            self._by_key[key], self._key[block] = block, key

    def release(self, blocks: Sequence[int]) -> None:
        """One user less for each. The end of a text is forgotten before its beginning."""
        for block in reversed(blocks):
            self._users[block] -= 1
            if self._users[block] == 0:
                if self._key[block] is None:
                    self._unused.append(block)
                else:
                    self._idle[block] = None
