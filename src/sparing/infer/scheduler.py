"""Plans each step of the engine: which sequences run, in which cache blocks, with how many threads and draft tokens.

Continuous batching with chunked prefill. A sequence is admitted once the cache has room for its prompt and its longest answer, so that no
running sequence is ever evicted. In a step every sequence past its prompt advances; prompts share the remaining rows, in order of arrival.
"""

from __future__ import annotations

import hashlib
from array import array
from collections import OrderedDict, deque
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np

from sparing.infer.network import Rows
from sparing.infer.request import Request, TextStream, TokenLogprob
from sparing.kernels.sizes import CACHE_BLOCK as BLOCK

BURST, ROUNDS = 8, 6
"""Steps of one trial of an option, and trials of each option: options take turns, because the machine's speed drifts."""
MIN_INTERVAL, MAX_INTERVAL = 1024, 16384
"""Steps between rounds of trials; the interval doubles while the best option stays the same."""
MIN_GAIN = 1.03
"""A new best option must be this much faster over all trials, and faster in all but one: trials are short and noisy."""
HOPELESS = 0.8
"""An option that is slower than this share of the best one's speed is not tried to the end."""


def block_key(key: bytes, tokens: Sequence[int]) -> bytes:
    """Hash of a block's tokens and of the previous block's key (b"" for the first block)."""
    return hashlib.blake2b(key + array("q", tokens).tobytes(), digest_size=16).digest()


class BlockManager:
    """Assigns the key-value cache's blocks: reference counts, reuse of equal prefixes, eviction of the least recently used.

    A block holds BLOCK positions of every layer. Full blocks are found by their key, which depends on all tokens from the sequence's start
    (as in vLLM's automatic prefix caching, docs.vllm.ai/en/latest/design/prefix_caching).

    A block takes memory from its first use on. So no more are used than sequences have held at once, until it shows that more would pay:
    each time that a block is asked for which was evicted to stay below that, twice as many may be used, up to `count`.
    """

    def __init__(self, count: int):
        self.count = count
        self._used = 0  # blocks that were ever taken: those with lower numbers
        self._limit = 0
        self._unused: list[int] = []  # of those, the last one that came back last
        self._users = [0] * count
        self._key: list[bytes | None] = [None] * count
        self._by_key: dict[bytes, int] = {}
        self._idle: OrderedDict[int, None] = OrderedDict()  # full blocks without users, the least recently used first
        self._missed: OrderedDict[bytes, None] = OrderedDict()  # keys of evicted blocks, at most `count`
        self.evicted = 0

    @property
    def free(self) -> int:
        """Blocks that `take` can give."""
        return self.count - self._held

    @property
    def cached(self) -> int:
        """Blocks without users that are kept for reuse."""
        return len(self._idle)

    @property
    def _held(self) -> int:
        return self._used - len(self._unused) - len(self._idle)

    def match(self, tokens: Sequence[int], key: bytes = b"") -> tuple[list[int], bytes]:
        """-> (cached blocks that hold the longest prefix of `tokens` without its last token, the last one's key). Adds a user to each.
        key: start of the chain; results computed in different ways must not share one."""
        blocks = []
        for start in range(0, (len(tokens) - 1) // BLOCK * BLOCK, BLOCK):
            following = block_key(key, tokens[start : start + BLOCK])
            block = self._by_key.get(following)
            if block is None:
                if following in self._missed:
                    del self._missed[following]
                    self._limit = min(2 * self._limit, self.count)
                break
            blocks.append(block)
            key = following
        for block in blocks:
            self._users[block] += 1
            self._idle.pop(block, None)
        return blocks, key

    def take(self, count: int) -> list[int] | None:
        """`count` blocks to write into; None, and none taken, if fewer are free."""
        if count > self.free:
            return None
        self._limit = max(self._limit, self._held + count)
        blocks = []
        for _ in range(count):
            if self._unused:
                block = self._unused.pop()
            elif self._used < self._limit:
                block = self._used
                self._used += 1
            else:
                block = self._evict()
            self._users[block] = 1
            blocks.append(block)
        return blocks

    def _evict(self) -> int:
        block, _ = self._idle.popitem(last=False)
        key, self._key[block] = self._key[block], None
        assert key is not None
        del self._by_key[key]
        self._missed[key] = None
        if len(self._missed) > self.count:
            self._missed.popitem(last=False)
        self.evicted += 1
        return block

    def seal(self, block: int, key: bytes) -> None:
        """Mark `block` as full, so that `match` finds it, unless another block has that key."""
        if key not in self._by_key and self._key[block] is None:
            self._by_key[key], self._key[block] = block, key
            self._missed.pop(key, None)

    def release(self, blocks: Sequence[int]) -> None:
        """Remove a user from each block. The last blocks of a sequence are evicted before its first."""
        for block in reversed(blocks):
            self._users[block] -= 1
            if self._users[block] == 0:
                if self._key[block] is None:
                    self._unused.append(block)
                else:
                    self._idle[block] = None


class TokenSequence:
    """The engine's state of one request: its tokens, how many of them are in the cache, and in which blocks."""

    def __init__(self, request: Request, stream: TextStream, max_tokens: int):
        self.request, self.stream, self.max_tokens = request, stream, max_tokens
        self.tokens = list(request.prompt)
        self.targets = self.tokens
        """Tokens whose log-probabilities `Sampling.prompt_logprobs` asks for."""
        self.computed = 0
        self.draft: list[int] = []
        """Guesses at the tokens after the last one."""
        self.mtp_start = self.mtp_end = -1
        """Positions for which the MTP module has run."""
        self.blocks: list[int] = []
        self._sealed, self._key = 0, b""
        self.adapter: int | None = None
        """Its number in `Rows.adapters`."""
        self.shares: np.ndarray | None = None
        """`Rows.shares` of an approximate request."""
        self.drawn: list[TokenLogprob] | None = None
        """One for every generated token, if the sequence will be checked (`approximate.draw_for_check`)."""

    @property
    def generated(self) -> list[int]:
        return self.tokens[len(self.request.prompt) :]

    @property
    def prefilling(self) -> bool:
        return self.computed < len(self.request.prompt)

    def reserve(self, manager: BlockManager) -> bool:
        """Take blocks for the prompt and the longest answer, reusing cached ones; False if there is no room yet."""
        # Approximate results are reused only under the same shares, an adapter's only by itself.
        first = b"" if self.shares is None else self.shares.tobytes()
        first = first if self.adapter is None else b"adapter %d" % self.adapter
        whole = self.request.sampling.prompt_logprobs or self.request.sampling.routes
        cached, key = ([], first) if whole else manager.match(self.tokens, first)
        needed = -(-(len(self.tokens) + self.max_tokens) // BLOCK)
        more = manager.take(needed - len(cached))
        if more is None:
            manager.release(cached)
            return False
        self.blocks = cached + more
        self._sealed, self._key = len(cached), key
        self.computed = self.request.usage["cached_tokens"] = len(cached) * BLOCK
        return True

    def seal(self, manager: BlockManager) -> None:
        """Let other sequences reuse the blocks that have become full."""
        while (self._sealed + 1) * BLOCK <= self.computed:
            start = self._sealed * BLOCK
            self._key = block_key(self._key, self.tokens[start : start + BLOCK])
            manager.seal(self.blocks[self._sealed], self._key)
            self._sealed += 1


class Span(NamedTuple):
    """A sequence's rows in a step, from `row` on: `count` of its tokens from position `start`, then its draft."""

    seq: TokenSequence
    row: int
    start: int
    count: int

    @property
    def scored(self) -> int:
        """Logits that score the prompt: those of every prompt token but the last, whose logits sample the first answer token."""
        if not self.seq.request.sampling.prompt_logprobs:
            return 0
        return max(0, min(self.start + self.count, len(self.seq.request.prompt) - 1) - self.start)


class Scheduler:
    """Waiting and running sequences that share one cache."""

    def __init__(self, manager: BlockManager, max_batch: int, max_rows: int):
        self.manager, self.max_batch, self.max_rows = manager, max_batch, max_rows
        self.waiting: deque[TokenSequence] = deque()
        self.running: list[TokenSequence] = []

    def admit(self) -> None:
        """Move sequences from waiting to running while there is room."""
        while self.waiting and len(self.running) < self.max_batch and self.waiting[0].reserve(self.manager):
            self.running.append(self.waiting.popleft())

    def drop(self, seq: TokenSequence) -> None:
        """Remove a finished or cancelled sequence."""
        if seq in self.running:
            self.running.remove(seq)
            seq.seal(self.manager)
            self.manager.release(seq.blocks)
            seq.blocks = []
        else:
            self.waiting.remove(seq)

    def step(self) -> tuple[Rows, list[Span]]:
        """-> (the next step's rows, whose they are). Each span asks for logits in this order: those that score its prompt; if all its
        tokens are computed, those of its last token and of its draft."""
        rows, spans = Rows(), []
        left = self.max_rows
        for seq in sorted(self.running, key=lambda seq: seq.prefilling):
            start, count = seq.computed, min(len(seq.tokens) - seq.computed, left if seq.prefilling else 1)
            if count <= 0:
                continue
            complete = start + count == len(seq.tokens)
            draft = seq.draft if complete else []
            spans.append(Span(seq, len(rows.tokens), start, count))
            wanted = complete * (1 + len(draft)) + spans[-1].scored
            rows.add(seq.blocks, seq.tokens[start : start + count] + draft, start, wanted, seq.shares, seq.adapter)
            rows.routes |= seq.request.sampling.routes
            left -= count + len(draft)
        return rows, spans


class SpeedTuner:
    """Keeps one of several options while the engine runs: the one with the highest measured speed. Every option gives the same text.

    options: in order; later trials compare the best one with a neighbour. At first all are tried. For draft lengths this is the
    test-and-set control of Cascade (arXiv 2506.20675) with tokens per second as the utility, which covers acceptance and verification.
    least: steps after which an option may be hopeless; few where the work of a step is known before.
    """

    def __init__(self, options: Iterable[int], least: int = BURST):
        self.options, self.least = list(options), least
        self.best = self.options[0]
        self._steps, self._interval, self._side = 0, MIN_INTERVAL, 1
        self._try(self.options)

    def _try(self, options: Sequence[int]) -> None:
        self._totals = {o: [(0.0, 0.0)] * ROUNDS for o in options}  # work and seconds of each round
        self._tried = dict.fromkeys(options, 0)  # steps
        self._trials = [(o, n) for n in range(ROUNDS) for o in options for _ in range(BURST)] if len(options) > 1 else []

    def pick(self) -> int:
        """The option for the next step."""
        return self._trials[0][0] if self._trials else self.best

    def report(self, option: int, work: float, seconds: float) -> None:
        """Record a step with `option`: what it achieved and how long it took."""
        self._steps += 1
        if self._trials:
            tried, n = self._trials[0]
            if tried != option:
                return
            self._trials.pop(0)
            before_work, before_seconds = self._totals[option][n]
            self._totals[option][n] = (before_work + work, before_seconds + seconds)
            self._tried[option] += 1
            if option != self.best and self._tried[option] >= self.least and self._mean(option) < HOPELESS * self._mean(self.best):
                self._trials = [trial for trial in self._trials if option != trial[0]]
                del self._totals[option]
                if len(self._totals) == 1:
                    self._trials = []
            if not self._trials:
                self._decide()
        elif self._steps >= self._interval and len(self.options) > 1:
            self._side = -self._side
            at = self.options.index(self.best)
            near = at + self._side if 0 <= at + self._side < len(self.options) else at - self._side
            self._try([self.best, self.options[near]])

    def _mean(self, option: int) -> float:
        """Its speed over all steps of these trials."""
        return sum(work for work, _ in self._totals[option]) / sum(seconds for _, seconds in self._totals[option])

    def _decide(self) -> None:
        fastest = max(self._totals, key=self._mean)
        pairs = zip(self._totals[fastest], self._totals[self.best], strict=True)
        # Where all others were hopeless, the best one is the fastest, and has rounds without a step.
        stays = fastest == self.best or self._mean(fastest) < MIN_GAIN * self._mean(self.best)
        stays = stays or sum(work / seconds > other / took for (work, seconds), (other, took) in pairs) < ROUNDS - 1
        self._interval = min(2 * self._interval, MAX_INTERVAL) if stays else MIN_INTERVAL
        self.best = self.best if stays else fastest
        self._steps = 0
