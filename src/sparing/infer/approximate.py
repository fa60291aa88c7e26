"""The approximate tier: requests that ask for it use fewer experts, and a guard measures what that costs.

When such a request ends, 1 % of the time the engine computes its tokens again with all experts. At every position the approximate model
also samples a token at temperature 1, besides the one it writes; the guard averages that token's log-probability, approximate minus exact.
The mean is the divergence of the two models; on trained models it is as large as the rise of the loss on real text. The tokens written
would underestimate it: likely tokens differ less, and in repetitive text the sign turns (LAB.md).
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from sparing.base.config import UserError
from sparing.base.run import RunFolder
from sparing.data.tokenizer import Tokenizer
from sparing.infer.calibration import calibrate, decoder_mixtures, digest, max_tokens, save, saved, windows
from sparing.infer.network import CompiledNetwork, TorchNetwork
from sparing.infer.request import Piece, Request, Sampling, TextStream, TokenLogprob
from sparing.infer.sample import draw, logprob, noise_key
from sparing.infer.scheduler import Span, TokenSequence

DECAY = 1 - 1e-4
"""Weight of earlier comparisons, per token."""
MIN_CHECKED, MANY_CHECKED = 200, 5000
"""Compared tokens after which the tier backs off if the mean exceeds the limit: by three standard errors, or at all."""


@dataclass(frozen=True)
class Approximate:
    """Settings of the tier. texts: text to calibrate on; none: use the saved calibration. limit: relative rise of the loss that is allowed.
    floor: experts that every token uses in each layer. checked: share of requests that are computed again."""

    texts: Sequence[str] = ()
    limit: float = 0.001
    floor: int = 1
    checked: float = 0.01


class ApproximateTier:
    """An engine's approximate tier. All methods but `begin` and `metrics` run on the engine's thread."""

    def __init__(self, allowed: Approximate, run: RunFolder, network: CompiledNetwork | TorchNetwork, tokenizer: Tokenizer):
        """Calibrates on the given texts unless a saved calibration used them. Raises UserError."""
        if isinstance(network, TorchNetwork):
            raise UserError(f"{run} runs in plain PyTorch here, where approximate answers would save nothing")
        c, format = network.c, network.format
        if not decoder_mixtures(c):
            raise UserError(f"{run} has no experts to leave out: it answers exactly only")
        if not 1 <= allowed.floor <= c.num_experts_per_tok:
            raise UserError(f"approximate floor {allowed.floor}: must be from 1 to {c.num_experts_per_tok}, the model's experts a token")
        if not 0 < allowed.limit < 1:
            raise UserError(f"approximate limit {100 * allowed.limit:g} %: must be above 0 and below 100")
        calibration = saved(run, network.packed_weights.source, format)
        if allowed.texts:
            wanted = (digest(windows(network, tokenizer, allowed.texts)), allowed.limit, allowed.floor)
            if calibration is None or (calibration.text, calibration.limit, calibration.floor) != wanted:
                calibration = calibrate(network, tokenizer, allowed.texts, allowed.limit, allowed.floor)
                save(run, format, calibration)
        if calibration is None:
            raise UserError(f"{run} was not calibrated for approximate answers in {format}: give some of your text")
        self.calibration, self.checked = calibration, allowed.checked
        self._max_tokens, self._tokenizer = max_tokens(network), tokenizer
        network.min_experts = calibration.floor
        self._save = lambda calibration: save(run, format, calibration)
        self.shares = calibration.current_shares
        """`Rows.shares` of new requests; None: they use all experts."""
        self._layers, self._counts = len(decoder_mixtures(c)), Counter()
        self._reset()

    @property
    def back_offs(self) -> int:
        """How often the tier has moved halfway back to all experts; kept with the calibration."""
        return self.calibration.back_offs

    def _reset(self) -> None:
        self._weight = self._sum = self._squares = 0.0

    @property
    def rise(self) -> tuple[float, float]:
        """(mean, standard error) of the guard's comparisons, nats per token."""
        if not self._weight:
            return 0.0, 0.0
        mean = self._sum / self._weight
        return mean, (max(0.0, self._squares / self._weight - mean**2) / self._weight) ** 0.5

    def begin(self, seq: TokenSequence) -> None:
        """Prepare an approximate request before it is queued."""
        rise = self.calibration.increase / self.calibration.loss
        seq.request.approximate = {"loss_increase": rise, "limit": self.calibration.limit, "back_offs": self.back_offs}
        seq.shares = self.shares
        if self.shares is not None and noise_key(seq.request.seed, len(seq.tokens))[0] < self.checked * 2**32:
            seq.drawn = []

    def count(self, spans: Sequence[Span], used: np.ndarray) -> None:
        """Add a step's experts to the counters. used: (rows,) experts of each row, summed over layers."""
        rows = [span.row for span in spans]
        for span, end, experts in zip(spans, [*rows[1:], len(used)], np.add.reduceat(used, rows).tolist(), strict=True):
            if span.seq.shares is not None:
                for counts, suffix in ((span.seq.request.usage, ""), (self._counts, "_total")):
                    counts["approximate_experts" + suffix] += experts
                    counts["approximate_layers" + suffix] += (end - span.row) * self._layers

    def exact_check(self, seq: TokenSequence, reason: str) -> list[TokenSequence]:
        """After the end of `seq`: the sequence that computes it again with all experts, if it was chosen for a check."""
        if not seq.drawn or reason not in ("stop", "length"):
            return []
        request: Request

        def finished(piece: Piece | None) -> None:
            if piece is None and request.finish_reason in ("stop", "length"):
                self._compare(seq, request.prompt_logprobs[len(seq.request.prompt) - 1 :])

        request = Request(seq.tokens[: self._max_tokens - 1], Sampling(max_tokens=1, temperature=0, prompt_logprobs=True), finished)
        check = TokenSequence(request, TextStream(self._tokenizer), 1)
        check.targets = [*seq.request.prompt, *(row.token for row in seq.drawn)]
        return [check]

    def _compare(self, seq: TokenSequence, exact: list[TokenLogprob]) -> None:
        """Add a checked sequence to the guard's mean, and back off if that exceeds the limit."""
        if seq.shares is not self.shares:
            return  # computed before the last back-off
        for drawn, row in zip(seq.drawn or (), exact, strict=False):
            difference = drawn.logprob - row.logprob
            self._weight = DECAY * self._weight + 1
            self._sum = DECAY * self._sum + difference
            self._squares = DECAY * self._squares + difference**2
        self._counts["approximate_checked_total"] += len(exact)
        limit, (mean, error) = self.calibration.limit * self.calibration.loss, self.rise
        if (self._weight >= MIN_CHECKED and mean - 3 * error > limit) or (self._weight >= MANY_CHECKED and mean > limit):
            self.calibration = replace(self.calibration, back_offs=self.back_offs + 1)
            self.shares = self.calibration.current_shares
            self._save(self.calibration)
            self._reset()
            what = "halfway back to all experts" if self.shares is not None else "all experts again"
            print(f"approximate answers lose {mean:.4f} nats a token, more than {limit:.4f}: {what}", file=sys.stderr, flush=True)

    def metrics(self) -> dict[str, float]:
        mean, error = self.rise
        experts, layers = self._counts["approximate_experts_total"], self._counts["approximate_layers_total"]
        return {
            **self._counts, "approximate_experts_per_token": experts / layers if layers else 0.0, "approximate_rise": mean,
            "approximate_rise_error": error, "approximate_back_offs_total": self.back_offs,
            "approximate_rise_limit": self.calibration.limit * self.calibration.loss,
        }  # fmt: skip


def draw_for_check(seq: TokenSequence, logits_V: np.ndarray) -> None:
    """Sample the token that the guard will compare at the position of the sequence's last token."""
    token = draw(logits_V, 1.0, ~seq.request.seed, len(seq.tokens))
    seq.drawn.append(logprob(logits_V, token, 0))
