"""What is asked of the engine, and what comes back: `Sampling`, `Request`, `Piece`."""

from __future__ import annotations

import math
import os
import threading
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

from sparing.base.config import UserError

MAX_LOGPROBS = 20


class Busy(RuntimeError):
    """The engine's queue is full, or it is shutting down: try again later."""


class Grammar(Protocol):
    """What restricts the next token: llguidance's matcher behind two methods."""

    def mask(self):
        """(V,) booleans, tensor or array: which tokens may come next. None allowed: the text is complete."""

    def advance(self, token: int) -> None:
        """This token was chosen."""


@dataclass(frozen=True)
class Sampling:
    """How a continuation is drawn. Raises UserError for a value out of its range.

    `seed`: the same seed gives the same text, alone or among other requests, with or without speculation; None: a different one each time.
    `logprobs`: how many alternatives to report beside each chosen token (0: only the chosen one); they are the model's own, before
    temperature, penalties and masks. Presence and frequency penalties count what was generated (OpenAI's definition), the repetition
    penalty the prompt as well (CTRL, arXiv 1909.05858).
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
    """Score the prompt as well, as `logprobs` says: `Request.prompt_logprobs`. It is then read anew, whatever the cache holds."""
    approximate: bool = False
    """Fewer experts for easy tokens, where the engine's operator allows it (`Engine.approximate`)."""

    def __post_init__(self) -> None:
        for name, good, allowed in (
            ("max_tokens", self.max_tokens >= 1, "1 or more"),
            ("temperature", 0 <= self.temperature < math.inf, "0 or more"),
            ("top_p", 0 < self.top_p <= 1, "above 0, at most 1"),
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
        """Whether the choice depends on more than the logits: on what was written before, on a bias or a grammar."""
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
    """Text as it becomes final: whole characters, never part of a stop string; `tokens` are those whose text ends with it."""

    text: str
    tokens: list[int]
    logprobs: list[TokenLogprob] | None = None

    def extend(self, more: Piece) -> None:
        """Append what follows."""
        self.text += more.text
        self.tokens += more.tokens
        if self.logprobs is not None:
            self.logprobs += more.logprobs or []


class Request:
    """One continuation under way. Iterate it for its pieces (blocking), or give `Engine.submit` an `on_piece`.

    `on_piece(piece)` is called on the engine's thread and must return at once; `on_piece(None)` says that it is finished. `finish_reason`
    is None until then: "stop" (end of text, stop string, grammar complete), "length", "cancelled" or "error" (`error` says which).
    `usage` has prompt_tokens, cached_tokens, completion_tokens, drafted and accepted; of approximate answers the experts that were used and
    the mixture layers, summed over tokens, that used them.
    """

    def __init__(self, prompt: Sequence[int], sampling: Sampling, on_piece: Callable[[Piece | None], None] | None = None):
        self.prompt, self.sampling = list(prompt), sampling
        self.seed = int.from_bytes(os.urandom(8), "little") if sampling.seed is None else sampling.seed % 2**64
        self.finish_reason: str | None = None
        self.error: str | None = None
        self.usage = {"prompt_tokens": len(prompt), "cached_tokens": 0, "completion_tokens": 0, "drafted": 0, "accepted": 0}
        self.usage |= {"approximate_experts": 0, "approximate_layers": 0}
        self.approximate: dict[str, float] | None = None
        """Where it was asked for: how the tier was calibrated, and how often it has backed off since."""
        self.prompt_logprobs: list[TokenLogprob] = []
        """Of the prompt's tokens but the first, where they were asked for."""
        self.cancelled = False
        self._on_piece = on_piece
        self._pieces: deque[Piece] = deque()
        self._whole = False  # nobody is to be woken for a piece
        self._news = threading.Condition()
        self._wake: Callable[[], None] = lambda: None

    def cancel(self) -> None:
        """Stop generating; pieces that are already there can still be read."""
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
        """Everything, once it is finished."""
        with self._news:
            self._whole = True
            self._news.wait_for(lambda: self.finish_reason)
        return "".join(piece.text for piece in self)

    def give(self, piece: Piece) -> None:
        """For the engine."""
        if self._on_piece:
            self._on_piece(piece)
            return
        with self._news:
            self._pieces.append(piece)
            if not self._whole:
                self._news.notify_all()

    def finish(self, reason: str, error: str | None = None) -> None:
        """For the engine: no piece comes after this."""
        with self._news:
            self.error, self.finish_reason = error, reason
            self._news.notify_all()
        if self._on_piece:
            self._on_piece(None)
