"""Requests to the engine: sampling settings, the handle on a running request, and its text as it becomes final."""

from __future__ import annotations

import math
import os
import threading
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

import numpy as np

from sparing.base.config import UserError
from sparing.data.tokenizer import Tokenizer

MAX_LOGPROBS = 20
BROKEN = "\ufffd"
MAX_PENDING = 8
"""An incomplete character is taken for broken bytes after so many tokens: a character has four bytes at most."""


class Busy(RuntimeError):
    """The engine's queue is full, or it is shutting down: try again later."""


class GrammarFailed(RuntimeError):
    """A grammar cannot say what comes next, although the text is incomplete: it is too complex, or the model lacks the tokens."""


class Grammar(Protocol):
    """Restricts the next token; the server's is `serve.grammar.Matcher`."""

    def mask(self):
        """(V,) booleans, tensor or array: which tokens may come next. If all are False, the text is complete. Raises GrammarFailed."""

    def advance(self, token: int) -> None:
        """Tell the grammar which token was chosen."""


@dataclass(frozen=True)
class Sampling:
    """How tokens are sampled. Raises UserError for a value out of its range.

    seed: the same seed gives the same text, whatever other requests run and whether or not tokens are drafted; None: a new seed each time.
    logprobs: how many alternatives to report for each token (0: only the chosen one), from the model's distribution before temperature,
    penalties and masks. Presence and frequency penalties count generated tokens (OpenAI's definition), the repetition penalty counts the
    prompt too (CTRL, arXiv 1909.05858).
    """

    max_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    stop: tuple[str, ...] = ()
    seed: int | None = None
    logprobs: int | None = None
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    grammar: Grammar | None = None
    ignore_eos: bool = False
    prompt_logprobs: bool = False
    """Fill `Request.prompt_logprobs`, with `logprobs` alternatives. The whole prompt is then computed, even where it is cached."""
    routes: bool = False
    """Fill `Request.routes`. The whole prompt is then computed, even where it is cached; nothing is drafted for this request."""
    approximate: bool = False
    """Use fewer experts for easy tokens. Needs an engine with `approximate`."""
    adapter: str | None = None
    """Which of the engine's adapters answers; None: the run itself."""

    def __post_init__(self) -> None:
        for name, good, allowed in (
            ("max_tokens", self.max_tokens >= 1, "1 or more"),
            ("temperature", 0 <= self.temperature < math.inf, "0 or more"),
            ("top_p", 0 <= self.top_p <= 1, "from 0 to 1"),
            ("top_k", self.top_k >= 0, "0 (off) or more"),
            ("min_p", 0 <= self.min_p <= 1, "from 0 to 1"),
            ("presence_penalty", -2 <= self.presence_penalty <= 2, "from -2 to 2"),
            ("frequency_penalty", -2 <= self.frequency_penalty <= 2, "from -2 to 2"),
            ("repetition_penalty", 0 < self.repetition_penalty < math.inf, "above 0"),
            ("stop", all(self.stop), "without empty strings"),
            ("logprobs", self.logprobs is None or 0 <= self.logprobs <= MAX_LOGPROBS, f"from 0 to {MAX_LOGPROBS}"),
            ("logit_bias", all(math.isfinite(v) for v in self.logit_bias.values()), "finite numbers"),
        ):
            if not good:
                raise UserError(f"{name} {getattr(self, name)}: must be {allowed}")

    @property
    def edits_logits(self) -> bool:
        """Whether logits are changed before sampling: by a penalty, a bias or a grammar."""
        penalties = self.presence_penalty or self.frequency_penalty or self.repetition_penalty != 1.0
        return bool(penalties or self.logit_bias or self.grammar is not None)


class TokenLogprob(NamedTuple):
    """Natural logarithms of probabilities."""

    token: int
    logprob: float
    top: tuple[tuple[int, float], ...]
    """(token, logprob) of the likeliest, best first."""


@dataclass
class Piece:
    """Text that is final: whole characters, no part of a stop string. `tokens` are those whose text ends in this piece."""

    text: str
    tokens: list[int]
    logprobs: list[TokenLogprob] | None = None

    def extend(self, more: Piece) -> None:
        """Append the piece that follows this one."""
        self.text += more.text
        self.tokens += more.tokens
        if self.logprobs is not None:
            self.logprobs += more.logprobs or []


class Request:
    """A running request. Iterate it for its pieces (blocking), or give `Engine.submit` an `on_piece`.

    `on_piece(piece)` is called on the engine's thread and must return at once; `on_piece(None)` ends the request. `finish_reason` is None
    until the end, then "stop" (end-of-text token, stop string or complete grammar), "length", "cancelled", or with the reason in `error`
    "grammar" (it failed, the text is incomplete) or "error".
    `usage` counts prompt_tokens, cached_tokens, completion_tokens, drafted and accepted tokens; for an approximate request also the
    experts that were computed and the (token, mixture layer) pairs that computed them.
    """

    def __init__(self, prompt: Sequence[int], sampling: Sampling, on_piece: Callable[[Piece | None], None] | None = None):
        self.prompt, self.sampling = list(prompt), sampling
        self.seed = int.from_bytes(os.urandom(8), "little") if sampling.seed is None else sampling.seed % 2**64
        self.finish_reason: str | None = None
        self.error: str | None = None
        self.usage = {"prompt_tokens": len(prompt), "cached_tokens": 0, "completion_tokens": 0, "drafted": 0, "accepted": 0}
        self.usage |= {"approximate_experts": 0, "approximate_layers": 0}
        self.approximate: dict[str, float] | None = None
        """For an approximate request: how the tier was calibrated, and how often it has backed off since."""
        self.prompt_logprobs: list[TokenLogprob] = []
        """With `Sampling.prompt_logprobs`: one for each prompt token but the first."""
        self.end: TokenLogprob | None = None
        """The end-of-text token that ended the answer, with `Sampling.logprobs`; it is in no piece."""
        self.routes: list[np.ndarray] = []
        """With `Sampling.routes`, for each token that was read, in order: (tokens, layers, experts a token) int32, the experts that each
        layer of the decoder chose. What ends an answer is not read."""
        self.cancelled = False
        self._on_piece = on_piece
        self._pieces: deque[Piece] = deque()
        self._whole = False  # `text` waits for the end: pieces need not wake it
        self._news = threading.Condition()
        self._wake: Callable[[], None] = lambda: None

    def cancel(self) -> None:
        """Stop generating. Pieces that have already arrived can still be read."""
        self.cancelled = True
        self._wake()

    def __iter__(self) -> Iterator[Piece]:
        while True:
            with self._news:
                self._news.wait_for(lambda: self._pieces or self.finish_reason)
                if not self._pieces:
                    return
                piece = self._pieces.popleft()
            yield piece

    def text(self) -> str:
        """Wait for the end; the text of all pieces."""
        with self._news:
            self._whole = True
            self._news.wait_for(lambda: self.finish_reason)
        return "".join(piece.text for piece in self)

    def give(self, piece: Piece) -> None:
        """Called by the engine with the next piece."""
        if self._on_piece:
            self._on_piece(piece)
            return
        with self._news:
            self._pieces.append(piece)
            if not self._whole:
                self._news.notify_all()

    def finish(self, reason: str, error: str | None = None) -> None:
        """Called by the engine after the last piece."""
        with self._news:
            self.error, self.finish_reason = error, reason
            self._news.notify_all()
        if self._on_piece:
            self._on_piece(None)


class TextStream:
    """Turns a request's tokens into pieces of final text: whole characters, and nothing that may still become a stop string."""

    def __init__(self, tokenizer: Tokenizer, stop: tuple[str, ...] = ()):
        self.tokenizer, self.stop = tokenizer, stop
        self._ids: list[int] = []
        self._context, self._decoded = 0, 0  # tokens before the decoding window, tokens whose text is in `_held`
        self._held = ""
        self._ends: deque[tuple[int, TokenLogprob | None, int]] = deque()  # token, its logprob, where its text ends (-1: unknown)
        self._delivered = 0  # characters

    def push(self, token: int, logprob: TokenLogprob | None = None) -> tuple[Piece | None, bool]:
        """-> (text that has become final, whether a stop string was completed)."""
        self._ids.append(token)
        self._ends.append((token, logprob, -1))
        self._decode(len(self._ids) - self._decoded >= MAX_PENDING)
        cut = min((at for at in (self._held.find(s) for s in self.stop) if at >= 0), default=-1)
        if cut >= 0:
            self._held = self._held[:cut]
            return self._piece(cut), True
        return self._piece(len(self._held) - self._stop_prefix()), False

    def finish(self) -> Piece | None:
        """The rest of the text, when no token follows."""
        self._decode(True)
        return self._piece(len(self._held))

    def _decode(self, broken: bool) -> None:
        """Append the new tokens' text to `_held`; with `broken`, even if its last character is incomplete.

        Tokens are decoded together with those before them, with which they may share a character."""
        context = self.tokenizer.decode(self._ids[self._context : self._decoded], skip_special_tokens=True, goes_on=True)
        text = self.tokenizer.decode(self._ids[self._context :], skip_special_tokens=True, goes_on=True)
        if text.endswith(BROKEN) and not broken:
            return
        self._held += text[len(context) :]
        self._context, self._decoded = self._decoded, len(self._ids)
        end = self._delivered + len(self._held)
        self._ends = deque((token, logprob, end if at < 0 else at) for token, logprob, at in self._ends)

    def _stop_prefix(self) -> int:
        """Characters at the end of `_held` that may begin a stop string."""
        if not self.stop:
            return 0
        held = self._held
        sizes = (size for stop in self.stop for size in range(1, min(len(stop), len(held) + 1)) if held.endswith(stop[:size]))
        return max(sizes, default=0)

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
