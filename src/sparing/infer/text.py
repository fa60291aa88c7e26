"""Tokens to text as they come: whole characters only, and nothing that may yet turn out to be a stop string."""

from __future__ import annotations

from collections import deque

from sparing.data.tokenizer import Tokenizer
from sparing.infer.request import Piece, TokenLogprob

BROKEN = "\ufffd"
MAX_PENDING = 8
"""Tokens after which an unfinished character is taken for broken bytes: a character has at most four."""


class TextStream:
    """Feed it tokens with `push`; each answer is what may be shown."""

    def __init__(self, tokenizer: Tokenizer, stop: tuple[str, ...] = ()):
        self.tokenizer, self.stop = tokenizer, stop
        self._ids: list[int] = []
        self._shown, self._read = 0, 0  # tokens decoded as context, tokens whose text is in `_held`
        self._held = ""
        self._ends: deque[tuple[int, TokenLogprob | None, int]] = deque()  # where each undelivered token's text ends, from the start
        self._delivered = 0  # characters

    def push(self, token: int, logprob: TokenLogprob | None = None) -> tuple[Piece | None, bool]:
        """-> (what may be shown now, whether a stop string has been completed)."""
        self._ids.append(token)
        self._ends.append((token, logprob, -1))
        self._decode(len(self._ids) - self._read >= MAX_PENDING)
        cut = min((at for at in (self._held.find(s) for s in self.stop) if at >= 0), default=-1)
        if cut >= 0:
            self._held = self._held[:cut]
            return self._piece(cut), True
        return self._piece(len(self._held) - self._doubtful()), False

    def finish(self) -> Piece | None:
        """What is left when nothing follows."""
        self._decode(True)
        return self._piece(len(self._held))

    def _decode(self, whatever: bool) -> None:
        """Move the new tokens' text into `_held`. Decoded together with the tokens before: some tokenizers strip a leading blank."""
        context = self.tokenizer.decode(self._ids[self._shown : self._read], skip_special_tokens=True)
        text = self.tokenizer.decode(self._ids[self._shown :], skip_special_tokens=True)
        if text.endswith(BROKEN) and not whatever:
            return
        self._held += text[len(context) :]
        self._shown, self._read = self._read, len(self._ids)
        end = self._delivered + len(self._held)
        self._ends = deque((token, logprob, end if at < 0 else at) for token, logprob, at in self._ends)

    def _doubtful(self) -> int:
        """Characters at the end of `_held` that may begin a stop string."""
        longest = 0
        for stop in self.stop:
            for size in range(min(len(stop) - 1, len(self._held)), longest, -1):
                if self._held.endswith(stop[:size]):
                    longest = size
                    break
        return longest

    def _piece(self, size: int) -> Piece | None:
        text, self._held = self._held[:size], self._held[size:]
        self._delivered += size
        tokens, logprobs = [], []
        while self._ends and 0 <= self._ends[0][2] <= self._delivered:
            token, logprob, _ = self._ends.popleft()
            tokens.append(token)
            if logprob is not None:
                logprobs.append(logprob)
        return Piece(text, tokens, logprobs or None) if text or tokens else None
