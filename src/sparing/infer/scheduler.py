"""Who computes what in the next step: continuous batching with chunked prefill, admission by bytes.

A text is admitted when the cache has room for all that it may become, so nothing that has begun is ever thrown out. In a step every
running text advances; what is left of the step's rows goes to prompts, first come, first served.
"""

from __future__ import annotations

from collections import deque
from typing import NamedTuple

import numpy as np

from sparing.infer.cache import BLOCK, BlockPool, chain
from sparing.infer.network import Rows
from sparing.infer.request import Request, TokenLogprob
from sparing.infer.text import TextStream


class Text:
    """One request under way: its tokens, how many of them the cache holds, and where."""

    def __init__(self, request: Request, stream: TextStream, max_tokens: int):
        self.request, self.stream, self.max_tokens = request, stream, max_tokens
        self.tokens = self.targets = list(request.prompt)  # targets: what `prompt_logprobs` are of
        self.computed = 0
        self.draft: list[int] = []
        """Guesses at the tokens after the last one."""
        self.module_first = self.module_end = -1  # positions for which the MTP module has run
        self.blocks: list[int] = []
        self._sealed, self._key = 0, b""
        self.shares: np.ndarray | None = None
        """How few experts compute it (`Rows.shares`)."""
        self.noted: list[TokenLogprob] | None = None
        """Where they will be compared (`approximate.note`): one for every token made."""

    @property
    def made(self) -> list[int]:
        return self.tokens[len(self.request.prompt) :]

    @property
    def prefilling(self) -> bool:
        return self.computed < len(self.request.prompt)

    def reserve(self, pool: BlockPool) -> bool:
        """Take the blocks for prompt and continuation, reusing those whose text is cached; False where there is no room yet."""
        first = b"" if self.shares is None else self.shares.tobytes()  # what was computed with fewer experts is found by the like only
        found, key = ([], first) if self.request.sampling.prompt_logprobs else pool.match(self.tokens, first)
        needed = -(-(len(self.tokens) + self.max_tokens) // BLOCK)
        more = pool.take(needed - len(found))
        if more is None:
            pool.release(found)
            return False
        self.blocks = found + more
        self._sealed, self._key = len(found), key
        self.computed = self.request.usage["cached_tokens"] = len(found) * BLOCK
        return True

    def seal(self, pool: BlockPool) -> None:
        """Let others find the blocks that have become full."""
        while (self._sealed + 1) * BLOCK <= self.computed:
            start = self._sealed * BLOCK
            self._key = chain(self._key, self.tokens[start : start + BLOCK])
            pool.seal(self.blocks[self._sealed], self._key)
            self._sealed += 1


class Share(NamedTuple):
    """A text's part of a step: `count` of its tokens from position `start`, and its draft, in rows from `row` on."""

    text: Text
    row: int
    start: int
    count: int

    @property
    def scored(self) -> int:
        """Logits that it has for scoring the prompt: of every token but the prompt's last, whose logits are for drawing."""
        if not self.text.request.sampling.prompt_logprobs:
            return 0
        return max(0, min(self.start + self.count, len(self.text.request.prompt) - 1) - self.start)


class Scheduler:
    """Waiting and running texts over one block pool."""

    def __init__(self, pool: BlockPool, max_batch: int, max_rows: int):
        self.pool, self.max_batch, self.max_rows = pool, max_batch, max_rows
        self.waiting: deque[Text] = deque()
        self.running: list[Text] = []

    def admit(self) -> None:
        """Move texts from waiting to running while there is room."""
        while self.waiting and len(self.running) < self.max_batch and self.waiting[0].reserve(self.pool):
            self.running.append(self.waiting.popleft())

    def drop(self, text: Text) -> None:
        """The text is finished or cancelled."""
        if text in self.running:
            self.running.remove(text)
            text.seal(self.pool)
            self.pool.release(text.blocks)
            text.blocks = []
        else:
            self.waiting.remove(text)

    def step(self) -> tuple[Rows, list[Share]]:
        """-> (rows, whose they are); a text that is computed to its end has logits, in this order: of its last token and of its draft.
        Before them come those that score a prompt."""
        rows, shares = Rows(), []
        left = self.max_rows
        for text in sorted(self.running, key=lambda text: text.prefilling):
            start, count = text.computed, min(len(text.tokens) - text.computed, left if text.prefilling else 1)
            if count <= 0:
                continue
            complete = start + count == len(text.tokens)
            draft = text.draft if complete else []
            shares.append(Share(text, len(rows.tokens), start, count))
            wanted = complete * (1 + len(draft)) + shares[-1].scored
            rows.add(text.blocks, text.tokens[start : start + count] + draft, start, wanted, text.shares)
            left -= count + len(draft)
        return rows, shares
